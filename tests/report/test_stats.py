"""The statistics of a comparison against SciPy, statsmodels and simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interval_coverage import TOTAL, World, shares
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from steer_heal.report.stats import (
    NEGLIGIBLE,
    Estimate,
    Matched,
    Part,
    Point,
    Verdict,
    contrast,
    detectable,
    estimate,
    holm,
    slope,
    verdict,
)  # fmt: skip

FIGURES = st.lists(st.floats(-10, 10), min_size=2, max_size=12).filter(lambda v: np.std(v) > 1e-3)


@given(FIGURES, st.floats(0.5, 0.999))
def test_an_interval_over_seeds_is_students(values: list[float], level: float) -> None:
    """Reference: scipy.stats.t.interval and ttest_1samp."""
    found = Estimate(float(np.mean(values)), Part.of(values))
    expected = stats.t.interval(level, len(values) - 1, np.mean(values), stats.sem(values))
    assert found.interval(level) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert found.p() == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6, abs=1e-12)


@given(FIGURES, FIGURES)
def test_several_parts_have_satterthwaites_degrees_of_freedom(one: list[float], two: list[float]) -> None:
    """Reference: Welch's test, which is this with two parts."""
    found = Estimate(float(np.mean(one) - np.mean(two)), Part.of(one), (Part.of(two),))  # type: ignore[arg-type]
    welch = stats.ttest_ind(one, two, equal_var=False)
    assert found.df == pytest.approx(welch.df, rel=1e-9)
    assert found.p() == pytest.approx(welch.pvalue, rel=1e-6, abs=1e-12)
    assert found.on_these_items().df == pytest.approx(len(one) - 1)


def test_an_estimate_has_a_part_for_seeds_and_one_for_items() -> None:
    values = np.array([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])
    found = estimate(values)
    assert found.value == 4
    assert found.seeds == Part(2.0 / 2, 1)  # means 3 and 5
    assert found.items == (Part(float(np.var([2, 3, 7], ddof=1)) / 3, 2),)
    single = estimate(values[:1])
    assert single.seeds is None
    assert single.interval() == pytest.approx(stats.t.interval(0.95, 2, 3, stats.sem([1, 2, 6])))
    assert estimate([[1.0]]).interval() is None
    assert estimate([[1.0]]).p() is None


@pytest.mark.parametrize("n", [1, 2, 3, 8, 20])
def test_holm(n: int) -> None:
    """Reference: statsmodels; with ties, and with values so small and large that they are cut."""
    p = np.random.default_rng(n).choice([1e-12, 0.001, 0.01, 0.02, 0.02, 0.3, 1.0], n).tolist()
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], abs=1e-12)


def curve(trait: float) -> Point:
    return Point(trait, trait**2)


@pytest.mark.parametrize(
    ("traits", "target", "between"),
    [
        ((0, 0.1, 0.2, 0.3, 0.4), 0.25, (0.2, 0.3)),
        ((0, 0.2, 0.24, 0.26, 0.3), 0.25, (0.2, 0.3)),  # 0.24 and 0.26 are too near to it
        ((0, 0.1, 0.25, 0.4), 0.25, (0.1, 0.4)),  # the point there is no neighbour
        ((0, 0.1, 0.2), 0.2, (0.1, 0.2)),
        ((0.3, 0, 0.1), 0.9, (0.1, 0.3)),  # no point above it
    ],
)
def test_a_slope_is_of_the_nearest_points_that_are_far_enough_apart(
    traits: Sequence[float], target: float, between: tuple[float, float]
) -> None:
    """Reference: the slope of T^2 between a and b is a + b."""
    assert slope([curve(t) for t in traits], target) == pytest.approx(sum(between))


def test_points_too_near_have_no_slope() -> None:
    with pytest.raises(ValueError, match=r"no two of 3 points lie 0\.05 nats of trait apart"):
        slope([curve(t) for t in (0, 0.02, 0.049)], 0.02)


