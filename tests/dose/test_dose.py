"""Searches for doses on made-up trials; test_dose_trials.py has those of a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from steer_heal.config import CONF, ConfigError, build
from steer_heal.dose import Dose, NoDose, Search, highest

FINEST = 0.001  # the smallest precision that is allowed


@dataclasses.dataclass
class MadeUp:
    """Figures given by functions of the dose, and a record of the requests."""

    figure: Callable[[float], float]
    asked: list[tuple[str, float, int]] = dataclasses.field(default_factory=list)

    def pass_rate(self, dose: float, samples: int) -> float:
        self.asked.append(("survival", dose, samples))
        return self.figure(dose)

    def divergence(self, dose: float, samples: int) -> float:
        self.asked.append(("divergence", dose, samples))
        return self.figure(dose)


def option(name: str, **fields: Any) -> Dose:
    """The option of conf/dose/<name>.yaml with some fields replaced. Raises ConfigError."""
    node = OmegaConf.to_container(OmegaConf.load(CONF / f"dose/{name}.yaml"))
    assert isinstance(node, dict)
    built = build(node | fields, "dose")
    assert isinstance(built, Dose)
    return built


def searched(passes: Callable[[float], bool], *bounds: float) -> tuple[float | None, list[float]]:
    """The dose that `highest` finds, and the doses that it tried."""
    tried: list[float] = []

    def counted(dose: float) -> bool:
        tried.append(dose)
        assert len(tried) < 100, f"no end of it: {tried[-5:]}"
        return passes(dose)

    return highest(counted, *bounds), tried


def spans(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers evenly spaced in their logarithm."""
    return st.floats(math.log(low), math.log(high)).map(math.exp)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    limit=spans(1e-3, 100), least=spans(0.01, 1), most=spans(1, 50), precision=spans(FINEST, 0.9), strict=st.booleans()
)
@example(limit=1.0, least=0.05, most=8.0, precision=0.05, strict=False)
@example(limit=1.0, least=0.05, most=8.0, precision=0.05, strict=True)
@example(limit=0.05, least=0.05, most=8.0, precision=0.05, strict=False)
@example(limit=8.0, least=0.05, most=8.0, precision=FINEST, strict=True)
@example(limit=1.0, least=1.0, most=1.0, precision=0.5, strict=False)
@example(limit=0.5, least=1.0, most=1.0, precision=0.5, strict=False)
@example(limit=90.0, least=0.05, most=3.0, precision=0.05, strict=False)
def test_the_highest_dose_against_a_fine_grid(
    limit: float, least: float, most: float, precision: float, strict: bool
) -> None:
    """Reference: every dose of a grid, twenty to a step of the precision, and the two bounds."""

    def passes(dose: float) -> bool:
        return dose < limit if strict else dose <= limit

    found, tried = searched(passes, least, most, precision)
    steps = math.ceil(20 * math.log(most / least) / math.log1p(precision)) if most > least else 0
    grid = np.append(np.geomspace(least, most, min(steps, 3000) + 1), [least, most])
    best = max((float(dose) for dose in grid if least <= dose <= most and passes(float(dose))), default=None)
    if best is None:
        assert found is None, f"{found} is said to pass, and no dose does"
    else:
        assert found is not None, f"nothing is found, and {best} passes"
        assert passes(found), f"{found} does not pass"
        assert best <= found * (1 + precision) * (1 + 1e-9), f"{found} is found, and {best} passes too"
    assert least <= min(tried) <= max(tried) <= most, f"tried outside [{least}, {most}]: {tried}"
    assert len(set(tried)) == len(tried), f"a dose was tried twice: {tried}"
    halvings = math.log2(max(math.log(2) / math.log1p(precision), 1))
    bound = 3 + math.log2(max(most, 1 / least)) + halvings
    assert len(tried) <= bound, f"{len(tried)} trials, of which {bound:.1f} should do"


@pytest.mark.parametrize(
    ("limit", "found", "begins"),
    [
        (1.0, 1.0, [1, 2, math.sqrt(2)]),
        (9.0, 8.0, [1, 2, 4, 8]),
        (0.04, None, [1, 0.5, 0.25, 0.125, 0.0625, 0.05]),
    ],
)
def test_the_ends_of_a_search(limit: float, found: float | None, begins: list[float]) -> None:
    """Reference: by hand. A dose of 1 that just passes is found itself; where all passes, or nothing, bounds end it."""
    got, tried = searched(lambda dose: dose <= limit, 0.05, 8.0, 0.05)
    assert got == found
    assert tried[: len(begins)] == begins
    assert limit == 1 or len(tried) == len(begins), f"went on after the bound: {tried}"


