"""Decoupled weight decay on the adapter (Loshchilov & Hutter 2017, arXiv:1711.05101).

    round:  w <- w * exp(-lam * lr / sum of lr)     the weights lose a factor exp(-lam) over the round, however long
    step:   w <- w * (1 - lr * lam)                 AdamW's own

Both factors of the adapter shrink, so the learned change B A shrinks twice as fast. It pulls towards no change at all
and does not know which change hurts.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from steer_heal.reg import Regulariser


class Wd(Regulariser):
    """Weight decay."""

    decays: ClassVar[bool] = True
    name: Literal["wd"]
    lam: float = Field(ge=0)  # round: total log-shrink of the weights; step: AdamW's weight_decay
    decay: Literal["round", "step"]

    def shrink(self, lr: float, lr_sum: float) -> float:
        return math.exp(-self.lam * lr / lr_sum) if self.decay == "round" else 1 - lr * self.lam

    def expectation(self) -> str:
        return "nll falls, less far than without decay; kl, the divergence in the loss, stays 0"
