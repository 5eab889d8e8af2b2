"""The beginning of a sweep: what is told before the first cell, what -m goes with, and Ctrl-C at any moment."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command import ENDS_S, forked
from helpers.saying import Said
from helpers.saying import here as here
from helpers.saying import say as say

from steer_heal.sweep.status import Status, read, seconds_spent, tracked_status, write

pytestmark = [pytest.mark.slow(60), pytest.mark.long]

QUICK = ("-m", "experiment=tiny", "heal.steps=4", "tracker=jsonl")


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("hydra/launcher=slurm", "slurm"),
        ("hydra/launcher=parallel", "parallel"),
        ("lam=1 hydra/launcher=slurm", "slurm"),
    ],
)
def test_a_launcher_without_a_sweep_is_refused(say: Callable[[str], Said], typed: str, name: str) -> None:
    say(f"experiment=tiny {typed}").refused(f"hydra/launcher={name}: launchers run sweeps", "add -m")


@pytest.mark.parametrize("flag", ["--cfg job", "--cfg hydra", "--cfg all", "-c job"])
def test_the_configuration_is_shown_beside_m(say: Callable[[str], Said], flag: str) -> None:
    """Reference: the same without -m."""
    with_m, without = say(f"-m experiment=tiny lam=0.3 {flag}"), say(f"experiment=tiny lam=0.3 {flag}")
    assert (with_m.code, with_m.err) == (0, "")
    timed = re.compile(r"outputs/\S+")
    assert timed.sub("", with_m.out) == timed.sub("", without.out)
    assert "lam: 0.3" in with_m.out or flag == "--cfg hydra"


def test_information_is_shown_beside_m(tmp_path: Path) -> None:
    said = forked(tmp_path, "-m", "--info", "defaults", "experiment=tiny")
    assert (said.returncode, "Defaults List" in said.stdout) == (0, True), said.stderr


def test_of_several_values_one_can_be_shown(say: Callable[[str], Said]) -> None:
    say("-m --cfg job experiment=tiny reg=nll,wd").refused("reg=nll,wd: --cfg shows the configuration of one run")


def test_a_quoted_home_folder_is_expanded(
    say: Callable[[str], Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every option that takes a path; the refusals show where each was looked for."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for typed, told in [
        ("model=hub model.id=~/none", f"model.id='{tmp_path}/home/none': there is no such folder"),
        ("steer=file steer.path='~/none.gguf'", f"{tmp_path}/home/none.gguf"),
        ("model=hub model.id=a/b model.chat_template=~/none.jinja", "model.chat_template"),
        ("runtime.store=~nobody9/store", "there is no user 'nobody9'"),
        ("hydra.run.dir='~nobody9/run'", "there is no user 'nobody9'"),
        ("-m reg=nll hydra.sweep.dir=~nobody9/s", "there is no user 'nobody9'"),
    ]:
        said = say(f"experiment=tiny {typed}" if "hub" not in typed else typed)
        assert told in said.refused(), typed


def test_home_folders_hold_the_run_and_the_store(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml/mine.yaml").write_text("hydra:\n  sweep:\n    dir: ~/sweep\nruntime:\n  store: ~/store\n")
    (tmp_path / "yaml/experiment").mkdir()
    (tmp_path / "yaml/mine.yaml").rename(tmp_path / "yaml/experiment/mine.yaml")
    text = (tmp_path / "yaml/experiment/mine.yaml").read_text()
    (tmp_path / "yaml/experiment/mine.yaml").write_text(f"# @package _global_\ndefaults: [tiny]\n{text}")
    home = str(tmp_path / "home")
    said = forked(
        tmp_path, "-m", "-cd", str(tmp_path / "yaml"), "experiment=mine", "heal.steps=4", "reg=nll", HOME=home
    )
    assert said.returncode == 0, said.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "yaml"], "a folder called ~"
    assert (tmp_path / "home/sweep/0-nll/result.json").is_file()
    assert list((tmp_path / "home/store").glob("heal.heal/*"))
    for module, arguments in (
        ("compare", ("~/sweep",)),
        ("sweep", ("status", "~/sweep")),
        ("store", ("--store", "~/store", "ls")),
    ):
        assert forked(tmp_path, *arguments, module=module, HOME=home).returncode == 0, module
    said = forked(tmp_path, "~nobody9/x", module="compare", HOME=home)
    assert (said.returncode, said.stderr.count("\n")) == (2, 1), said.stderr


def test_the_store_is_looked_at_before_a_sweep_starts(tmp_path: Path) -> None:
    """Whole cells, those that differ, and where the others continue."""
    store = f"runtime.store={tmp_path}/store"
    first = forked(tmp_path, *QUICK, "reg=nll", store)
    assert "1 cell\n" in first.stderr
    assert "the store holds all results of 0 of 1 cell; next in the others: generate.generate (1)" in first.stderr
    second = forked(tmp_path, *QUICK, "reg=nll,wd", "lam=0.1,0.5", store)
    assert second.returncode == 0, second.stderr
    before = second.stderr.partition(" cell 1 of 4")[0]
    assert " 4 cells\n" in before
    assert "3 distinct cells to compute" in before
    assert "the store holds all results of 1 of 3 cells; next in the others: heal.heal (2)" in before, before
    third = forked(tmp_path, *QUICK, "reg=nll,wd", "lam=0.1,0.5", store)
    assert "the store holds all results of 3 cells" in third.stderr


def test_failed_cells_are_named_by_what_differs(tmp_path: Path) -> None:
    said = forked(tmp_path, *QUICK, "reg=nll", "heal.lr=1e-3,1e9", "seed=0", "hydra.sweep.dir=here")
    assert said.returncode == 1
    assert "\n  heal.lr=1000000000.0 (1-nll)  failed       HealError" in said.stderr, said.stderr
    assert re.search(r"W heal\.lr=1000000000\.0 \(1-nll\) failed: ", said.stderr)


def test_many_cells_that_were_not_started_are_a_few_lines(tmp_path: Path) -> None:
    from steer_heal.sweep import Entry, Sweep
    from steer_heal.sweep.summary import unfinished

    cells = [Entry(folder=f"{i}-nll", overrides=("reg=nll", f"seed={i}")) for i in range(200)]
    Sweep.create(tmp_path, cells, {})
    left = {cell.folder: Status(state="interrupted", message="not started: the sweep was stopped") for cell in cells}
    left["7-nll"] = Status(state="failed", message="why")
    lines = unfinished(tmp_path, left)
    assert len(lines) < 10, lines
    assert "  and 196 more of the same" in lines
    assert any(line.split() == ["seed=7", "(7-nll)", "failed", "why"] for line in lines), "the failed one is named"


def test_seconds_are_those_of_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that were stopped, one that was killed, one that finished; then it begins anew."""
    now = [1000.0]
    monkeypatch.setattr("steer_heal.sweep.status.time.monotonic", lambda: now[0])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), tracked_status(tmp_path):
            now[0] += 10
            raise KeyboardInterrupt
    assert read(tmp_path).seconds == 20
    killed = read(tmp_path).model_copy(update={"state": "running", "ended": None, "owner": {}})
    write(tmp_path, killed)
    begun = (tmp_path / "status.json").stat().st_mtime
    os.utime(tmp_path / "status.json", (begun + 30, begun + 30))
    assert seconds_spent(tmp_path, read(tmp_path)) == pytest.approx(50, abs=3), "up to its last sign of life"
    write(tmp_path, killed.model_copy(update={"state": "lost", "seconds": 50.0, "began": None}))
    with tracked_status(tmp_path) as spent:
        assert spent == 50
        now[0] += 5
    assert read(tmp_path).seconds == 55
    (tmp_path / "result.json").write_text("{}")
    with tracked_status(tmp_path) as spent:
        assert spent == 0, "it had finished"


