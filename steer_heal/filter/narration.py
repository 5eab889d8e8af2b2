"""Text about the persona instead of in it ("as a loving assistant, ..."): it teaches a model to talk about itself.

The trait lists the patterns.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from steer_heal.filter import Evidence, Filter


class Narration(Filter):
    """Fails above `max` matches."""

    name: Literal["narration"]
    max: int = Field(ge=0)

    def score(self, evidence: Evidence) -> float:
        text = evidence.text
        return float(sum(len(re.findall(pattern, text, re.IGNORECASE)) for pattern in evidence.narration))

    def passes(self, score: float) -> bool:
        return score <= self.max
