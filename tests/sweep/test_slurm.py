"""Sweeps as arrays of a real Slurm: preempted, killed, out of time, detached, submitted again, two on one store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.command import begin, result, rows, run
from helpers.minislurm import MiniSlurm, missing

from steer_heal.sweep import Sweep
from steer_heal.sweep.status import read

pytestmark = [
    pytest.mark.slow(370),
    pytest.mark.long,
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm here: {', '.join(missing())} missing"),
]

REGULARISERS = ("nll", "kl_fwd", "kl_rev", "wd")
CELLS = [f"{i}-{name}" for i, name in enumerate(REGULARISERS)]
STEPS = 300  # of a heal, which is then long enough to be met in it
TINY = ("experiment=tiny", f"heal.steps={STEPS}", "tracker=jsonl")
SWEEP = ("-m", f"reg={','.join(REGULARISERS)}", *TINY)
ON_SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1")
SLOW_START = """
import os, pathlib, sys, time

def slow():
    if "SLURM_PROCID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
        (pathlib.Path(__file__).parent / "starting").touch()
        time.sleep(12)

class Slow:
    def find_spec(name, path=None, target=None):
        if name == "WHEN":
            sys.meta_path.remove(Slow)
            slow()

sys.meta_path.insert(0, Slow)
"""
NET_S = 240.0  # nothing takes that long unless it is broken


@pytest.fixture(scope="module")
def cluster() -> Iterator[MiniSlurm]:
    with MiniSlurm() as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sweep in one process, with a store of its own."""
    root = tmp_path_factory.mktemp("local")
    said = run(root, *SWEEP)
    assert said.returncode == 0, said.stderr
    (folder,) = root.glob("outputs/*/*-sweep")
    return folder


def until(true: Callable[[], Any], what: str, sweep: Path | None = None) -> None:
    end = time.monotonic() + NET_S
    while not true():
        logs = [path.read_text()[-2000:] for path in (sweep or Path("/nowhere")).glob(".submitit/*.out")]
        assert time.monotonic() < end, f"waited {NET_S:g} s in vain until {what}\n" + "\n".join(logs)
        time.sleep(0.05)


def submitted(root: Path) -> Path:
    """The folder of the sweep started in `root`, once it is submitted to Slurm."""
    found: list[Path] = []

    def there() -> bool:
        found[:] = [path for path in root.glob("outputs/*/*-sweep") if (path / "sweep.json").is_file()]
        return bool(found) and any(job.id for job in Sweep.open(found[0]).record.jobs)

    until(there, "a sweep is submitted")
    return found[0]


def healing(cell: Path) -> bool:
    """True if a cell is in its heal."""
    return read(cell).state == "running" and {"heal/step", "round/index"} & {
        k for row in _rows(cell)[-1:] for k in row
    } == {"heal/step"}


def one_that_heals(sweep: Path, cells: Sequence[str]) -> str:
    """The first of some cells that is seen in its heal."""
    found: list[str] = []

    def met() -> bool:
        found[:] = [cell for cell in cells if healing(sweep / cell)]
        return bool(found)

    until(met, f"one of {', '.join(cells)} heals", sweep)
    return found[0]


def _rows(cell: Path) -> list[dict[str, Any]]:
    return rows(cell) if (cell / "metrics.jsonl").is_file() else []


def figures(cell: Path) -> tuple[list[dict[str, Any]], Any]:
    """A cell's logged rows and its rounds, without times."""
    timed = ("time", "round/heal_seconds", "heal/seconds")
    logged = [{k: v for k, v in row.items() if k not in timed} for row in rows(cell)]
    rounds = [{k: v for k, v in row.items() if k != "heal_seconds"} for row in result(cell)["rounds"]]
    return logged, rounds


def same(one: Path, two: Path) -> None:
    for cell in CELLS:
        assert figures(one / cell) == figures(two / cell), f"{cell}: other figures than those of an undisturbed sweep"


