"""The gate at which a student has a given trait gain: by hand-made students, and in a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.compose import composed

from steer_heal.artifacts import Metrics
from steer_heal.config import ConfigError
from steer_heal.eval import EvalInput, evaluate
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student, Subject
from steer_heal.loop import run
from steer_heal.match import GatedStudent
from steer_heal.match.gate import SolveGate
from steer_heal.report.run_folder import read_items, write
from steer_heal.result import Result
from steer_heal.store import Store
from steer_heal.tracker.jsonl import JsonlConfig


class Made:
    """A student whose gain is a known function of its gate."""

    def __init__(self, gain: Callable[[float], float]) -> None:
        self.function, self.asked = gain, list[float]()

    def gain(self, gate: float) -> float:
        self.asked.append(gate)
        return self.function(gate)

    def student(self, gate: float) -> GatedStudent:
        gain = self.gain(gate)
        return GatedStudent(gate, gain, {"trait": Metrics({"trait": gain}), "damage": Metrics({"text_nll": gate**2})})


def option(**given: object) -> SolveGate:
    return SolveGate.model_validate(
        {"name": "gate", "at": 0.3, "gates": (0.25, 0.5, 0.75), "tolerance": 0.002, "trials": 8} | given
    )


@pytest.mark.parametrize(
    ("gain", "gate"),
    [
        (lambda c: 0.6 * c, 0.5),
        (lambda c: 0.5 * c, 0.6),
        (lambda c: math.sin(2 * c), math.asin(0.3) / 2),
        (lambda c: 0.31 * c**3, (0.3 / 0.31) ** (1 / 3)),
        (lambda c: c - 0.9 * c**2, None),  # its most is 0.278
        (lambda c: 1.5 * c - 1.6 * c**2, (1.5 - math.sqrt(2.25 - 1.92)) / 3.2),  # falls again: the first one
    ],
)
def test_the_gate_is_solved_on_the_student(gain: Callable[[float], float], gate: float | None) -> None:
    """Reference: the inverse by hand; None where no gate gains enough."""
    made = Made(gain)
    found = option().find(made, 0.3)
    assert [point.gate for point in found.points] == [0.25, 0.5, 0.75, 1.0]
    assert all(point.values["text_nll"] == point.gate**2 for point in found.points)
    if gate is None:
        assert found.matched is None
        assert len(made.asked) == 4, "there is nothing to try"
        return
    assert found.matched is not None
    assert abs(gain(found.matched.gate) - 0.3) < 0.002
    assert found.matched.gate == pytest.approx(gate, abs=0.01)
    assert len(made.asked) <= 9, "the frontier, a few trials, and the one that is measured"
    assert found.matched.values["text_nll"] == found.matched.gate**2, "measured there, not interpolated"


def test_nothing_is_extrapolated() -> None:
    assert option().find(Made(lambda c: 0.29 * c), 0.3).matched is None


def test_a_jump_is_told(warnings: list[str]) -> None:
    """A gain that jumps over the target is not at it: a warning names the nearest gate."""
    assert option().find(Made(lambda c: 0.2 * c if c < 0.6 else 0.4), 0.3).matched is None
    (said,) = warnings
    assert "misses it by 0.1000, more than match.tolerance=0.002; raise that, or match.trials=8" in said


def test_a_share_of_what_steering_gains(warnings: list[str]) -> None:
    assert option(at="40%").target(1.5) == pytest.approx(0.6)
    assert option(at=0.25).target(1.5) == 0.25
    assert not warnings
    assert option(at="40%").target(-0.1) is None
    assert "has gained nothing" in warnings[0]


@pytest.mark.parametrize("at", [0, -1, "40", "0%", "-5%", "nan", "inf", float("inf"), "4 0%"])
def test_what_is_no_target_is_refused(at: object) -> None:
    with pytest.raises(ConfigError, match=r"match\.at=.*a share of round 0's steered gain such as 40%"):
        composed("experiment=tiny", "match=gate", f"match.at='{at}'" if isinstance(at, str) else f"match.at={at}")


def short(at: str) -> list[str]:
    return ["experiment=tiny", "match=gate", f"match.at={at}", "heal.steps=8", "reg=nll", "dose.alpha=[0.8]"]


@pytest.fixture(scope="module")
def steep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run whose target lies between base and the healed student."""
    folder: Path = tmp_path_factory.mktemp("match")
    whole = once(folder, "probe", "100")
    gain = whole.rows[0]["healed/trait_gain"]
    assert gain > 0.002, "the tiny model learned nothing of the trait; choose other steps for this test"
    exp = composed(*short(f"{gain / 2:.6f}"), "match.tolerance=0.0001")
    store = Store(folder / "store")
    (folder / "run").mkdir()
    with JsonlConfig(name="jsonl").open(folder / "run", config={}, group=None, run_name="run") as tracker:
        result = run(exp, store, tracker)
    write(folder / "run", exp, store, result, overrides=[], seconds=1.0)
    return folder, result


