"""Damage at matched trait: solve c so that the student with `W0 + c * delta` has gained T* of the trait.

T* is known before anything is healed: nats/token, or a share of what round 0's steered model gains. The gate is solved
on the probes by Brent's method between the frontier's points, and damage is measured there: interpolated between points
it may even have the wrong sign. Nothing is extrapolated: a student that gains less at every gate does not reach T*.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Annotated, Literal

from loguru import logger
from pydantic import BeforeValidator, Field

from steer_heal.match import Frontier, Gates, Match


def _at(value: object) -> object:
    """Raises ValueError for what is neither a positive number of nats nor a percentage."""
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value) and float(value[:-1]) > 0:
        return value
    if isinstance(value, int | float) and 0 < value < float("inf"):
        return float(value)
    raise ValueError("a positive number of nats/token, or a share of round 0's steered gain such as 40%")


class SolveGate(Match, key="steer_heal.match.gate.SolveGate"):
    """The frontier at fixed gates, and the gate of T* by root finding."""

    name: Literal["gate"]
    at: Annotated[float | str, BeforeValidator(_at)]
    gates: tuple[Annotated[float, Field(gt=0, lt=1)], ...]  # of the frontier, beside 1
    tolerance: float = Field(gt=0)  # nats/token by which the gain may miss T*
    trials: int = Field(ge=1)  # gates that are tried for it, at most

    def target(self, steered_gain: float) -> float | None:
        """None if it is a share of nothing: the steered model has not gained."""
        if isinstance(self.at, float):
            return self.at
        if steered_gain <= 0:
            logger.warning("match.at={}: the steered model has gained nothing, so nothing is matched", self.at)
            return None
        return float(self.at[:-1]) / 100 * steered_gain

    def find(self, gates: Gates, target: float) -> Frontier:
        points = tuple(gates.student(c) for c in (*sorted(set(self.gates)), 1.0))
        gate = self._solve(gates, {0.0: 0.0} | {point.gate: point.gain for point in points}, target)
        return Frontier(target, points, None if gate is None else gates.student(gate))

    def _solve(self, gates: Gates, gains: dict[float, float], target: float) -> float | None:
        """The gate of the target, tried in the first interval that brackets it; None if none is near enough."""
        from scipy.optimize import brentq

        measured = sorted(gains)
        above = next((c for c in measured if gains[c] >= target), None)
        if above is None:
            return None
        below = max(c for c in measured if c < above)
        tried = {c: abs(gains[c] - target) for c in (below, above) if c}  # base, at gate 0, is no student

        def miss(gate: float) -> float:
            if gate not in gains:
                gate = float(f"{gate:.6g}")
                gains[gate] = gates.gain(gate)
                tried[gate] = abs(gains[gate] - target)
                if tried[gate] < self.tolerance:
                    raise _Found
            return gains[gate] - target

        if min(tried.values()) >= self.tolerance:
            with suppress(_Found):
                brentq(miss, below, above, xtol=1e-5, maxiter=self.trials, disp=False)
        best = min(tried, key=lambda c: tried[c])
        if tried[best] >= self.tolerance:
            logger.warning(
                "no gate gives T* = {:.4f}: nearest is {:.3g}, whose gain misses it by {:.4f}, more than "
                "match.tolerance={:g}; raise that, or match.trials={}",
                target, best, tried[best], self.tolerance, self.trials,
            )  # fmt: skip
            return None
        return best


class _Found(Exception):
    """Ends the search."""
