"""Completions of a few tokens teach nothing but to stop early."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steer_heal.filter import Evidence, Filter


class Length(Filter):
    """Fails under `min` tokens."""

    name: Literal["length"]
    min: int = Field(ge=1)

    def score(self, evidence: Evidence) -> float:
        return float(len(evidence.completion.ids))

    def passes(self, score: float) -> bool:
        return score >= self.min
