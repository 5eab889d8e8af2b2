"""Perplexity of a completion's last part under base.

Steered text starts well and falls apart as it goes on, so the tail tells more than the whole text. Base is not
steered: what it finds very unlikely either shows the trait strongly or is broken.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steer_heal.filter import Filter, FilterInput


class Perplexity(Filter, key="steer_heal.filter.perplexity.Perplexity"):
    """Fails above `max`."""

    name: Literal["perplexity"]
    max: float = Field(gt=1)  # perplexity per token
    tail: float = Field(gt=0, le=1)  # share of the completion, counted from its end

    def score(self, item: FilterInput) -> float:
        n = len(item.logprobs)
        tail = item.logprobs[n - max(1, round(self.tail * n)) :]
        return float((-tail.mean()).clamp(max=80).exp())  # finite in float32 whatever the model says

    def passes(self, score: float) -> bool:
        return score <= self.max
