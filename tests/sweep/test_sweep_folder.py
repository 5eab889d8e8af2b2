"""A sweep's folder: each cell and its status, from its files alone; and the command that follows it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import begin, forked, result
from omegaconf import OmegaConf

from steer_heal.config import CONF, ConfigError
from steer_heal.sweep import Entry, Sweep, status
from steer_heal.sweep.cell import MOVED, load_cell, save_cell
from steer_heal.sweep.launcher import launcher_of
from steer_heal.sweep.status import Status, probe_status, read, tracked_status, write
from steer_heal.sweep.summary import unfinished
from steer_heal.system import process as processes

pytestmark = pytest.mark.slow(40)

ELSEWHERE = {"host": "elsewhere", "place": "another boot", "pid": 1, "started": "1"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of which one cell failed."""
    root = tmp_path_factory.mktemp("swept")
    said = forked(root, "-m", "experiment=tiny", "heal.steps=4", "reg=nll,wd", "heal.lr=1e-3,1e9")
    assert said.returncode == 1, said.stderr
    (folder,) = root.glob("outputs/*/*-sweep")
    return folder


@pytest.fixture
def gone() -> dict[str, Any]:
    """A process of this machine that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = processes.current_process() | {"pid": child.pid, "started": processes.started(child.pid)}
    child.kill()
    child.wait()
    return owner


def test_a_failed_cell_leaves_its_traceback(swept: Path) -> None:
    found = read(swept / "1-nll")
    assert (found.state, found.attempt) == ("failed", 1)
    assert found.message.startswith("HealError: "), found.message
    assert "Traceback (most recent call last)" in found.traceback
    assert "heal.lr" in found.message
    assert [read(swept / cell).state for cell in ("0-nll", "2-wd", "3-wd")] == ["finished", "finished", "failed"]


def test_status_lists_every_cell_and_what_to_do(swept: Path) -> None:
    said = forked(swept, "status", str(swept), module="sweep")
    assert said.returncode == 1
    assert "2 finished, 2 failed" in said.stdout
    assert f"python -m steer_heal.sweep resubmit {swept}" in said.stdout
    assert "HealError" in said.stdout


@pytest.mark.parametrize("launcher", ["local.Local", "slurm.Slurm"])
def test_status_is_quick_to_begin(tmp_path: Path, launcher: str) -> None:
    """Listing cells does not import any code that computes."""
    written = OmegaConf.load(CONF / f"hydra/launcher/{launcher.partition('.')[0]}.yaml")
    option: Any = OmegaConf.to_container(written, resolve=True)
    Sweep.create(tmp_path, [Entry(folder="a", overrides=())], option | {"_target_": f"steer_heal.sweep.{launcher}"})
    (tmp_path / "a").mkdir()
    code = "import sys; from steer_heal.sweep.__main__ import main; code = main(['status', '.']); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "1 interrupted" in said.stdout
    heavy = {"torch", "transformers", "matplotlib", "peft"} & set(said.stdout.split())
    assert not heavy, f"{launcher}: it imports {', '.join(heavy)}"


def test_resubmit_runs_only_what_has_no_result(swept: Path) -> None:
    before = {cell: read(swept / cell) for cell in ("0-nll", "1-nll", "2-wd", "3-wd")}
    said = forked(swept.parents[2], "resubmit", str(swept), module="sweep")
    assert said.returncode == 1, "they fail for the same reason"
    after = {cell: read(swept / cell) for cell in before}
    assert {cell: after[cell].attempt - before[cell].attempt for cell in before} == {
        "0-nll": 0, "1-nll": 1, "2-wd": 0, "3-wd": 1
    }  # fmt: skip
    assert result(swept / "0-nll")["rounds"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["status"], "usage: python -m steer_heal.sweep status|wait|resubmit|cancel FOLDER"),
        (["stop", "."], "usage: "),
        (["status", "nowhere"], "nowhere: not the folder of a sweep: sweep.json: No such file or directory"),
        (["status", "SWEPT", "0-nll"], "0-nll: only resubmit takes more than a folder"),
        (["resubmit", "SWEPT", "0-nil"], "0-nil: not a cell of"),
        (["resubmit", "SWEPT", "jobs=2"], "hydra.launcher.jobs=2: there is no such field; there are name"),
        (["resubmit", "SWEPT", "jobs=[a"], "jobs=[a: cannot be read"),
        (["cancel", "SWEPT"], "no process is running this sweep"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(swept: Path, arguments: list[str], reason: str) -> None:
    said = forked(swept, *[str(swept) if word == "SWEPT" else word for word in arguments], module="sweep")
    assert said.returncode == 2, said.stdout
    (line,) = said.stderr.splitlines()
    assert reason in line, line


def test_help_tells_of_every_deed(tmp_path: Path) -> None:
    said = forked(tmp_path, "--help", module="sweep")
    assert said.returncode == 0
    for deed in ("status", "wait", "resubmit", "cancel"):
        assert f"\n{deed} " in said.stdout, f"--help does not explain {deed}"


def test_a_cell_is_what_it_was_when_the_sweep_began(swept: Path) -> None:
    """Composed then, and complete: nothing is read from conf/ again."""
    config = load_cell(swept / "1-nll")
    assert (config.reg.name, config.heal.lr, config.hydra.job.num) == ("nll", 1e9, 1)
    assert config.hydra.sweep.subdir == "1-nll"
    assert list(config.hydra.overrides.task) == ["experiment=tiny", "heal.steps=4", "reg=nll", "heal.lr=1000000000.0"]
    assert config.hydra.runtime.output_dir == str(swept / "1-nll")


def test_freezing_keeps_interpolations(swept: Path, tmp_path: Path) -> None:
    """No secret of the environment must be written down."""
    config = load_cell(swept / "0-nll")
    OmegaConf.set_struct(config, False)
    config.secret = "${oc.env:SECRET_OF_A_TEST,none}"
    config.twice = "${seed}"
    save_cell(tmp_path, config)
    assert "${oc.env:SECRET_OF_A_TEST,none}" in (tmp_path / ".hydra/config.yaml").read_text()
    again = load_cell(tmp_path)
    assert (again.twice, again.secret) == (config.seed, "none")


def test_a_cell_of_an_earlier_version_is_still_read(swept: Path, tmp_path: Path) -> None:
    """Reference: the same cell as it is written now. Its classes were elsewhere when it was made."""
    shutil.copytree(swept / "0-nll/.hydra", tmp_path / ".hydra")
    for name in ("config", "hydra"):
        path = tmp_path / f".hydra/{name}.yaml"
        text = path.read_text()
        for old, new in MOVED.items():
            text = text.replace(f"_target_: {new}\n", f"_target_: {old}\n")
        assert text != path.read_text(), f"no class of {name}.yaml has moved"
        path.write_text(text)
    earlier, now = (OmegaConf.to_container(load_cell(folder)) for folder in (tmp_path, swept / "0-nll"))
    assert earlier == now


def test_a_second_process_may_not_work_on_the_same_cell(tmp_path: Path) -> None:
    write(tmp_path, Status(state="running", attempt=1, owner=ELSEWHERE))
    with pytest.raises(ConfigError, match="process 1 on elsewhere works on this cell"), tracked_status(tmp_path):
        pytest.fail("it was let in")
    assert read(tmp_path).owner == ELSEWHERE


def test_a_requeued_task_takes_its_cell_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node was lost, so the file still says that the cell runs there."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    write(tmp_path, Status(state="running", attempt=1, owner=ELSEWHERE, job="17_3"))
    with tracked_status(tmp_path):
        assert (read(tmp_path).attempt, read(tmp_path).job) == (2, "17_3")
    write(tmp_path, Status(state="running", attempt=1, owner=ELSEWHERE, job="17_2"))
    with pytest.raises(ConfigError), tracked_status(tmp_path):
        pytest.fail("another task's cell was taken")


def test_a_dead_process_is_found_out_at_once(tmp_path: Path, gone: dict[str, Any]) -> None:
    write(tmp_path, Status(state="running", attempt=1, owner=gone))
    found = probe_status(tmp_path)
    assert found.state == "lost"
    assert "ended without writing its status" in found.message
    with tracked_status(tmp_path):
        assert read(tmp_path).attempt == 2


def test_a_silent_process_elsewhere_is_lost_by_the_file_systems_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence is judged whatever this machine's clock says."""
    write(tmp_path, Status(state="running", attempt=1, owner=ELSEWHERE))
    for jump in (-1e7, 1e7):
        real = time.time()
        monkeypatch.setattr(time, "time", lambda real=real, jump=jump: real + jump)
        assert probe_status(tmp_path).state == "running", f"a clock that jumped by {jump:g} s was believed"
    long_ago = (tmp_path / status.NAME).stat().st_mtime - status.STALE_S - 1
    os.utime(tmp_path / status.NAME, (long_ago, long_ago))
    assert probe_status(tmp_path).state == "lost"


