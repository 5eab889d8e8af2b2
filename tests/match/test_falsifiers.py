"""Each falsifier preset goes through a round on the tiny model, and is what it says it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.compose import composed

from steer_heal.experiment import Experiment
from steer_heal.loop import run
from steer_heal.result import Round
from steer_heal.store import Store
from steer_heal.tracker.jsonl import JsonlConfig

SMALL = (
    "model=tiny", "lora=r4", "tracker=jsonl", "filter=[length]", "filter.length.min=1", "generate.max_new_tokens=8",
    "generate.n_prompts=8", "heal.n_keep=16", "heal.lr=0.01", "min_coherence=0", "match.at=0.0001",
)  # fmt: skip
FALSIFIERS = ("distil_prompt", "random_vector", "self_distil", "fewer_steps", "one_long_round")


def one_round(folder: Path, name: str, *overrides: str) -> tuple[Experiment, Round]:
    exp = composed(f"experiment={name}", *SMALL, *overrides)
    with JsonlConfig(name="jsonl").open(folder / name, config={}, group=None, run_name=name) as tracker:
        (done,) = run(exp, Store(folder / "store"), tracker).rounds
    return exp, done


@pytest.mark.parametrize("name", FALSIFIERS)
def test_a_round_of_each(tmp_path: Path, name: str) -> None:
    more = ("dose.target=0.02", "dose.precision=0.5") if name == "random_vector" else ()
    exp, done = one_round(tmp_path, name, *more)
    assert exp.reg.name == "nll"
    assert exp.n_rounds == 1
    assert done.row["kept"] == 16
    assert "matched/target" in done.row
    assert len(done.frontier_rows()) >= 4
    if name == "self_distil":
        assert {row.dose for row in done.completions.rows} == {0.0}
        same = [done.row[f"steered/{figure}"] - done.row[f"base/{figure}"] for figure in ("trait", "text_nll")]
        assert same == [0.0, 0.0], "at dose 0 the steered model is base"
    if name == "distil_prompt":
        assert done.vector.system == exp.trait.positive
    if name == "fewer_steps":
        assert len(done.adapter.curve) == 12


def test_the_long_round_has_the_steps_and_the_answers_of_the_loop() -> None:
    """Reference: `experiment=rounds`."""
    long, loop = composed("experiment=one_long_round"), composed("experiment=rounds")
    assert long.heal.n_keep == loop.n_rounds * (loop.heal.n_keep or 0)
    assert long.heal.total_steps(192) == loop.n_rounds * loop.heal.total_steps(64)
    assert long.generate.max_new_tokens == loop.generate.max_new_tokens
    drawn = (1 + long.heal.top_ups) * len(long.trait.draw(long.generate.n_prompts, 0)) * long.dose.count()
    assert drawn >= 2 * 192, "enough where half of the answers pass"


def test_fewer_steps_are_half_of_the_defaults() -> None:
    assert composed("experiment=fewer_steps").heal.total_steps(64) * 2 == composed().heal.total_steps(64)
