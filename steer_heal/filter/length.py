"""Length: a completion of only a few tokens teaches nothing but to stop early."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steer_heal.filter import Filter, FilterInput


class Length(Filter, key="steer_heal.filter.length.Length"):
    """Fails under `min` tokens."""

    name: Literal["length"]
    min: int = Field(ge=1)

    def score(self, item: FilterInput) -> float:
        return float(len(item.completion.ids))

    def passes(self, score: float) -> bool:
        return score >= self.min