def test_the_file_is_touched_while_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "BEAT_S", 0.01)
    with tracked_status(tmp_path):
        path = tmp_path / status.NAME
        os.utime(path, (1.0, 1.0))
        end = time.monotonic() + 60
        while path.stat().st_mtime == 1.0:
            assert time.monotonic() < end, "nobody touches it"
            time.sleep(0.005)
        assert read(tmp_path).state == "running"
    assert read(tmp_path).state == "missing", "it has no result"
    (tmp_path / "result.json").write_text("{}")
    assert read(tmp_path).state == "finished"


def ways() -> Iterator[tuple[BaseException, str, str]]:
    yield ValueError("a reason\nin two lines"), "failed", "ValueError: a reason in two lines"
    yield KeyboardInterrupt(), "interrupted", "interrupted by Ctrl-C"
    yield SystemExit(143), "interrupted", "exited with status 143"


@pytest.mark.parametrize(("error", "state", "told"), list(ways()), ids=lambda value: type(value).__name__)
def test_whatever_ends_the_work_is_written(tmp_path: Path, error: BaseException, state: str, told: str) -> None:
    with pytest.raises(type(error)), tracked_status(tmp_path):
        raise error
    found = read(tmp_path)
    assert found.state == state
    assert found.message == told
    assert bool(found.traceback) == (state == "failed")


