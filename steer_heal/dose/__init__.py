"""Strength of steering. A dose is a multiple of the vector, which has the mean difference's norm in each layer.

An option lists doses, or searches for the highest one that passes a test of its own and derives doses from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from pydantic import Field

from steer_heal.artifacts import RoundFailed, Row
from steer_heal.config import Config


class Trials(Protocol):
    """Measurements that a search makes at a dose, on `samples` answers to each training prompt."""

    def pass_rate(self, dose: float, samples: int) -> float:
        """Share of the answers that pass every filter, the mean over prompts."""

    def divergence(self, dose: float, samples: int) -> float:
        """95th percentile of KL(steered || unsteered) over all positions of the answers, nats."""


@dataclass(frozen=True)
class DoseSearch:
    """Doses at which every prompt is answered, if any were found, and the trials of the search in order."""

    doses: tuple[float, ...]
    trials: tuple[Row, ...] = ()  # `alpha`, the measured figure under its name, and `passed`, 0 or 1


class NoDose(RoundFailed):
    """No dose within the bounds passes; the message lists what was tried, and `search` holds it as a table."""

    def __init__(self, message: str, search: DoseSearch = DoseSearch(())) -> None:
        super().__init__(message)
        self.search = search


class Dose(Config):
    """Subclasses set `name` and implement both methods."""

    filters: ClassVar[bool] = False  # whether `find` depends on the filters
    name: str

    def count(self) -> int:
        """Number of doses; every prompt is answered at each of them."""
        raise NotImplementedError(type(self))

    def find(self, trials: Trials) -> DoseSearch:
        """The doses for a vector. Raises NoDose."""
        raise NotImplementedError(type(self))


class Search(Dose):
    """A dose found by search. Subclasses set `figure` and implement `measure` and `passes`, which reads `target`."""

    figure: ClassVar[str]  # name of the measured figure, for the table
    target: float  # value that the figure must meet
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(min_length=1)  # of the dose found, to answer at
    samples: int = Field(ge=1)  # answers to each prompt in a trial
    least: float = Field(gt=0, le=1)
    most: float = Field(ge=1)
    precision: float = Field(ge=0.001, lt=1)  # the dose found passes; one larger by this share does not

    def count(self) -> int:
        return len(self.shares)

    def measure(self, trials: Trials, dose: float) -> float:
        raise NotImplementedError(type(self))

    def passes(self, value: float) -> bool:
        raise NotImplementedError(type(self))

    def find(self, trials: Trials) -> DoseSearch:
        tried: list[Row] = []

        def attempt(dose: float) -> bool:
            value = self.measure(trials, dose)
            passed = self.passes(value)
            tried.append({"alpha": dose, self.figure: value, "passed": float(passed)})
            return passed

        found = highest(attempt, self.least, self.most, self.precision)
        if found is None:
            listed = ", ".join(f"{row['alpha']:.3g}: {row[self.figure]:.3g}" for row in tried)
            raise NoDose(
                f"dose={self.name}: not even {self.least:g} meets dose.target={self.target:g}; {self.figure} by dose: "
                f"{listed}. Ease dose.target or lower dose.least",
                DoseSearch((), tuple(tried)),
            )
        return DoseSearch(tuple(_rounded(share * found) for share in self.shares), tuple(tried))


def _rounded(dose: float) -> float:
    """Round to six significant digits, so that no dose, however small, becomes 0, which would steer nothing."""
    return float(f"{dose:.6g}")


def highest(passes: Callable[[float], bool], least: float, most: float, precision: float) -> float | None:
    """Highest dose that passes, to within a share of `precision`; None if `least` does not pass.

    The dose is doubled from 1 while it passes, or halved until it does; then the gap is bisected on a logarithmic
    scale. This assumes that above the first dose that fails none passes.
    """
    low = high = 1.0
    if passes(1.0):
        while low < most and passes(high := min(2 * low, most)):
            low = high
        if low == most:
            return most
    else:
        while True:
            if high <= least:
                return None
            low = max(high / 2, least)
            if passes(low):
                break
            high = low
    while high / low > 1 + precision:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low