def test_a_contrast_by_hand() -> None:
    """Two seeds, two probes, three texts: every part of the variance from its definition."""
    rng = np.random.default_rng(0)
    ours, control = (
        [Matched(0.3, rng.normal(0.3, 0.1, 2), rng.normal(0.1, 0.02, 3), k) for _ in "ab"] for k in (0.5, 0.8)
    )
    found = contrast(ours, control)
    delta = [float(a.damage.mean() - b.damage.mean()) for a, b in zip(ours, control, strict=True)]
    psi = np.mean([-0.5 * (a.gains - 0.3) + 0.8 * (b.gains - 0.3) for a, b in zip(ours, control, strict=True)], axis=0)
    phi = np.mean([a.damage - b.damage for a, b in zip(ours, control, strict=True)], axis=0)
    parts = [np.var(v, ddof=1) / len(v) for v in (delta, psi, phi)]
    assert found.value == pytest.approx(np.mean(delta))
    assert found.variance == pytest.approx(sum(parts))
    assert found.df == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 + parts[1] ** 2 + parts[2] ** 2 / 2))


def test_what_is_the_same_is_equivalent() -> None:
    """Such as a barrier that never fired against nll: no variance, no difference."""
    rng = np.random.default_rng(1)
    one = [Matched(0.3, rng.normal(0.3, 0.1, 8), rng.normal(0.1, 0.02, 8), 0.5) for _ in range(5)]
    found = contrast(one, one)
    assert (found.value, found.p(), found.interval()) == (0.0, 1.0, (0.0, 0.0))
    assert verdict(found, 1.0, 1, 5) == Verdict("equivalent")


def around(value: float, spread: float, n: int = 8) -> Estimate:
    """An estimate whose standard error is `spread`."""
    return Estimate(value, Part(spread**2, n - 1))


@pytest.mark.parametrize(
    ("value", "spread", "adjusted", "seeds", "told"),
    [
        (-0.03, 0.004, 0.001, 8, "better"),
        (0.03, 0.004, 0.001, 8, "worse"),
        (-0.006, 0.001, 0.001, 8, "better, negligible"),
        (0.001, 0.002, 0.6, 8, "equivalent"),
        (-0.02, 0.02, 0.3, 8, "within noise"),
        (-0.03, 0.004, 0.06, 8, "within noise"),
        (-0.03, 0.004, 0.001, 4, "no verdict (4 seeds)"),
        (-0.03, 0.004, 1.0, 1, "no verdict (1 seed)"),
    ],
)
def test_verdicts(value: float, spread: float, adjusted: float, seeds: int, told: str) -> None:
    assert str(verdict(around(value, spread), adjusted, 3, seeds)) == told
    assert str(Verdict("better", robust=False)) == "better, not robust"


def test_negligible_is_judged_for_all_rows_together() -> None:
    """Within the limit by its own 95 % interval, beyond it by that of ten rows."""
    found = around(0.007, 0.0012)
    own, shared = found.interval(), found.interval(1 - 0.05 / 10)
    assert own is not None
    assert shared is not None
    assert own[1] < NEGLIGIBLE < shared[1]
    assert str(verdict(found, 0.001, 1, 8)) == "worse, negligible"
    assert str(verdict(found, 0.001, 10, 8)) == "worse"


@pytest.mark.parametrize("seeds", [5, 8, 20])
def test_the_detectable_difference(seeds: int) -> None:
    """Reference: statsmodels' power of the t-test, whose power at it is the one asked for within a few percent."""
    found = around(0.0, 0.01 / math.sqrt(8))
    effect = detectable(found, seeds) / 0.01
    assert TTestPower().power(effect, seeds, 0.05) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(("by_seeds", "by_items"), [(4, 1), (1, 4)])
def test_intervals_hold_the_truth_as_often_as_they_say(by_seeds: int, by_items: int) -> None:
    """600 replicates: three standard errors are 2.7 %. Of seeds alone it is too narrow where items vary."""
    held, alone, alarms = shares(World.of(5, by_seeds, by_items), 600, 0.0)
    assert 0.92 <= held <= 0.98
    assert alarms <= 0.08
    assert alone < (0.8 if by_items > by_seeds else 0.97)
    held, _, power = shares(World.of(5, by_seeds, by_items), 600, 3 * TOTAL)
    assert 0.92 <= held <= 0.98
    assert power > 0.6, "a difference of three standard errors"
