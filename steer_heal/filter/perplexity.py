"""Perplexity of a completion's last part under base.

Steered text starts well and falls apart as it goes on, so the tail tells more than the whole. Base has not seen the
steering: what it finds impossible is either very much in the trait or broken.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steer_heal.filter import Evidence, Filter


class Perplexity(Filter):
    """Fails above `max`."""

    name: Literal["perplexity"]
    max: float = Field(gt=1)  # perplexity a token
    tail: float = Field(gt=0, le=1)  # share of the completion, counted from its end

    def score(self, evidence: Evidence) -> float:
        n = len(evidence.logprobs)
        tail = evidence.logprobs[n - max(1, round(self.tail * n)) :]
        return float((-tail.mean()).clamp(max=80).exp())  # finite in float32 whatever the model says

    def passes(self, score: float) -> bool:
        return score <= self.max
