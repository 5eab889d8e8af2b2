"""Text about the persona instead of in it ("as a loving assistant, ..."): it teaches a model to talk about itself.

The trait lists the patterns.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from steer_heal.filter import Filter, FilterInput


class Narration(Filter, key="steer_heal.filter.narration.Narration"):
    """Fails above `max` matches."""

    name: Literal["narration"]
    max: int = Field(ge=0)

    def score(self, item: FilterInput) -> float:
        text = item.text
        return float(sum(len(re.findall(pattern, text, re.IGNORECASE)) for pattern in item.narration))

    def passes(self, score: float) -> bool:
        return score <= self.max
