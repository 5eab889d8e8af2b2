"""How strongly to steer. A dose is a multiple of the vector, which has the mean difference's norm in each layer.

An option gives doses outright, or looks for the highest one that passes a test of its own and goes by that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from pydantic import Field

from steer_heal.artifacts import Row
from steer_heal.config import Config


class Trials(Protocol):
    """What a search may try at a dose: answers to every training prompt, so many times each."""

    def survival(self, dose: float, samples: int) -> float:
        """Share of the answers that pass every filter, the mean over prompts."""

    def divergence(self, dose: float, samples: int) -> float:
        """95th percentile of KL(steered || unsteered) over all positions of the answers, nats."""


@dataclass(frozen=True)
class Found:
    """Doses at which every prompt is to be answered, if there are any, and the trials behind them in their order."""

    doses: tuple[float, ...]
    trials: tuple[Row, ...] = ()  # `alpha`, the figure tried for by its name, and `passed`, 0 or 1


class NoDose(RuntimeError):
    """No dose within its bounds passes; the message has what was tried, and `found` has it as a table."""

    def __init__(self, message: str, found: Found = Found(())) -> None:
        super().__init__(message)
        self.found = found


class Dose(Config):
    """Subclasses set `name` and implement both methods."""

    filters: ClassVar[bool] = False  # whether `find` goes by what the filters say
    name: str

    def count(self) -> int:
        """How many answers a prompt gets, each at a dose."""
        raise NotImplementedError(type(self))

    def find(self, trials: Trials) -> Found:
        """The doses for a vector. Raises NoDose."""
        raise NotImplementedError(type(self))


class Search(Dose):
    """A dose that is looked for. Subclasses set `figure` and implement `measure` and `passes`, which reads `target`."""

    figure: ClassVar[str]  # the name of what is measured, for the table
    target: float  # what `figure` must meet
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(min_length=1)  # of the dose found, to answer at
    samples: int = Field(ge=1)  # answers to each prompt in a trial
    least: float = Field(gt=0, le=1)
    most: float = Field(ge=1)
    precision: float = Field(ge=0.001, lt=1)  # the dose found passes, one larger by this share does not

    def count(self) -> int:
        return len(self.shares)

    def measure(self, trials: Trials, dose: float) -> float:
        raise NotImplementedError(type(self))

    def passes(self, value: float) -> bool:
        raise NotImplementedError(type(self))

    def find(self, trials: Trials) -> Found:
        tried: list[Row] = []

        def attempt(dose: float) -> bool:
            value = self.measure(trials, dose)
            passed = self.passes(value)
            tried.append({"alpha": dose, self.figure: value, "passed": float(passed)})
            return passed

        found = highest(attempt, self.least, self.most, self.precision)
        if found is None:
            told = ", ".join(f"{row['alpha']:.3g}: {row[self.figure]:.3g}" for row in tried)
            raise NoDose(
                f"dose={self.name}: not even {self.least:g} meets dose.target={self.target:g}; {self.figure} by dose: "
                f"{told}. Ease dose.target or lower dose.least",
                Found((), tuple(tried)),
            )
        return Found(tuple(_rounded(share * found) for share in self.shares), tuple(tried))


def _rounded(dose: float) -> float:
    """To six digits that count, so that none however small becomes 0, which would steer nothing."""
    return float(f"{dose:.6g}")


def highest(passes: Callable[[float], bool], least: float, most: float, precision: float) -> float | None:
    """The highest dose that passes, within a share of `precision`; None where `least` does not.

    From 1 it is doubled while it passes, or halved until it does; then the gap is halved in its logarithm. That takes
    passing to end somewhere and not to begin again.
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