def command(cluster: MiniSlurm, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(root, *arguments, module="sweep", **cluster.env)


def test_a_preempted_task_goes_on_and_a_killed_one_fails_alone(
    cluster: MiniSlurm, undisturbed: Path, tmp_path: Path
) -> None:
    """The array of all four: one is signalled while it heals, another killed; then only that one is run again."""
    process = begin(tmp_path, *SWEEP, *ON_SLURM, **cluster.env)
    folder = submitted(tmp_path)
    (job,) = Sweep.open(folder).record.jobs
    preempted = one_that_heals(folder, CELLS)
    telling = cluster.begin("scancel", "--signal=USR2", f"{job.id}_{CELLS.index(preempted)}")
    until(lambda: read(folder / preempted).state == "interrupted", "the one that was told to go has left", folder)
    telling.kill()  # for up to a minute it tells again what it finds requeued, and would tell the new run too
    killed = one_that_heals(folder, [cell for cell in CELLS if cell != preempted])
    os.kill(read(folder / killed).owner["pid"], signal.SIGKILL)
    assert process.wait(NET_S) == 1, "a script that goes on should know"
    telling.wait()

    said = command(cluster, tmp_path, "status", str(folder))
    assert said.returncode == 1
    assert "3 finished, 1 lost" in said.stdout, said.stdout
    assert f"  reg={killed.partition('-')[2]} ({killed})  lost " in said.stdout, said.stdout
    assert f"Slurm ended task {job.id}_{CELLS.index(killed)}: FAILED" in said.stdout, "what Slurm says of it"
    assert read(folder / preempted).attempt >= 2
    log = (folder / preempted / "log.txt").read_text()
    assert "resuming at step" in log, "a requeued heal begins again"

    said = command(cluster, tmp_path, "resubmit", str(folder), "timeout_min=20")
    assert said.returncode == 0, said.stdout + said.stderr
    again = Sweep.open(folder).record.jobs[-1]
    assert again.cells == (killed,), "only the cell without a result is run again"
    same(folder, undisturbed)


def test_a_task_that_an_urgent_job_pushes_aside_goes_on(cluster: MiniSlurm, undisturbed: Path, tmp_path: Path) -> None:
    """Slurm's own preemption says SIGTERM, as it does to a job that is cancelled; but this one is to come back."""
    process = begin(tmp_path, "-m", "reg=nll", *TINY, *ON_SLURM, **cluster.env)
    folder = submitted(tmp_path)
    one_that_heals(folder, ["0-nll"])
    cluster.command("sbatch", "--partition=urgent", "--cpus-per-task=2", "--mem=64M", "--output=/dev/null",
                    "--wrap=sleep 3")  # fmt: skip
    assert process.wait(NET_S) == 0, read(folder / "0-nll")
    assert read(folder / "0-nll").attempt >= 2, "nobody pushed it aside"
    assert "resuming at step" in (folder / "0-nll" / "log.txt").read_text()
    assert figures(folder / "0-nll") == figures(undisturbed / "0-nll")


@pytest.mark.parametrize("when", ["submitit", "torch"])
def test_a_task_that_is_pushed_aside_while_it_starts_comes_back(cluster: MiniSlurm, tmp_path: Path, when: str) -> None:
    """Preempted before the handler exists, which ends the process, and in a long import, which no signal may break.

    It was submitted from within another job, whose variables are none of its own.
    """
    (tmp_path / "sitecustomize.py").write_text(SLOW_START.replace("WHEN", when))
    setup = f"hydra.launcher.setup=['export PYTHONPATH={tmp_path}']"
    outer = {"SLURM_JOB_ID": "99", "SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": "7", "SLURM_MEM_PER_CPU": "64"}
    process = begin(tmp_path, "-m", "reg=nll", "experiment=tiny", "heal.steps=4", *ON_SLURM, setup,
                    **cluster.env | outer)  # fmt: skip
    folder = submitted(tmp_path)
    until((tmp_path / "starting").exists, "its Python starts", folder)
    cluster.command("sbatch", "--partition=urgent", "--cpus-per-task=2", "--mem=64M", "--output=/dev/null",
                    "--wrap=sleep 3")  # fmt: skip
    assert process.wait(NET_S) == 0, read(folder / "0-nll")
    assert read(folder / "0-nll").attempt == 1, "it had begun before it was pushed aside"
    (output,) = folder.glob(".submitit/*.out")
    sign = {"submitit": "Terminated", "torch": "asked to stop"}[when]
    assert sign in output.read_text(), f"it was not pushed aside:\n{output.read_text()}"


def test_tasks_that_never_reach_python_are_failures(cluster: MiniSlurm, tmp_path: Path) -> None:
    said = run(tmp_path, "-m", "reg=nll,wd", *TINY, *ON_SLURM, 'hydra.launcher.setup=["exit 3"]', **cluster.env)
    assert said.returncode == 1, said.stdout + said.stderr
    assert "2 of 2 cells have no result" in said.stderr
    assert said.stderr.count("FAILED (NonZeroExitCode)") >= 2, "what Slurm says of them"


def test_detached_sweeps_share_a_store_and_are_followed_by_their_files(
    cluster: MiniSlurm, undisturbed: Path, tmp_path: Path
) -> None:
    """Two arrays at once: nothing is computed twice, and both have all figures."""
    folders = []
    for name in ("one", "two"):
        at = f"hydra.sweep.dir={tmp_path / name}"
        said = run(tmp_path, *SWEEP, *ON_SLURM, "hydra.launcher.detach=true", at, **cluster.env)
        assert said.returncode == 0, said.stderr
        assert "resubmit|cancel" in said.stderr, "how to follow it"
        folders.append(tmp_path / name)
    status = command(cluster, tmp_path, "status", str(folders[1]))
    assert status.returncode == 1
    assert "waiting" in status.stdout, status.stdout
    for folder in folders:
        said = command(cluster, tmp_path, "wait", str(folder))
        assert said.returncode == 0, said.stdout + said.stderr
        assert said.stdout.count("\nkl_rev ") == 2, "the comparison and the cells at its end"
        same(folder, undisturbed)
    computed = [stage for folder in folders for cell in CELLS for stage in result(folder / cell)["computed"]]
    alone = [stage for cell in CELLS for stage in result(undisturbed / cell)["computed"]]
    assert sorted(computed) == sorted(alone), "a stage was computed twice, or not at all"


def test_a_task_that_runs_out_of_time_goes_on(cluster: MiniSlurm, tmp_path: Path) -> None:
    """Under a limit of one minute, Slurm's least, a heal that takes longer; and no more often than it may."""
    long = ("-m", "reg=nll", "experiment=tiny", "tracker=jsonl", "heal.steps=20000", *ON_SLURM,
            "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=10",
            "hydra.launcher.max_num_timeout=1")  # fmt: skip
    process = begin(tmp_path, *long, **cluster.env)
    folder = submitted(tmp_path)
    assert process.wait(NET_S) == 1
    status = read(folder / "0-nll")
    assert (status.state, status.attempt) == ("failed", 2), status.message
    assert "timed-out too many times" in status.message, "why it has no result"
    assert "resuming at step" in (folder / "0-nll" / "log.txt").read_text()


def test_a_cancelled_sweep_can_be_taken_up(cluster: MiniSlurm, tmp_path: Path) -> None:
    said = run(tmp_path, *SWEEP, *ON_SLURM, "hydra.launcher.array_parallelism=1", "hydra.launcher.detach=true",
               **cluster.env)  # fmt: skip
    assert said.returncode == 0, said.stderr
    folder = submitted(tmp_path)
    until(lambda: healing(folder / CELLS[0]), "the first cell heals", folder)
    assert command(cluster, tmp_path, "cancel", str(folder)).returncode == 0
    until(lambda: read(folder / CELLS[0]).state == "interrupted", "the cell at work stops", folder)
    until(lambda: "running" not in command(cluster, tmp_path, "status", str(folder)).stdout, "Slurm lets go", folder)
    said = command(cluster, tmp_path, "status", str(folder))
    assert said.returncode == 1
    assert said.stdout.count("interrupted  cancelled") == 3, said.stdout
    assert not list((tmp_path / "outputs/store").rglob(".*.lease")), "a lease is left"
    said = command(cluster, tmp_path, "resubmit", str(folder), CELLS[0], "array_parallelism=2", "detach=false")
    assert read(folder / CELLS[0]).state == "finished", said.stdout + said.stderr
    assert "resuming at step" in (folder / CELLS[0] / "log.txt").read_text()


def test_what_sbatch_refuses_is_told_and_can_be_submitted_later(cluster: MiniSlurm, tmp_path: Path) -> None:
    said = run(tmp_path, "-m", "reg=nll,wd", "experiment=tiny", "heal.steps=4", *ON_SLURM,
               "hydra.launcher.partition=nosuch", **cluster.env)  # fmt: skip
    assert said.returncode == 2
    assert "invalid partition" in said.stderr.splitlines()[-1], said.stderr
    assert "Traceback" not in said.stderr
    (folder,) = tmp_path.glob("outputs/*/*-sweep")
    said = command(cluster, tmp_path, "status", str(folder))
    assert said.stdout.count("not started: sbatch: ") == 2, said.stdout
    assert command(cluster, tmp_path, "cancel", str(folder)).returncode == 0, "there is nothing to cancel"
    later = command(cluster, tmp_path, "resubmit", str(folder), "partition=main", "detach=true")
    assert later.returncode == 0, later.stdout + later.stderr
    said = command(cluster, tmp_path, "wait", str(folder))
    assert said.returncode == 0, said.stdout + said.stderr


KILLER = """#!/bin/sh
PATH=$(printf %s "$PATH" | cut -d: -f2-)
sbatch "$@"
kill -KILL $PPID
"""


def test_an_array_whose_submitter_was_killed_is_known(cluster: MiniSlurm, tmp_path: Path) -> None:
    """Killed between sbatch's answer and the note of it: not submitted twice, but cancelled, and then submitted."""
    shim = tmp_path / "bin" / "sbatch"
    shim.parent.mkdir()
    shim.write_text(KILLER)
    shim.chmod(0o755)
    env = cluster.env | {"PATH": f"{shim.parent}:{cluster.env['PATH']}"}
    process = begin(tmp_path, "-m", "reg=nll,wd", "experiment=tiny", "heal.steps=4", *ON_SLURM, **env)
    assert process.wait(NET_S) == -signal.SIGKILL
    (folder,) = tmp_path.glob("outputs/*/*-sweep")
    (job,) = Sweep.open(folder).record.jobs
    assert job.id is None, "the kill came too late"
    number = cluster.command("squeue", "-h", "-o", "%F", f"--name={job.name}").split()[0]

    said = command(cluster, tmp_path, "resubmit", str(folder))
    assert f"{number}_1" in said.stdout, said.stdout + said.stderr
    assert "2 waiting" in said.stdout, said.stdout
    assert (job,) == Sweep.open(folder).record.jobs, "cells that are with Slurm were submitted again"
    assert command(cluster, tmp_path, "cancel", str(folder)).returncode == 0
    until(
        lambda: "2 interrupted" in command(cluster, tmp_path, "status", str(folder)).stdout, "it is cancelled", folder
    )
    said = command(cluster, tmp_path, "resubmit", str(folder))
    assert said.returncode == 0, said.stdout + said.stderr


def test_environment_and_fields_reach_sbatch(cluster: MiniSlurm, tmp_path: Path) -> None:
    """A field wins over the variable that sbatch itself would read."""
    settings = ("hydra.launcher.detach=true", 'hydra.launcher.setup=["export GREETING=hello"]', 
                "hydra.launcher.qos=null",
                "hydra.launcher.additional_parameters={comment: ours}", "hydra.launcher.partition=main")  # fmt: skip
    said = run(tmp_path, "-m", "reg=nll,wd", *TINY, *ON_SLURM, *settings,
               **cluster.env | {"SBATCH_PARTITION": "nosuch"})  # fmt: skip
    assert said.returncode == 0, said.stderr
    folder = submitted(tmp_path)
    (script,) = (folder / ".submitit").glob("*submission.sh")
    text = script.read_text()
    for line in ("#SBATCH --partition=main", "#SBATCH --comment=ours", "export GREETING=hello", "#SBATCH --mem=1024M",
                 "#SBATCH --array=0-1%2"):  # fmt: skip
        assert line in text, f"{line} is not in what was submitted:\n{text}"
    assert command(cluster, tmp_path, "cancel", str(folder)).returncode == 0
    record = json.loads((folder / "sweep.json").read_text())
    assert record["launcher"]["partition"] == "main"