def test_an_unreadable_status_is_no_reason_to_crash(tmp_path: Path) -> None:
    (tmp_path / status.NAME).write_text("{half")
    assert "cannot be read" in read(tmp_path).message


def test_what_is_told_of_a_sweep(tmp_path: Path) -> None:
    cells = {"a": Status(state="finished"), "b": Status(state="lost", message="why")}
    Sweep.create(tmp_path, [], {})
    (tmp_path / "b/.hydra").mkdir(parents=True)
    for part in ("config", "hydra", "overrides"):
        (tmp_path / f"b/.hydra/{part}.yaml").write_text("{}")
    lines = unfinished(tmp_path, cells)
    assert lines[0].startswith("1 of 2 cells has no result")
    assert lines[1].split() == ["b", "lost", "why"]
    assert f"  python -m steer_heal.sweep resubmit {tmp_path}" in lines, lines
    assert unfinished(tmp_path, {"a": cells["a"]}) == []


def test_waiting_ends_for_a_cell_that_grows_more_silent(tmp_path: Path) -> None:
    """The status line counts seconds, so that it differs at every look."""
    record = {"_target_": "steer_heal.sweep.local.Local", "name": "local"}
    sweep = Sweep.create(tmp_path, [Entry(folder="a", overrides=())], record)
    (tmp_path / "a").mkdir()
    write(tmp_path / "a", Status(state="running", attempt=1, owner=ELSEWHERE))
    path, silent = tmp_path / "a" / status.NAME, [status.STALE_S + 5]

    def pause(_: float) -> None:
        silent[0] += 7
        long_ago = time.time() - silent[0]
        os.utime(path, (long_ago, long_ago))
        assert silent[0] < 10 * status.STALE_S, "it waits for ever"

    pause(0)
    ended = launcher_of(sweep).wait(sweep, pause)
    assert ended["a"].state == "lost"


def test_an_earlier_sweep_in_the_same_folder_is_kept(tmp_path: Path) -> None:
    for _ in range(3):
        Sweep.create(tmp_path, [], {})
    assert sorted(path.name for path in tmp_path.glob("sweep*.json")) == ["sweep.1.json", "sweep.2.json", "sweep.json"]
    assert json.loads((tmp_path / "sweep.json").read_text())["cells"] == []


def test_a_stopped_sweeps_other_cells_were_not_begun(tmp_path: Path) -> None:
    """SIGTERM to a sweep of two: the first stops in its heal, the second waits for another day."""
    process = begin(tmp_path, "-m", "experiment=tiny", "heal.steps=20000", "reg=nll,wd", "hydra.sweep.dir=here")
    log, end = tmp_path / "here/0-nll/metrics.jsonl", time.monotonic() + 120
    while not (log.is_file() and "heal/step" in log.read_text()):
        assert time.monotonic() < end, "no heal began"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130
    assert (read(tmp_path / "here/0-nll").state, read(tmp_path / "here/1-wd").state) == ("interrupted", "interrupted")
    assert "not started" in read(tmp_path / "here/1-wd").message
    assert list((tmp_path / "outputs/store/heal.heal").glob(".*.partial")), "where the heal stood is not saved"
