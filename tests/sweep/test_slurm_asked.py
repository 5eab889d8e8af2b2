"""Slurm's answers as a sweep reads them, including none: stand-ins for a cluster's commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from steer_heal.config import CONF, ConfigError
from steer_heal.sweep import LEASE, Entry, Job, Sweep
from steer_heal.sweep.__main__ import main
from steer_heal.sweep.launcher import Launcher, launcher_of
from steer_heal.sweep.status import Status, write
from steer_heal.system import process as processes

AWAY = "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1"
Commands = Callable[..., list[str]]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Put commands in place, each a line of shell; returns the list of calls so far when called without any."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    calls.touch()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(**lines: str) -> list[str]:
        for name, line in lines.items():
            (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{line}\n')
            (folder / name).chmod(0o755)
        return calls.read_text().splitlines()

    put(sbatch="exit 1", srun="exit 1", squeue="exit 0", scancel="exit 0")
    return put


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """A sweep of one cell that waits."""
    option: Any = OmegaConf.to_container(OmegaConf.load(CONF / "hydra/launcher/slurm.yaml"), resolve=True)
    option |= {"_target_": "steer_heal.sweep.slurm.Slurm"}
    (tmp_path / "sweep/a").mkdir(parents=True)
    write(tmp_path / "sweep/a", Status(state="waiting"))
    return Sweep.create(tmp_path / "sweep", [Entry(folder="a", overrides=())], option)


@pytest.fixture
def slurm(sweep: Sweep) -> Launcher:
    return launcher_of(sweep)


@pytest.fixture
def other() -> Iterator[dict[str, Any]]:
    """Another living process of this machine."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield processes.current_process() | {"pid": child.pid, "started": processes.started(child.pid)}
    child.kill()
    child.wait()


def test_a_job_that_may_be_there_is_not_submitted_again(sweep: Sweep, slurm: Launcher, commands: Commands) -> None:
    """Its job number was never received, and Slurm does not answer now, so it may still be in the queue."""
    sweep.change(jobs=(Job(cells=("a",), name="steer_heal-x"),))
    commands(squeue=AWAY)
    assert slurm.status(sweep)["a"].state == "waiting"
    assert main(["resubmit", str(sweep.folder)]) == 1
    with pytest.raises(ConfigError, match="squeue cannot list the sweep's jobs"):
        slurm.cancel(sweep)
    called = {line.split()[0] for line in commands()}
    assert called == {"squeue"}, called


def test_that_slurm_does_not_answer_is_told_once(
    sweep: Sweep, slurm: Launcher, commands: Commands, warnings: list[str]
) -> None:
    sweep.change(jobs=(Job(cells=("a",), id="7"),))
    commands(squeue="echo gone >&2; echo fishing >&2; exit 1")
    for _ in range(3):
        assert slurm.status(sweep)["a"].state == "waiting"
    assert warnings == ["Slurm cannot be queried; the status is from the cells' files alone: gone fishing"]


def test_a_job_that_is_not_there_was_never_submitted(sweep: Sweep, slurm: Launcher, commands: Commands) -> None:
    """An earlier job of the same cell makes no difference: it is over and says nothing."""
    sweep.change(jobs=(Job(cells=("a",), id="7"), Job(cells=("a",), name="steer_heal-x")))
    commands(squeue='case "$*" in *--name=steer_heal-x*) ;; *) echo "7|FAILED|NonZeroExitCode";; esac')
    found = slurm.status(sweep)["a"]
    assert (found.state, found.message) == ("interrupted", "never submitted")


def test_what_others_submit_meanwhile_is_seen(sweep: Sweep, slurm: Launcher, commands: Commands) -> None:
    """A process that already follows the sweep sees it."""
    sweep.change(jobs=(Job(cells=("a",), id="7"),))
    commands(squeue='echo "7|OUT_OF_MEMORY|OutOfMemory"; echo "8|PENDING|Priority"')
    assert slurm.status(sweep)["a"].state == "lost"
    other = Sweep.open(sweep.folder)
    other.change(jobs=(*other.record.jobs, Job(cells=("a",), id="8")))
    found = slurm.status(sweep)["a"]
    assert (found.state, found.job) == ("waiting", "8")


def test_cancel_waits_for_a_submission(
    sweep: Sweep, slurm: Launcher, commands: Commands, other: dict[str, Any]
) -> None:
    """Otherwise it could not know which jobs are still to come."""
    (sweep.folder / LEASE).write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="is submitting cells; cancel it when it is done"):
        slurm.cancel(sweep)
    (sweep.folder / LEASE).unlink()
    slurm.cancel(sweep)
    assert slurm.status(sweep)["a"].message == "cancelled"
    assert not commands(), "there was nothing to ask about"


def test_a_sweep_of_before_jobs_had_names_can_be_followed(sweep: Sweep, slurm: Launcher, commands: Commands) -> None:
    record = json.loads((sweep.folder / "sweep.json").read_text())
    (sweep.folder / "sweep.json").write_text(json.dumps(record | {"jobs": [{"id": "7", "cells": ["a"]}]}))
    commands(squeue='echo "7|RUNNING|None"')
    assert slurm.status(Sweep.open(sweep.folder))["a"].job == "7"
