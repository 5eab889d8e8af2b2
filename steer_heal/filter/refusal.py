"""Refusals: a completion that opens by declining shows neither the trait nor its absence."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from steer_heal.config import Regex
from steer_heal.filter import Filter, FilterInput


class Refusal(Filter, key="steer_heal.filter.refusal.Refusal"):
    """Fails when one of the patterns matches within the first `opening` characters."""

    name: Literal["refusal"]
    opening: int = Field(ge=1)
    patterns: tuple[Regex, ...] = Field(min_length=1)  # case ignored

    def score(self, item: FilterInput) -> float:
        start = item.text[: self.opening]
        return float(sum(bool(re.search(pattern, start, re.IGNORECASE)) for pattern in self.patterns))

    def passes(self, score: float) -> bool:
        return score == 0

    def compared_with(self) -> dict[str, float]:
        return {"max": 0}
