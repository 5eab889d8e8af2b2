"""Sweeps opened a second time: from elsewhere, by others, in batches, with renamed folders, or damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command import begin, forked, result

from steer_heal.sweep import LEASE, Entry, Sweep
from steer_heal.sweep.status import Status, read, write
from steer_heal.system import process as processes

pytestmark = [pytest.mark.slow(50), pytest.mark.long]

QUICK = ("-m", "experiment=tiny", "heal.steps=4", "tracker=jsonl")
NET_S = 120.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all sweeps here, which makes them fast."""
    return f"runtime.store={tmp_path_factory.mktemp('store')}"


@pytest.fixture
def going_on(tmp_path: Path) -> Iterator[Path]:
    """The folder of a sweep whose first cell is in a long heal."""
    process = begin(tmp_path, "-m", "experiment=tiny", "heal.steps=20000", "reg=nll,wd", "hydra.sweep.dir=here")
    log, end = tmp_path / "here/0-nll/metrics.jsonl", time.monotonic() + NET_S
    while not (log.is_file() and "heal/step" in log.read_text()):
        assert time.monotonic() < end, "no heal began"
        time.sleep(0.05)
    yield tmp_path / "here"
    if process.poll() is None:
        process.kill()
        process.wait()


def test_a_sweep_is_run_again_from_another_folder(tmp_path: Path) -> None:
    """Relative paths are still resolved where the sweep was started."""
    said = forked(tmp_path, *QUICK, "reg=nll", "heal.lr=1e9", "hydra.sweep.dir=here")
    assert said.returncode == 1, said.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert forked(elsewhere, "resubmit", str(tmp_path / "here"), module="sweep").returncode == 1
    assert read(tmp_path / "here/0-nll").attempt == 2
    assert not list(elsewhere.iterdir()), "a store or a folder of results was made where nobody looks for it"


def test_another_sweep_may_not_go_into_a_folder_where_one_goes_on(going_on: Path) -> None:
    said = forked(going_on.parent, *QUICK, "reg=nll,wd", "hydra.sweep.dir=here")
    assert said.returncode == 2
    assert "a sweep is running there, for example its cell 0-nll" in said.stderr.splitlines()[-1], said.stderr
    said = forked(going_on.parent, "resubmit", "here", module="sweep")
    assert said.returncode == 2
    assert "runs this sweep; wait for it, or cancel it first" in said.stderr, said.stderr
    assert read(going_on / "0-nll").state == "running"
    assert forked(going_on.parent, "cancel", "here", module="sweep").returncode == 0
    end = time.monotonic() + NET_S
    while (going_on / LEASE).exists():
        assert time.monotonic() < end, "it did not stop"
        time.sleep(0.05)
    assert [read(going_on / cell).state for cell in ("0-nll", "1-wd")] == ["interrupted", "interrupted"]


@pytest.mark.parametrize("place", ["another boot", "this one"])
def test_cancel_touches_no_other_process(tmp_path: Path, place: str) -> None:
    """A process number of another machine, or one that was given to another process since."""
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        owner = processes.current_process() | {"pid": bystander.pid, "started": "1"}
        owner |= {"place": place} if place == "another boot" else {}
        Sweep.create(tmp_path, [], {"_target_": "steer_heal.sweep.local.Local", "name": "local"})
        (tmp_path / LEASE).write_text(json.dumps(owner))
        said = forked(tmp_path, "cancel", str(tmp_path), module="sweep")
        assert said.returncode == 2
        assert "only there" in said.stderr or "no process is running" in said.stderr, said.stderr
        assert bystander.poll() is None, "a bystander was killed"
    finally:
        bystander.kill()
        bystander.wait()


def test_batches_of_a_sweeper_are_one_sweep(tmp_path: Path, store: str) -> None:
    said = forked(tmp_path, *QUICK, "reg=nll,wd", store, "hydra.sweeper.max_batch_size=1", "hydra.sweep.dir=here")
    assert said.returncode == 0, said.stderr
    assert Sweep.open(tmp_path / "here").cells == ["0-nll", "1-wd"]
    assert not list((tmp_path / "here").glob("sweep.*.json"))


def test_ctrl_c_ends_all_batches(tmp_path: Path) -> None:
    process = begin(tmp_path, "-m", "experiment=tiny", "heal.steps=20000", "reg=nll,wd", "hydra.sweep.dir=here",
                    "hydra.sweeper.max_batch_size=1")  # fmt: skip
    log, end = tmp_path / "here/0-nll/metrics.jsonl", time.monotonic() + NET_S
    while not (log.is_file() and "heal/step" in log.read_text()):
        assert time.monotonic() < end, "no heal began"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(NET_S) == 130
    assert not (tmp_path / "here/1-wd").exists(), "the next batch was begun"


