"""Matching: the gate at which a healed student has a given trait gain, so that students compare by damage alone.

A student that learned more of the trait has more damage too, whatever healed it. Its gate c scales all that it learned,
`W0 + c * delta`, and so leads from base to the student: along this frontier trait and damage are measured, and the gate
is solved at which the gain is T*, the same for all students of a comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from steer_heal.artifacts import Metrics, Row
from steer_heal.config import Config


class Gates(Protocol):
    """Measurements of a student with everything that it learned scaled by a gate."""

    def gain(self, gate: float) -> float:
        """Trait gain over base, nats/token."""

    def student(self, gate: float) -> GatedStudent:
        """Trait and damage."""


@dataclass(frozen=True)
class GatedStudent:
    """What was measured at one gate."""

    gate: float
    gain: float  # of trait over base, nats/token
    metrics: dict[str, Metrics]  # of the evaluations `trait` and `damage`

    @property
    def values(self) -> Row:
        """The figures of both by name."""
        return {name: value for found in self.metrics.values() for name, value in found.values.items()}


@dataclass(frozen=True)
class Frontier:
    """A student from base to gate 1, and at the gate where its trait gain is the target."""

    target: float  # T*, trait gain over base, nats/token
    points: tuple[GatedStudent, ...]  # by rising gate, the last one 1
    matched: GatedStudent | None  # None: no gate reaches the target


class Match(Config):
    """Subclasses set `name` and implement both methods."""

    name: str

    def target(self, steered_gain: float) -> float | None:
        """The trait gain T* to match at, nats/token, from that of round 0's steered model; None to leave it out."""
        raise NotImplementedError(type(self))

    def find(self, gates: Gates, target: float) -> Frontier:
        """Measure the frontier and solve the gate."""
        raise NotImplementedError(type(self))