def once(folder: Path, name: str, at: str) -> Result:
    with JsonlConfig(name="jsonl").open(folder / name, config={}, group=None, run_name=name) as tracker:
        return run(composed(*short(at)), Store(folder / "store"), tracker)


def test_a_run_measures_where_it_is_matched(steep: tuple[Path, Result], tiny: Base) -> None:
    """Reference: the evaluations on the student at that gate, without a store."""
    _, result = steep
    (done,) = result.rounds
    row, frontier = done.row, done.frontier
    assert frontier is not None
    assert frontier.matched is not None
    assert row["matched/reached"] == 1
    assert 0 < row["matched/gate"] < 1
    assert abs(row["matched/trait_gain"] - row["matched/target"]) < 1e-4
    student = Student(tiny, (done.adapter,), row["matched/gate"])
    exp = composed(*short("1"))
    given = EvalInput("healed", exp.trait, Subject(student), *[None] * 4)  # type: ignore[arg-type]
    for name in ("trait", "damage"):
        option = exp.eval[name]
        found = evaluate(option, given.subject, option.material(given), runtime=exp.runtime)
        assert frontier.matched.metrics[name].values == pytest.approx(found.values, abs=1e-5)
    assert row["matched/damage"] == pytest.approx(row["matched/text_nll"] - row["base/text_nll"])


def test_the_frontier_is_in_the_runs_folder(steep: tuple[Path, Result]) -> None:
    folder, result = steep
    record = json.loads((folder / "run" / "result.json").read_text())
    (points,) = record["frontier"]
    gates = [point["gate"] for point in points]
    assert gates == sorted({0.25, 0.5, 0.75, 1.0, result.rows[0]["matched/gate"]})
    assert points[-1]["trait_gain"] == result.rows[0]["healed/trait_gain"], "at gate 1 it is the healed student"
    items = read_items(folder / "run", "matched", "trait")
    mean = sum(item["trait"] for item in items.values()) / len(items)
    assert mean == pytest.approx(result.rows[0]["matched/trait"])
    assert read_items(folder / "run", "matched", "damage").keys() == read_items(folder / "run", "base", "damage").keys()


def test_a_second_run_computes_nothing(steep: tuple[Path, Result]) -> None:
    folder, result = steep
    store = Store(folder / "store")
    exp = composed(*short(f"{result.rows[0]['matched/target']:.6f}"), "match.tolerance=0.0001")
    with JsonlConfig(name="jsonl").open(folder / "again", config={}, group=None, run_name="again") as tracker:
        assert run(exp, store, tracker).rows == result.rows
    assert not store.computed


def test_a_student_that_gains_too_little_says_so(steep: tuple[Path, Result]) -> None:
    folder, _ = steep
    row = once(folder, "far", "100").rows[0]
    assert (row["matched/target"], row["matched/reached"]) == (100, 0)
    assert "matched/gate" not in row


def test_none_leaves_it_out(steep: tuple[Path, Result]) -> None:
    folder, _ = steep
    exp = composed("experiment=tiny", "heal.steps=8", "reg=nll", "dose.alpha=[0.8]", "match=none")
    with JsonlConfig(name="jsonl").open(folder / "none", config={}, group=None, run_name="none") as tracker:
        result = run(exp, Store(folder / "store"), tracker)
    assert not [name for name in result.rows[0] if name.startswith("matched/")]
    assert result.rounds[0].frontier_rows() == []