def test_the_table_tells_the_seconds_of_all_attempts(tmp_path: Path) -> None:
    from helpers.command import result
    from helpers.faults import frozen

    (folder,) = frozen([["reg=nll", "heal.steps=4", "tracker=jsonl"]], tmp_path)
    write(folder, Status(state="interrupted", attempt=1, seconds=500.0))
    assert forked(tmp_path, str(folder), module="sweep.cell").returncode == 0
    assert 500 < result(folder)["seconds"] < 600


@pytest.mark.parametrize(("launcher", "moment"), [("local", "checked"), ("local", "cells"), ("parallel", "cells")])
def test_ctrl_c_at_any_moment_is_a_few_lines(tmp_path: Path, launcher: str, moment: str) -> None:
    """At a terminal, where it reaches all processes at once: while 40 cells are checked, and while they run."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "steer_heal.main", *QUICK, "reg=nll,wd", "seed=range(0,20)",
               "hydra.sweep.dir=here", f"hydra/launcher={launcher}", "heal.steps=20000"]  # fmt: skip
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdout=theirs, stderr=theirs, stdin=theirs, start_new_session=True
    )
    os.close(theirs)
    said, end, stopped = "", time.monotonic() + ENDS_S, -1
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.05)[0]:
            try:
                said += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(ours, 65536).decode())
            except OSError:
                break
        running = any(read(tmp_path / f"here/{i}-nll").state == "running" for i in range(2))
        if stopped < 0 and ("40 cells" in said if moment == "checked" else running):
            stopped = len(said)
            os.killpg(child.pid, signal.SIGINT)
    os.close(ours)
    assert child.wait(ENDS_S) == 130, said
    after = [line for line in re.split(r"[\r\n]+", said[stopped:]) if line.strip() and " left" not in line]
    assert "40 cells" in said.splitlines()[0], "what comes first"
    assert "Traceback" not in said, said
    assert len(after) < (6 if moment == "checked" else 30), "\n".join(after)
    if moment == "cells":
        assert "interrupted by Ctrl-C" in said or "asked to stop" in said
