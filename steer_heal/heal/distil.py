"""Settings for training one round."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from steer_heal.config import Config
from steer_heal.lm.divergence import Aggregator


class Heal(Config, key="steer_heal.heal.distil.Heal"):
    """Settings for training one round, the same for every regulariser."""

    name: str
    lr: float = Field(gt=0)  # peak learning rate of AdamW
    warmup: float = Field(ge=0, lt=1)  # share of the steps before the peak; a cosine to 0 follows
    epochs: int = Field(ge=1)
    steps: int | None = Field(ge=1)  # total optimiser steps; null: as many as `epochs` takes
    batch_size: int = Field(ge=1)  # sequences per optimiser step
    max_len: int = Field(ge=2)  # tokens of prompt and completion; the front is kept
    n_keep: int | None = Field(ge=1)  # train on at most this many completions; null: all that pass the filters
    min_train: int = Field(ge=1)  # raise an error if there are fewer
    top_ups: int = Field(ge=0)  # maximum number of extra batches to generate while fewer than n_keep survive
    agg: Aggregator  # how the divergences of a sequence's positions become one number
    reference: Literal["base", "prev"]  # what divergences are measured against
    measure_every: int = Field(ge=1)  # steps between measurements of kl_fwd, kl_rev and grad_ratio
    max_gnorm: float = Field(gt=1)  # stop when gnorm exceeds this many times its median so far

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.n_keep is not None and self.n_keep < self.min_train:
            raise ValueError(f"one whose n_keep={self.n_keep} is at least its min_train={self.min_train}")
        return self

    def key_fields(self) -> dict[str, Any]:
        """Return the fields except those that only raise errors, and except `reference` and `top_ups`, which choose
        the inputs of `heal`.

        `epochs` counts only if `steps` is null.
        """
        unread = {"min_train", "max_gnorm", "reference", "top_ups"} | ({"epochs"} if self.steps is not None else set())
        return {field: value for field, value in super().key_fields().items() if field not in unread}

    def total_steps(self, n: int) -> int:
        return self.steps or self.epochs * math.ceil(n / self.batch_size)

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of a step: a linear warm-up, then a cosine to 0 after the last step."""
        warm = round(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
