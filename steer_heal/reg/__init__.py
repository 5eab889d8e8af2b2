"""Regularisers: what keeps a heal close to where it came from. One file each; heal/ knows only this contract.

    loss = nll + mean_b penalty(D_b),    D_b: the sequence's aggregated per-position divergence

A regulariser acts through a divergence and its penalty, or through shrinking the adapter, or not at all.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from steer_heal.config import Config


def _tau(value: Any) -> float | str:
    """One check in place of a union's, each of whose members would refuse the value in a sentence of its own."""
    if isinstance(value, str) and re.fullmatch("auto|p[1-9][0-9]?", value):
        return value
    try:
        nats = float(value)
    except (TypeError, ValueError, OverflowError):
        nats = math.nan
    if not 0 <= nats < math.inf:
        raise ValueError("a number >= 0, auto, or a percentile p1 to p99")
    return nats


# Nats of divergence a sequence that are free; or the percentile of what training without a barrier reaches at which to
# set that in round 0. `auto` is p50.
Tau = Annotated[float | str, BeforeValidator(_tau)]


class Regulariser(Config):
    """By itself it does nothing. Subclasses set `name` and override what they act through."""

    has_barrier: ClassVar[bool] = False  # whether `divergence` is part of the loss
    decays: ClassVar[bool] = False  # whether `shrink` shrinks
    name: str

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        """Divergence [n] of logits [n, v], nats, differentiable in the student's. Only where there is a barrier."""
        raise NotImplementedError(type(self))

    def slope(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence [n] of the student's and the reference's log-probabilities [n, v], and its gradient [n, v].

        The gradient is that in the student's logits, which log-probabilities are as well. It comes from autograd
        unless an option knows its closed form, which may spoil `log_p`.
        """
        with torch.enable_grad():
            logits = log_q.detach().requires_grad_()
            d = self.divergence(logits, log_p)
            (gradient,) = torch.autograd.grad(d.sum(), logits)
        # of all gradients in log_q that mean the same, the one in logits: its sum is 0
        return d.detach(), gradient - log_q.exp() * gradient.sum(-1, keepdim=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """An option that changes the divergence has not changed a closed form that it inherits: it gives that up.

        Also where the divergence comes from a class beside the one that knows the closed form.
        """
        nearest = next(vars(kind) for kind in cls.__mro__ if vars(kind).keys() & {"divergence", "slope"})
        if "slope" not in nearest:
            cls.slope = Regulariser.slope  # type: ignore[method-assign]

    def penalty(self, d: Tensor) -> Tensor:
        """What a sequence of divergence d [b] pays, [b], nats."""
        return d.new_zeros(d.shape)

    def over(self, d: Tensor) -> Tensor:
        """Which sequences pay, [b] of bool."""
        return d.new_zeros(d.shape).bool()

    def shrink(self, lr: float, lr_sum: float) -> float:
        """The factor on the adapter's weights at a step of rate `lr`, where the round's rates add up to `lr_sum`."""
        return 1.0

    @property
    def idle(self) -> bool:
        """Whether its barrier costs nothing, whatever the divergence."""
        return False

    @property
    def percentile(self) -> float | None:
        """Of the divergences that training without a barrier reaches: where it is to be settled; None if it is."""
        return None

    def settle(self, free: Tensor) -> Self:
        """With what it takes from the divergences [b] that training without a barrier reaches."""
        return self

    def distance(self) -> Self:
        """Its divergence alone: options that differ in what they make of it share this."""
        return self

    def expectation(self) -> str:
        """What its curves should look like, in words."""
        raise NotImplementedError(type(self))


class Barrier(Regulariser):
    """`lam * relu(D - tau)` a sequence: free below tau, linear above. Subclasses say which divergence."""

    has_barrier: ClassVar[bool] = True
    lam: float = Field(ge=0)  # nats of loss a nat over tau
    tau: Tau

    def meaning(self) -> dict[str, Any]:
        """`auto` written out."""
        return super().meaning() | ({"tau": "p50"} if self.tau == "auto" else {})

    @property
    def idle(self) -> bool:
        return self.lam == 0

    @property
    def percentile(self) -> float | None:
        return None if isinstance(self.tau, float) else 50.0 if self.tau == "auto" else float(self.tau[1:])

    def settle(self, free: Tensor) -> Self:
        if self.percentile is None:
            return self
        return self.model_copy(update={"tau": float(free.quantile(self.percentile / 100))})

    def distance(self) -> Self:
        return self.model_copy(update={"lam": 0.0, "tau": 0.0})

    @property
    def limit(self) -> float:
        """tau in nats. Raises TypeError before it is settled."""
        if not isinstance(self.tau, float):
            raise TypeError(f"tau={self.tau} is not settled yet")
        return self.tau

    def penalty(self, d: Tensor) -> Tensor:
        return self.lam * (d - self.limit).relu()

    def over(self, d: Tensor) -> Tensor:
        return d > self.limit

    def expectation(self) -> str:
        passed = f"tau = {self.limit:.3g} nats"
        return f"nll falls; kl rises from 0 until it passes {passed}, then the barrier holds it about there"
