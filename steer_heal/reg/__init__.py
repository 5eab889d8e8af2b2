"""Regularisers, which keep a heal close to its reference. One file each; heal/ knows only this interface.

    loss = nll + mean_b penalty(D_b),    D_b: the sequence's aggregated per-position divergence

A regulariser acts through a divergence and its penalty, through shrinking the adapter, or not at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from steer_heal.artifacts import Row
from steer_heal.config import Config

MOSTLY_ON = 0.9  # share of the sequences above which a barrier outweighs nll
HELD = 2.0  # kl up to this many times tau counts as held by the barrier
WEAK_DECAY = 0.10  # with less total decay than this, wd is nll in all but name


def _tau(value: Any) -> float | str:
    """Check tau in one place: each member of a union type would report an error of its own."""
    if isinstance(value, str) and re.fullmatch("auto|p[1-9][0-9]?", value):
        return value
    try:
        nats = float(value)
    except (TypeError, ValueError, OverflowError):
        nats = math.nan
    if not 0 <= nats < math.inf:
        raise ValueError("a number >= 0, auto, or a percentile p1 to p99")
    return nats


# Nats of divergence per sequence that are free; or the percentile, of the divergences that training without a barrier
# reaches, at which tau is fixed in round 0. `auto` is p50.
Tau = Annotated[float | str, BeforeValidator(_tau)]


class Regulariser(Config):
    """Does nothing by itself. Subclasses set `name` and override the methods that they act through."""

    has_barrier: ClassVar[bool] = False  # whether `divergence` is part of the loss
    decays: ClassVar[bool] = False  # whether `decay_factor` shrinks
    renamed: ClassVar[dict[str, str]] = {
        "shrink": "decay_factor", "idle": "is_noop", "settle": "with_tau_from", "limit": "tau_nats",
        "slope": "value_and_grad",
    }  # fmt: skip
    name: str

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        """Divergence [n] of logits [n, v], nats, differentiable in the student's. Needed only with a barrier."""
        raise NotImplementedError(type(self))

    def value_and_grad(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence [n] of the student's and the reference's log-probabilities [n, v], and its gradient [n, v].

        The gradient is with respect to the student's logits; log-probabilities are logits too. It comes from autograd
        unless an option has a closed form, which may overwrite `log_p`.
        """
        with torch.enable_grad():
            logits = log_q.detach().requires_grad_()
            d = self.divergence(logits, log_p)
            (gradient,) = torch.autograd.grad(d.sum(), logits)
        # of all equivalent gradients in log_q, the one with respect to logits: its sum is 0
        return d.detach(), gradient - log_q.exp() * gradient.sum(-1, keepdim=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Fall back to autograd in an option that overrides the divergence but inherits a closed-form gradient.

        This includes a divergence from a mixin beside the class with the closed form.
        """
        nearest = next(vars(kind) for kind in cls.__mro__ if vars(kind).keys() & {"divergence", "value_and_grad"})
        if "value_and_grad" not in nearest:
            cls.value_and_grad = Regulariser.value_and_grad  # type: ignore[method-assign]

    def penalty(self, d: Tensor) -> Tensor:
        """Penalty [b] of sequences with divergence d [b], nats."""
        return d.new_zeros(d.shape)

    def over(self, d: Tensor) -> Tensor:
        """Mask [b] of the sequences that pay a penalty, bool."""
        return d.new_zeros(d.shape).bool()

    def decay_factor(self, lr: float, lr_sum: float) -> float:
        """Factor on the adapter's weights in a step of learning rate `lr`; the round's rates add up to `lr_sum`."""
        return 1.0

    @property
    def is_noop(self) -> bool:
        """True if the barrier costs nothing, whatever the divergence."""
        return False

    @property
    def percentile(self) -> float | None:
        """Percentile, of the divergences without a barrier, at which tau is to be fixed; None if none is needed."""
        return None

    def with_tau_from(self, free: Tensor) -> Self:
        """This regulariser with tau fixed from the divergences [b] that training without a barrier reaches."""
        return self

    def distance(self) -> Self:
        """This regulariser reduced to its divergence: equal for options that differ only in the penalty."""
        return self

    def metrics(self) -> Row:
        """Figures of its own, logged every round."""
        return {}

    def expectation(self) -> str:
        """Expected shape of the curves, in words."""
        raise NotImplementedError(type(self))

    def diagnose(self, curve: Sequence[Row], summary: Row) -> list[str]:
        """Sentences, made by `sentence`, on whether it acted as it should, from a heal's curve and summary."""
        return []


class Barrier(Regulariser):
    """`lam * relu(D - tau)` per sequence: free below tau, linear above. Subclasses define the divergence."""

    has_barrier: ClassVar[bool] = True
    lam: float = Field(ge=0)  # nats of loss per nat over tau
    tau: Tau

    def key_fields(self) -> dict[str, Any]:
        """Fields of the cache key, with `auto` written as p50."""
        return super().key_fields() | ({"tau": "p50"} if self.tau == "auto" else {})

    @property
    def is_noop(self) -> bool:
        return self.lam == 0

    @property
    def percentile(self) -> float | None:
        return None if isinstance(self.tau, float) else 50.0 if self.tau == "auto" else float(self.tau[1:])

    def with_tau_from(self, free: Tensor) -> Self:
        if self.percentile is None:
            return self
        return self.model_copy(update={"tau": float(free.quantile(self.percentile / 100))})

    def distance(self) -> Self:
        return self.model_copy(update={"lam": 0.0, "tau": 0.0})

    @property
    def tau_nats(self) -> float:
        """tau in nats. Raises TypeError before it is fixed."""
        if not isinstance(self.tau, float):
            raise TypeError(f"tau={self.tau} is not fixed yet")
        return self.tau

    def penalty(self, d: Tensor) -> Tensor:
        return self.lam * (d - self.tau_nats).relu()

    def over(self, d: Tensor) -> Tensor:
        return d > self.tau_nats

    def metrics(self) -> Row:
        return {"tau": self.tau_nats}

    def expectation(self) -> str:
        past = f"tau = {self.tau_nats:.3g} nats"
        return f"nll falls; kl rises from 0 and, past {past}, more slowly: the penalty is linear and can be outweighed"

    def diagnose(self, curve: Sequence[Row], summary: Row) -> list[str]:
        """Report the barrier as never fired, without cost, not held, always on, or balanced."""
        on, highest = summary["barrier_on"], max(row["kl"] for row in curve)
        last = mean_of(curve[-max(1, min(5, len(curve) // 2)) :], "kl")
        if on == 0:
            return [sentence(False, f"the barrier never passed tau (kl at most {highest:.3f}): this *is* nll")]
        if self.is_noop:
            return [sentence(False, "the barrier costs nothing with lam=0: this *is* nll")]
        seen = f"barrier on for {on:.0%} of the sequences, kl at most {highest:.3f} and {last:.3f} at the end"
        if 0 < HELD * self.tau_nats < last:
            times = f"{last / self.tau_nats:.1f} times tau"
            return [sentence(False, f"nll outweighs the penalty, a higher lam would bind more: {seen}, {times}")]
        return [sentence(on < MOSTLY_ON, f"{'balanced' if on < MOSTLY_ON else 'always on, it outweighs nll'}: {seen}")]


def sentence(good: bool, text: str) -> str:
    """A diagnosis as the log shows it."""
    return f"{'ok' if good else 'warning'}: {text}"


def mean_of(rows: Sequence[Row], name: str) -> float:
    """Mean of one figure over rows."""
    return sum(row[name] for row in rows) / len(rows)
