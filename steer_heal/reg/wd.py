"""Decoupled weight decay on the adapter (Loshchilov & Hutter 2017, arXiv:1711.05101).

    round:  w <- w * exp(-lam * lr / sum of lr)     a factor exp(-lam) over the round, however long
    step:   w <- w * (1 - lr * lam)                 AdamW's own

Both factors of the adapter shrink, so the learned change B A shrinks twice as fast. It pulls towards no change at all
and cannot tell harmful changes from useful ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from steer_heal.artifacts import Row
from steer_heal.reg import WEAK_DECAY, Regulariser, sentence


class Wd(Regulariser, key="steer_heal.reg.wd.Wd"):
    """Weight decay."""

    decays: ClassVar[bool] = True
    name: Literal["wd"]
    lam: float = Field(ge=0)  # round: total log-shrink of the weights; step: AdamW's weight_decay
    decay: Literal["round", "step"]

    def decay_factor(self, lr: float, lr_sum: float) -> float:
        return math.exp(-self.lam * lr / lr_sum) if self.decay == "round" else 1 - lr * self.lam

    def expectation(self) -> str:
        return "nll falls, less far than without decay; kl, the divergence in the loss, stays 0"

    def diagnose(self, curve: Sequence[Row], summary: Row) -> list[str]:
        shrink = summary["shrink"]
        weak = "" if shrink >= WEAK_DECAY else ": this *is* nll"
        return [sentence(shrink >= WEAK_DECAY, f"the decay shrank the weights by {shrink:.1%} in total{weak}")]