def test_folders_within_folders(tmp_path: Path, store: str) -> None:
    """A table of those that finished, and the failure of the other."""
    said = forked(tmp_path, *QUICK, "reg=nll", "heal.lr=1e9,1e-3", store, "hydra.sweep.dir=here",
               "hydra.sweep.subdir=${heal.lr}/${reg.name}")  # fmt: skip
    assert said.returncode == 1, said.stdout
    assert "1 of 2 cells has no result" in said.stderr
    assert "\nnll" in said.stdout, "no table"
    assert Sweep.open(tmp_path / "here").cells == ["1000000000.0/nll", "0.001/nll"]


def test_cells_named_by_their_overrides_can_be_named(tmp_path: Path, store: str) -> None:
    said = forked(tmp_path, *QUICK, "reg=nll", "heal.lr=1e9", store, "hydra.sweep.dir=here",
               "hydra.sweep.subdir=${hydra.job.override_dirname}",
               "hydra.job.config.override_dirname.exclude_keys="
               "[experiment,heal.steps,tracker,runtime.store]")  # fmt: skip
    assert said.returncode == 1, said.stderr
    (cell,) = Sweep.open(tmp_path / "here").cells
    assert cell == "heal.lr=1000000000.0,reg=nll"
    assert forked(tmp_path, "resubmit", "here", cell, cell, module="sweep").returncode == 1
    assert read(tmp_path / "here" / cell).attempt == 2, "named twice, it is run once"


@pytest.mark.parametrize("launcher", ["local", "parallel"])
def test_a_damaged_cell_costs_the_others_nothing(tmp_path: Path, store: str, launcher: str) -> None:
    said = forked(
        tmp_path, *QUICK, "reg=nll,wd", "heal.lr=1e9", store, f"hydra/launcher={launcher}", "hydra.sweep.dir=here"
    )
    assert said.returncode == 1, said.stderr
    (tmp_path / "here/0-nll/.hydra/config.yaml").write_text("model: {half")
    said = forked(tmp_path, "resubmit", "here", module="sweep")
    assert said.returncode == 1
    assert read(tmp_path / "here/0-nll").state == "failed"
    assert "ParserError" in read(tmp_path / "here/0-nll").message or "flow mapping" in said.stderr, said.stderr
    assert read(tmp_path / "here/1-wd").attempt == 2


def test_a_sweep_after_a_power_cut_can_be_taken_up(tmp_path: Path, store: str) -> None:
    """Its process belonged to another boot, and is silent."""
    said = forked(tmp_path, *QUICK, "reg=nll,wd", store, "hydra.sweep.dir=here")
    assert said.returncode == 0, said.stderr
    cell = tmp_path / "here/1-wd"
    (cell / "result.json").unlink()
    write(cell, Status(state="waiting"))
    owner = processes.current_process() | {"place": "another boot", "token": "theirs"}
    (tmp_path / "here" / LEASE).write_text(json.dumps(owner))
    said = forked(tmp_path, "resubmit", "here", module="sweep")
    assert said.returncode == 2, "it may still live, for all that is known"
    long_ago = time.time() - 1000
    os.utime(tmp_path / "here" / LEASE, (long_ago, long_ago))
    said = forked(tmp_path, "resubmit", "here", module="sweep")
    assert said.returncode == 0, said.stderr
    assert result(cell)["rounds"]


def test_hydras_own_launcher_still_works(tmp_path: Path, store: str) -> None:
    said = forked(tmp_path, *QUICK, "reg=nll,wd", "heal.lr=1e9", store, "hydra/launcher=basic", "hydra.sweep.dir=here")
    assert said.returncode == 1, said.stderr
    assert "2 of 2 cells have no result" in said.stderr
    assert "resubmit" not in said.stderr, "which needs a folder of ours"


def test_markup_in_a_status_is_shown_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "a", Status(state="failed", job="[/red]", message="[bold]\x1b[31m", ended="[/]"))
    record = {"_target_": "steer_heal.sweep.local.Local", "name": "local"}
    Sweep.create(tmp_path, [Entry(folder="a", overrides=())], record)
    said = forked(tmp_path, "status", str(tmp_path), module="sweep")
    assert said.returncode == 1, said.stderr
    assert "[/red]" in said.stdout
    assert "\x1b" not in said.stdout
