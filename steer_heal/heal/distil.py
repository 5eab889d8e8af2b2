"""How a round is trained."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from steer_heal.config import Config
from steer_heal.lm.divergence import Aggregator


class Heal(Config):
    """The training of one round, the same for every regulariser."""

    name: str
    lr: float = Field(gt=0)  # peak learning rate of AdamW
    warmup: float = Field(ge=0, lt=1)  # share of the steps before the peak; a cosine to 0 follows
    epochs: int = Field(ge=1)
    steps: int | None = Field(ge=1)  # optimiser steps in all; null: as many as the epochs make
    batch_size: int = Field(ge=1)  # sequences an optimiser step
    max_len: int = Field(ge=2)  # tokens of prompt and completion; the front is kept
    n_keep: int | None = Field(ge=1)  # train on at most this many completions; null: all that pass
    min_train: int = Field(ge=1)  # refuse to train on fewer
    top_ups: int = Field(ge=0)  # further batches that are generated at most, while fewer than n_keep survive
    agg: Aggregator  # how the divergences of a sequence's positions become one number
    reference: Literal["base", "prev"]  # what divergences are measured against
    measure_every: int = Field(ge=1)  # steps between measurements of kl_fwd, kl_rev and grad_ratio
    max_gnorm: float = Field(gt=1)  # stop when gnorm is so many times its median so far

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.n_keep is not None and self.n_keep < self.min_train:
            raise ValueError(f"one whose n_keep={self.n_keep} is at least its min_train={self.min_train}")
        return self

    def meaning(self) -> dict[str, Any]:
        """Without what only refuses, and without `reference` and `top_ups`, which choose what `heal` is given.

        Epochs say how many steps there are where `steps` does not.
        """
        unread = {"min_train", "max_gnorm", "reference", "top_ups"} | ({"epochs"} if self.steps is not None else set())
        return {field: value for field, value in super().meaning().items() if field not in unread}

    def total_steps(self, n: int) -> int:
        return self.steps or self.epochs * math.ceil(n / self.batch_size)

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step: a linear warm-up, then a cosine to 0 after the last step."""
        warm = round(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
