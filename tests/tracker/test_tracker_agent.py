"""The environment's W&B variables, as an agent or a user sets them: with the real client, offline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.tracked import HEAL_ROWS, wandb_option
from helpers.tracked import alone as alone
from helpers.wandb_offline import OfflineRun, offline_runs

pytestmark = pytest.mark.slow(15)

AGENT = {"WANDB_SWEEP_ID": "s0s0s0s0", "WANDB_RUN_ID": "agent1", "WANDB_PROJECT": "theirs", "WANDB_ENTITY": "us"}


def recorded(folder: Path, name: str, group: str | None, tags: tuple[str, ...] = ()) -> OfflineRun:
    """A run of a row, read back."""
    option, place = wandb_option(mode="offline", tags=tags), folder / name
    with option.open(place, config={"cell": name}, group=group, run_name=name) as tracker:
        tracker.log(HEAL_ROWS[0])
    (run,) = offline_runs(place)
    assert (len(run.rows), run.config["cell"]) == (1, name)
    return run


@pytest.fixture
def given(alone: None) -> Iterator[Callable[..., None]]:
    """A function that sets variables for the time of a test."""
    with pytest.MonkeyPatch.context() as patch:

        def put(**variables: str) -> None:
            for name, value in variables.items():
                patch.setenv(name, value)

        yield put


def test_under_an_agent_every_cell_of_a_sweep_is_a_run_of_its_own(
    tmp_path: Path, given: Callable[..., None], warnings: list[str]
) -> None:
    """In the sweep's group and the agent's project; the agent's own variables are there again afterwards."""
    given(**AGENT, WANDB_RESUME="must", WANDB_NAME="mine")
    cells = [recorded(tmp_path, name, "08-00-sweep") for name in ("0-nll", "1-wd")]
    assert len({cell.run_id for cell in cells} | {"agent1"}) == 3, "cells share a run"
    assert [cell.name for cell in cells] == ["mine 0-nll", "mine 1-wd"]
    assert {(cell.group, cell.project) for cell in cells} == {("08-00-sweep", "theirs")}
    assert {name: os.environ[name] for name in AGENT} == AGENT
    assert warnings == []


def test_an_agent_follows_a_single_run_by_its_id(tmp_path: Path, given: Callable[..., None]) -> None:
    given(**AGENT)
    run = recorded(tmp_path, "run", None)
    assert (run.run_id, run.project, run.group) == ("agent1", "theirs", "")


def test_a_single_run_takes_the_names_in_the_environment(tmp_path: Path, given: Callable[..., None]) -> None:
    given(WANDB_RUN_ID="chosen", WANDB_NAME="mine", WANDB_RUN_GROUP="ours", WANDB_TAGS="a,b")
    run = recorded(tmp_path, "run", None)
    assert (run.run_id, run.name, run.group, run.tags) == ("chosen", "mine", "ours", ["a", "b"])
    assert run.project == "steer_heal", "an option"


def test_a_group_in_the_environment_holds_several_sweeps(tmp_path: Path, given: Callable[..., None]) -> None:
    given(WANDB_RUN_GROUP="ours", WANDB_TAGS="a")
    run = recorded(tmp_path, "0-nll", "08-00-sweep", tags=("mine",))
    assert (run.group, run.name, run.tags) == ("ours", "0-nll", ["mine"])
