"""Statistics of a comparison: estimates with their variances, the contrast at matched trait, and the verdict.

A figure is a mean over seeds of a mean over items (probes or texts). Another experimenter would draw other seeds and
write other items, so the variance of the figure is the sum of what each would change:

    V = V_seeds + V_items,  V_seeds = var(m_s) / n_s of the seeds' means,  V_items = var(m_i) / n_i of the items' means

(Crossed random effects; what seeds and items do together is in both terms, which errs on the wide side.) Its degrees of
freedom are Satterthwaite's (1946, Biometrics Bulletin 2:110), its interval is Student's t.

At matched trait a student's gate is solved so that the mean gain of *these* probes is T*. Other probes would have had
another gate and so another damage: dD = -kappa dT, where kappa is the slope of its damage in its trait. So each probe
moves the contrast by kappa times its distance from T*, which is the probes' part of V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit  # scipy.stats takes as long to import as everything else here

LEVEL = 0.05  # of the verdicts, after Holm
NEGLIGIBLE = 0.010  # nats/token of damage that nobody would notice
MIN_SEEDS = 5  # with fewer there is no verdict
NEAR = 0.05  # nats between points of a slope, at least: closer ones are noise


@dataclass(frozen=True)
class Part:
    """What one source of variation adds to the variance of a mean."""

    variance: float
    df: int

    @classmethod
    def of(cls, values: ArrayLike) -> Self | None:
        """Of the mean of independent values [n]; None of fewer than two."""
        found = np.asarray(values, dtype=np.float64)
        return cls(float(found.var(ddof=1)) / len(found), len(found) - 1) if len(found) > 1 else None


@dataclass(frozen=True)
class Estimate:
    """A figure with the parts of its variance; seeds first."""

    value: float
    seeds: Part | None  # None: a single seed
    items: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*((self.seeds,) if self.seeds else ()), *self.items)

    @property
    def variance(self) -> float:
        return sum(part.variance for part in self.parts)

    @property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom; infinite if nothing varies."""
        below = sum(part.variance**2 / part.df for part in self.parts)
        return self.variance**2 / below if below else math.inf

    def on_these_items(self) -> Estimate:
        """The same with other seeds alone in mind: valid for these probes and texts only."""
        return Estimate(self.value, self.seeds)

    def interval(self, level: float = 1 - LEVEL) -> tuple[float, float] | None:
        """Two-sided interval of confidence `level`; None if there is nothing to estimate a variance from."""
        if not self.parts:
            return None
        half = _quantile(self.df, (1 + level) / 2) * math.sqrt(self.variance)
        return self.value - half, self.value + half

    def p(self) -> float | None:
        """Two-sided p-value against 0; None if there is nothing to estimate a variance from."""
        if not self.parts:
            return None
        if not self.variance:
            return 0.0 if self.value else 1.0
        return float(2 * stdtr(min(self.df, 1e9), -abs(self.value) / math.sqrt(self.variance)))


def _quantile(df: float, level: float) -> float:
    return float(stdtrit(min(df, 1e9), level))


def estimate(values: ArrayLike) -> Estimate:
    """The mean of values [s, i], of s seeds on the same i items."""
    found = np.asarray(values, dtype=np.float64)
    items = Part.of(found.mean(0))
    return Estimate(float(found.mean()), Part.of(found.mean(1)), (items,) if items else ())


@dataclass(frozen=True)
class Point:
    """A student at one gate: trait gain and damage over base, nats/token."""

    trait: float
    damage: float


def slope(points: Sequence[Point], target: float) -> float:
    """dD/dT at T = `target`: between the nearest measured points at least NEAR / 2 under and over it.

    Where nothing lies over it or under it, between the nearest two that are NEAR apart. Raises ValueError if none are.
    """
    under = [point for point in points if point.trait <= target - NEAR / 2]
    over = [point for point in points if point.trait >= target + NEAR / 2]
    if under and over:
        a, b = max(under, key=lambda p: p.trait), min(over, key=lambda p: p.trait)
    else:
        apart = [(a, b) for a in points for b in points if b.trait - a.trait >= NEAR]
        if not apart:
            raise ValueError(f"no two of {len(points)} points lie {NEAR} nats of trait apart")
        a, b = min(apart, key=lambda pair: abs(pair[0].trait - target) + abs(pair[1].trait - target))
    return (b.damage - a.damage) / (b.trait - a.trait)


@dataclass(frozen=True)
class Matched:
    """One seed's student at the gate where its trait gain is T*."""

    target: float  # T*, nats/token
    gains: NDArray[np.float64]  # [p], of each probe over base
    damage: NDArray[np.float64]  # [t], of each text over base, its forms averaged: they are one cluster
    slope: float  # dD/dT there

    def moved(self) -> NDArray[np.float64]:
        """How each probe [p], were all like it, would move the damage at T*."""
        return -self.slope * (self.gains - self.target)


def contrast(ours: Sequence[Matched], control: Sequence[Matched]) -> Estimate:
    """Damage of `ours` minus that of `control` at T*, mean over the same seeds in the same order."""
    pairs = list(zip(ours, control, strict=True))
    texts = np.array([a.damage - b.damage for a, b in pairs])  # [s, t]
    probes = np.array([a.moved() - b.moved() for a, b in pairs])  # [s, p]
    items = (Part.of(probes.mean(0)), Part.of(texts.mean(0)))
    return Estimate(float(texts.mean()), Part.of(texts.mean(1)), tuple(part for part in items if part))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for all of them (Holm 1979, Scandinavian Journal of Statistics 6:65)."""
    found, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        found[i] = highest
    return found


@dataclass(frozen=True)
class Verdict:
    """What may be said of a row against the control."""

    word: str  # better, worse, equivalent, within noise, no verdict, not reached
    detail: str = ""  # negligible, or the numbers behind no verdict and not reached
    robust: bool = True
    seeds: int = 0  # in common with the control, if they are fewer than the row has

    def __str__(self) -> str:
        about = f" ({self.detail})" if self.detail and self.word in ("no verdict", "not reached") else ""
        also = f", {self.detail}" if self.detail and not about else ""
        some = f" (of {self.seeds} seeds)" if self.seeds else ""
        return f"{self.word}{also}{about}{'' if self.robust else ', not robust'}{some}"


def verdict(found: Estimate, adjusted: float, rows: int, seeds: int) -> Verdict:
    """The verdict on a contrast of damage, `adjusted` being its p-value after Holm over `rows` rows."""
    if seeds < MIN_SEEDS:
        return Verdict("no verdict", f"{seeds} seed{'s' if seeds != 1 else ''}")
    if adjusted < LEVEL:
        word = "better" if found.value < 0 else "worse"
        return Verdict(word, "negligible" if _within(found.interval(1 - LEVEL / rows)) else "")
    return Verdict("equivalent" if _within(found.interval(0.9)) else "within noise")


def _within(interval: tuple[float, float] | None) -> bool:
    return interval is not None and interval[0] >= -NEGLIGIBLE and interval[1] <= NEGLIGIBLE


def detectable(found: Estimate, seeds: int, power: float = 0.8) -> float:
    """The smallest difference found with probability `power` at LEVEL, from so many seeds and the same items."""
    assert found.seeds is not None
    now = found.seeds.df + 1
    planned = Estimate(0.0, Part(found.seeds.variance * now / seeds, seeds - 1), found.items)
    t = _quantile(planned.df, 1 - LEVEL / 2) + _quantile(planned.df, power)
    return t * math.sqrt(planned.variance)