FIGURES: dict[str, tuple[Callable[[float], float], str]] = {  # falling and rising, each 0.5 at a dose of 1.5
    "walk": (lambda dose: 0.75 / (dose + 1e-9) if dose > 0.75 else 1.0, "survival"),
    "iso_kl": (lambda dose: 0.5 * (dose / 1.5) ** 2, "divergence"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_an_option_finds_doses_and_keeps_its_table(name: str) -> None:
    """Reference: 1.5, by hand; the table holds the trials' doses and figures in order."""
    figure, kind = FIGURES[name]
    trials = MadeUp(figure)
    made = option(name, target=0.5, shares=[0.25, 1.0], samples=3, precision=0.01)
    assert isinstance(made, Search)
    found = made.find(trials)
    low, high = found.doses
    assert 1.5 / 1.01 <= high <= 1.5, f"the dose found is {high}"
    assert low == pytest.approx(high / 4, rel=1e-5), f"a quarter of {high} is not {low}"
    assert [(kind, row["alpha"], 3) for row in found.trials] == trials.asked, "the table is not of what was tried"
    column = {"walk": "survival", "iso_kl": "kl_p95"}[name]
    for row in found.trials:
        value = figure(row["alpha"])
        passed = value >= 0.5 if name == "walk" else value <= 0.5
        assert row == {"alpha": row["alpha"], column: value, "passed": float(passed)}, row
    assert max(row["alpha"] for row in found.trials if row["passed"]) == pytest.approx(high, rel=1e-5)


@pytest.mark.parametrize(("name", "figure"), [("walk", 0.5), ("iso_kl", 1.5)])
def test_a_figure_that_just_meets_the_target_passes(name: str, figure: float) -> None:
    """Reference: `at least` of a share and `at most` of a divergence; here all doses are alike, so the highest wins."""
    assert option(name).find(MadeUp(lambda _: figure)).doses[-1] == 8
    worse = figure - 1e-9 if name == "walk" else figure + 1e-9
    with pytest.raises(NoDose):
        option(name).find(MadeUp(lambda _: worse))
    with pytest.raises(NoDose):
        option(name).find(MadeUp(lambda _: math.nan))


@pytest.mark.parametrize(("name", "said"), [("walk", "survival"), ("iso_kl", "kl_p95")])
def test_without_a_dose_the_message_has_the_numbers(name: str, said: str) -> None:
    """Reference: one line with option, bound, target, figure by dose in the order of the trials, and what to turn."""
    value = 0.125 if name == "walk" else 9.5
    with pytest.raises(NoDose) as raised:
        option(name, target=0.5, least=0.3).find(MadeUp(lambda dose: value))
    assert str(raised.value) == (
        f"dose={name}: not even 0.3 meets dose.target=0.5; {said} by dose: 1: {value}, 0.5: {value}, 0.3: {value}. "
        "Ease dose.target or lower dose.least"
    )
    assert [row["alpha"] for row in raised.value.search.trials] == [1.0, 0.5, 0.3]
    assert raised.value.search.doses == ()


def test_no_share_of_a_dose_becomes_nothing() -> None:
    """Reference: shares of the smallest dose, by hand. A dose of 0 would give unsteered answers."""
    found = option("walk", least=1e-6, shares=[0.001, 0.4, 1.0]).find(MadeUp(lambda dose: float(dose <= 1e-6)))
    assert found.doses == pytest.approx((1e-9, 4e-7, 1e-6), rel=1e-5)


def test_fixed_doses_are_as_given() -> None:
    """Reference: the list. Nothing is tried, so there is no table."""
    trials = MadeUp(lambda _: 0.0)
    found = option("fixed", alpha=[2.0, 0.1, 2.0]).find(trials)
    assert (found.doses, found.trials, trials.asked) == ((2.0, 0.1, 2.0), (), [])


def test_counts() -> None:
    """Reference: one answer per share, or per dose, even if two are equal."""
    assert option("fixed", alpha=[0.5, 0.5, 1.0]).count() == 3
    assert option("walk", shares=[0.5, 1.0]).count() == 2
    assert option("iso_kl").count() == 4
    assert [option(name).filters for name in ("fixed", "walk", "iso_kl")] == [False, True, False]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("walk", {"target": 0}, "dose.target=0 is not allowed: must be greater than 0"),
    ("walk", {"target": 1.01}, "dose.target=1.01 is not allowed: must be less than or equal to 1"),
    ("iso_kl", {"target": 0}, "dose.target=0 is not allowed: must be greater than 0"),
    ("iso_kl", {"target": float("nan")}, "dose.target=nan is not allowed: must be a finite number"),
    *(
        (name, fields, said)
        for name in ("walk", "iso_kl")
        for fields, said in (
            ({"shares": []}, "dose.shares=[] is not allowed: must have at least 1 item"),
            ({"shares": 0.5}, "dose.shares=0.5 is not allowed: must be a list"),
            ({"shares": [0.5, 1.01]}, "dose.shares.1=1.01 is not allowed: must be less than or equal to 1"),
            ({"shares": [0]}, "dose.shares.0=0 is not allowed: must be greater than 0"),
            ({"samples": 0}, "dose.samples=0 is not allowed: must be greater than or equal to 1"),
            ({"samples": 1.5}, "dose.samples=1.5 is not allowed: must be a valid integer"),
            ({"least": 1.01}, "dose.least=1.01 is not allowed: must be less than or equal to 1"),
            ({"least": 0}, "dose.least=0 is not allowed: must be greater than 0"),
            ({"most": 0.99}, "dose.most=0.99 is not allowed: must be greater than or equal to 1"),
            ({"most": float("inf")}, "dose.most=inf is not allowed: must be a finite number"),
            ({"precision": 0}, "dose.precision=0 is not allowed: must be greater than or equal to 0.001"),
            ({"precision": 1e-17}, "dose.precision=1e-17 is not allowed: must be greater than or equal to 0.001"),
            ({"precision": 1}, "dose.precision=1 is not allowed: must be less than 1"),
            ({"alpha": [1.0]}, "dose.alpha=[1.0]: there is no such field; there are name, target, shares, samples"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "said"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_value_is_refused_in_one_line(name: str, fields: dict[str, Any], said: str) -> None:
    """Reference: field, value and what is allowed. A precision below what doubles resolve would never be reached."""
    with pytest.raises(ConfigError) as refused:
        option(name, **fields)
    assert str(refused.value).startswith(said), str(refused.value)
    assert "\n" not in str(refused.value)
