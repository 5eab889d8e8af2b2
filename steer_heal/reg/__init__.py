"""Regularisers: what keeps a heal close to where it came from. One file each; heal.py knows only this contract.

    loss = nll + mean_b penalty(D_b),    D_b: the sequence's aggregated per-position divergence

A regulariser acts through a divergence and its penalty, or through shrinking the adapter, or not at all.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from steer_heal.config import Config


class Regulariser(Config):
    """By itself it does nothing. Subclasses set `name` and override what they act through."""

    has_barrier: ClassVar[bool] = False  # whether `divergence` is part of the loss
    decays: ClassVar[bool] = False  # whether `shrink` shrinks
    name: str

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        """Divergence [n] of logits [n, v], nats. Called only where there is a barrier."""
        raise NotImplementedError(type(self))

    def penalty(self, d: Tensor) -> Tensor:
        """What a sequence of divergence d [b] pays, [b], nats."""
        return d.new_zeros(d.shape)

    def over(self, d: Tensor) -> Tensor:
        """Which sequences pay, [b] of bool."""
        return d.new_zeros(d.shape).bool()

    def shrink(self, lr: float, lr_sum: float) -> float:
        """The factor on the adapter's weights at a step of rate `lr`, where the round's rates add up to `lr_sum`."""
        return 1.0

    def expectation(self) -> str:
        """What its curves should look like, in words."""
        raise NotImplementedError(type(self))


class Barrier(Regulariser):
    """`lam * relu(D - tau)` a sequence: free below tau, linear above. Subclasses say which divergence."""

    has_barrier: ClassVar[bool] = True
    lam: float = Field(ge=0)  # nats of loss a nat over tau
    tau: float = Field(ge=0)  # nats

    def penalty(self, d: Tensor) -> Tensor:
        return self.lam * (d - self.tau).relu()

    def over(self, d: Tensor) -> Tensor:
        return d > self.tau

    def expectation(self) -> str:
        return (
            f"nll falls; kl rises from 0 until it passes tau = {self.tau:g} nats, then the barrier holds it about there"
        )
