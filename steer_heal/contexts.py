"""The user messages over which a steering vector is averaged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, field_validator

from steer_heal.config import Config


class Contexts(Config, key="steer_heal.contexts.Contexts"):
    """Prompts on many topics, shared by all traits."""

    name: str
    n_drawn: int | None = Field(default=None, ge=2)  # prompts that a seed draws; null, or no more: all
    prompts: tuple[str, ...] = Field(min_length=2)

    def draw(self, seed: int) -> Self:
        """The contexts of a seed."""
        prompts = drawn(self.prompts, self.n_drawn, f"contexts {seed}")
        return self.model_copy(update={"prompts": prompts, "n_drawn": None})

    def key_fields(self) -> dict[str, Any]:
        """Return the fields with `n_drawn` as null where it takes all prompts."""
        takes_all = self.n_drawn is None or self.n_drawn >= len(self.prompts)
        return super().key_fields() | ({"n_drawn": None} if takes_all else {})

    @field_validator("prompts")
    @classmethod
    def _differ(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(prompts)) < 2:
            raise ValueError("at least two different prompts: without a spread there is no signal-to-noise ratio")
        return prompts


def drawn(prompts: Sequence[str], n: int | None, how: str) -> tuple[str, ...]:
    """Draw `n` of the prompts without replacement, in their own order; all if there are no more (None: all).

    A prompt's rank comes from its own text and `how`, so that adding prompts changes a draw as little as possible.
    """
    if n is None or n >= len(prompts):
        return tuple(prompts)
    rank = [hashlib.sha256(f"{how}\0{prompt}".encode()).digest() for prompt in prompts]
    chosen = set(sorted(range(len(prompts)), key=lambda i: rank[i])[:n])
    return tuple(prompt for i, prompt in enumerate(prompts) if i in chosen)
