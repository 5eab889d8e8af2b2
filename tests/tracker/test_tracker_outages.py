"""The tracker where W&B fails, at the start, halfway or at the end: the run goes on, and its file has every row."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tracked import ENDS_S, HEAL_ROWS, begin, picture, read, wandb_option
from helpers.tracked import alone as alone
from helpers.tracked import server as server
from helpers.wandb_offline import offline_runs
from helpers.wandb_stub import WandbStub

from steer_heal.tracker import wandb as tracking


@pytest.mark.parametrize(
    ("fault", "fault_on"),
    [("500", ""), ("hang", ""), ("reset", ""), ("empty", ""), ("500", "UpsertBucket"), ("hang", "UpsertBucket")],
)
def test_a_server_that_is_not_there_at_the_start(
    tmp_path: Path,
    server: WandbStub,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
    fault_on: str,
) -> None:
    """Broken altogether (`empty` is a captive portal) or only for wandb.init: the run is offline, with one warning."""
    monkeypatch.setattr(tracking, "INIT_S", 1.0)
    server.fault, server.fault_on = fault, fault_on
    with begin(wandb_option(mode="online"), tmp_path) as tracker:
        for row in HEAL_ROWS:
            tracker.log(row)
    (run,) = offline_runs(tmp_path)
    assert (len(run.rows), run.exit_code) == (len(HEAL_ROWS), 0)
    assert read(tmp_path) == HEAL_ROWS
    assert len(warnings) == 1
    assert "online failed" in warnings[0]


@pytest.mark.parametrize("fault", ["500", "hang", "reset", "empty"])
def test_an_outage_halfway(
    tmp_path: Path, server: WandbStub, warnings: list[str], monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """`empty` makes wandb's helper process crash."""
    monkeypatch.setattr(tracking, "FINISH_S", 1.0)
    with begin(wandb_option(), tmp_path) as tracker:
        for step, row in enumerate(HEAL_ROWS):
            if step == 10:
                server.fault = fault
            tracker.log(row)
        tracker.image("curve", picture(tmp_path))
    assert read(tmp_path) == HEAL_ROWS
    assert len(warnings) == 1
    assert "finish failed" in warnings[0]


def test_a_helper_that_stops_answering(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's own `log` and `finish` would then block for ever, and its atexit hook too."""
    monkeypatch.setattr(tracking, "FINISH_S", 1.0)
    monkeypatch.setattr(tracking, "GRACE_S", 3.0)
    with begin(wandb_option(mode="offline"), tmp_path) as tracker:
        assert tracker.mirror
        mirror: Any = tracker.mirror
        helper = mirror._session._connection._proc._process
        os.kill(helper.pid, signal.SIGSTOP)
        for step in range(3000):
            tracker.log({"heal/step": step, "text": "x" * 200})
    assert len(read(tmp_path)) == 3000
    assert helper.wait() == -signal.SIGKILL
    assert warnings
    with begin(wandb_option(mode="offline"), tmp_path / "next") as tracker:
        tracker.log(HEAL_ROWS[0])
    assert len(offline_runs(tmp_path / "next")) == 1, "the next job of the process is well"


def test_without_wandb_there_is_the_file(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with begin(wandb_option(), tmp_path) as tracker:
        tracker.log(HEAL_ROWS[0])
    assert read(tmp_path) == HEAL_ROWS[:1]
    assert len(warnings) == 1


def test_a_failing_log_is_reported_once(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    calls = []

    def broken(*_: object, **__: object) -> None:
        calls.append(1)
        raise AssertionError("no connection")

    with begin(wandb_option(), tmp_path) as tracker:
        monkeypatch.setattr(wandb.Run, "log", broken)
        for row in HEAL_ROWS:
            tracker.log(row)
        tracker.table("samples", ["text"], [["x"]])
    assert read(tmp_path) == HEAL_ROWS
    assert len(calls) == 1, "nothing is sent after that"
    assert len(warnings) == 1
    assert "no connection" in warnings[0]
    assert offline_runs(tmp_path)[0].exit_code == 0


def test_a_failing_picture_costs_pictures_only(tmp_path: Path, warnings: list[str]) -> None:
    with begin(wandb_option(), tmp_path) as tracker:
        tracker.image("curve", tmp_path / "none.png")
        tracker.image("curve", tmp_path / "none.png")
        tracker.table("samples", ["text"], [["x"]])
        for row in HEAL_ROWS:
            tracker.log(row)
    assert len(warnings) == 1
    assert len(offline_runs(tmp_path)[0].rows) == len(HEAL_ROWS)


def test_no_prompt_on_a_terminal(tmp_path: Path) -> None:
    """Without a key, wandb.init asks for one on a terminal and waits; the tracker reports that and goes offline."""
    code = f"""
from pathlib import Path
from steer_heal.tracker.wandb import WandbConfig as Option
option = Option(name="wandb", project="p", entity=None, mode="online", tags=())
with option.open(Path({str(tmp_path)!r}), config={{}}, group=None, run_name="r") as tracker:
    tracker.log({{"heal/step": 0}})
"""
    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        said = b"".join(iter(lambda: read_terminal(ours), b""))
        assert child.wait(ENDS_S) == 0
    finally:
        child.kill()
        os.close(ours)
    assert b"no API key" in said
    assert b"Enter your choice" not in said
    assert len(offline_runs(tmp_path)) == 1


pytestmark = pytest.mark.slow(22)


def read_terminal(ours: int) -> bytes:
    try:
        return os.read(ours, 4096)
    except OSError:  # Linux says EIO where the other end was closed
        return b""
