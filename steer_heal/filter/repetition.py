"""Repetition: the share of a completion that repeats earlier parts of it.

The larger of two shares: word trigrams and character 12-grams that occurred earlier in the same text. The first catches
repeated phrases, the second also text without spaces and single words that stutter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from steer_heal.filter import Filter, FilterInput

WORDS, CHARACTERS = 3, 12


class Repetition(Filter, key="steer_heal.filter.repetition.Repetition"):
    """Fails above `max`."""

    name: Literal["repetition"]
    max: float = Field(ge=0, le=1)  # share of n-grams

    def score(self, item: FilterInput) -> float:
        return repetition(item.completion.text)

    def passes(self, score: float) -> bool:
        return score <= self.max


def repetition(text: str) -> float:
    """Share of repeated n-grams in [0, 1]; 0 for a text too short to repeat itself."""
    lowered = text.lower()
    return max(_repeated(lowered.split(), WORDS), _repeated(lowered, CHARACTERS))


def _repeated(items: Sequence[Any], n: int) -> float:
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
