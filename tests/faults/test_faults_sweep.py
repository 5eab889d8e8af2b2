"""Sweeps that are stopped, killed, short of memory or run twice at once: every cell is reported, and resumes."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import command
from helpers.faults import Children, assert_same_figures, children, frozen, held

from steer_heal.sweep.status import probe_status, read
from steer_heal.system.process import dead

STEPS = 60
# One thread: a parallel sweep gives a cell as many as it has cores for, and other threads round otherwise.
CELL = ("experiment=tiny", f"heal.steps={STEPS}", "generate.max_new_tokens=4", "runtime.threads=1")
REGS = ("kl_rev", "nll")
SWEEP = ("-m", *CELL, f"reg={','.join(REGS)}", "hydra.sweep.dir=sweep")
CELLS = tuple(f"{i}-{name}" for i, name in enumerate(REGS))
HEALING = 8  # steps after which a heal is disturbed
NET_S = 120.0  # a safety net
MINE = {
    "eval/odd.py": """from typing import Any, ClassVar, Literal
from steer_heal.artifacts import Metrics
from steer_heal.eval import Column, Evaluation
class Odd(Evaluation):
    columns: ClassVar = (Column("odd", "a figure"),)
    name: Literal["odd"]
    bad: bool
    def material(self, given: Any) -> Any:
        return None
    def measure(self, subject: Any, material: Any, runtime: Any) -> Metrics:
        return Metrics({"odd": float("nan") if self.bad else 1.0})
""",
    "eval/odd.yaml": "# @package eval.odd\n_target_: steer_heal.eval.odd.Odd\nname: odd\nbad: false\n",
}

pytestmark = [pytest.mark.slow(120), pytest.mark.long]


@dataclass(frozen=True)
class Run:
    """A sweep's command in a folder of its own, as a child of the process that has everything loaded."""

    fork: Children
    pid: int

    @property
    def said(self) -> str:
        return self.fork.output.read_text() if self.fork.output.exists() else ""

    def signal(self, *numbers: int) -> None:
        for number in numbers:
            os.kill(self.pid, number)
            time.sleep(0.002)  # two of a kind at once are one

    def end(self) -> int:
        return self.fork.end(self.pid)


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    with children(tmp_path_factory.mktemp("fork")) as running:
        yield running


@pytest.fixture
def begin(fork: Children, tmp_path: Path) -> Callable[..., Run]:
    """A function that starts a command in this test's folder, which also holds its store."""

    def begun(module: str, *arguments: str, **how: Any) -> Run:
        return Run(fork, fork.begin(tmp_path, module, *arguments, **how))

    return begun


@pytest.fixture(scope="module")
def twins(fork: Children, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sweeps of the same at once, in another order, on one store: `one` and `other`."""
    root = tmp_path_factory.mktemp("twins")
    pids = [
        fork.begin(root, "main", "-m", *CELL, f"reg={','.join(regs)}", f"hydra.sweep.dir={name}", "runtime.store=store")
        for name, regs in (("one", REGS), ("other", REGS[::-1]))
    ]
    assert [fork.end(pid) for pid in pids] == [0, 0], fork.output.read_text()[-2000:]
    return root


def until(true: Callable[[], Any], what: str, run: Run) -> None:
    end = time.monotonic() + NET_S
    while not true():
        assert time.monotonic() < end, f"waited {NET_S:g} s in vain until {what}; it said {run.said[-2000:]}"
        time.sleep(0.005)


def steps(cell: Path) -> int:
    """Steps of heals that the latest attempt at a cell has logged."""
    path = cell / "metrics.jsonl"
    return path.read_text().count('"heal/step"') if path.exists() else 0


def healing(cell: Path, again: int = 0, more: int = HEALING) -> Callable[[], bool]:
    """True if an attempt at a cell has reached a number of steps of its heal, which was resumed `again` times."""
    return lambda: probe_status(cell).state == "running" and len(gone_on(cell)) == again and more <= steps(cell) < STEPS


def states(sweep: Path) -> dict[str, str]:
    return {cell: probe_status(sweep / cell).state for cell in CELLS}


def workers(sweep: Path) -> list[int]:
    """Processes that run cells of a sweep."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"steer_heal.sweep.cell" in words and any(str(sweep).encode() in word for word in words):
            found.append(int(path.parent.name))
    return found


def assert_finished(sweep: Path, twins: Path, what: str) -> None:
    for cell in CELLS:
        assert probe_status(sweep / cell).state == "finished", f"{what}: {cell}: {probe_status(sweep / cell)}"
        assert_same_figures(sweep / cell, twins / "one" / cell, f"{what}: {cell}")


def gone_on(cell: Path) -> list[int]:
    """The steps at which heals of a cell were resumed."""
    path = cell / "log.txt"
    return [int(n) for n in re.findall(r" resuming at step (\d+) of ", path.read_text() if path.exists() else "")]


def test_two_sweeps_at_once_compute_nothing_twice(twins: Path) -> None:
    """Reference: each other; and every result there is was made once."""
    made = Counter[str]()
    for path in twins.glob("*/*/log.txt"):
        made.update(re.findall(r" DEBUG computing (?:\S+/)?(\S+/\S+)\n", path.read_text()))
    there = {f"{path.parent.parent.name}/{path.parent.name}" for path in twins.glob("store/*/[!.]*/manifest.json")}
    assert made == dict.fromkeys(there, 1), "computed twice, or by nobody"
    computed = {path.parent: command.result(path.parent)["computed"] for path in twins.glob("*/*/result.json")}
    assert len(computed) == 4
    assert sum(map(len, computed.values())) == len(there)
    by_sweep = Counter(
        {name: sum(len(v) for k, v in computed.items() if k.parent.name == name) for name in ("one", "other")}
    )
    for cell in CELLS:
        (other,) = twins.glob(f"other/*-{cell.partition('-')[2]}")
        assert_same_figures(other, twins / "one" / cell, cell)
    assert not held(twins / "store")
    print(f"\ntwo sweeps at once: {len(there)} results, computed by each {dict(by_sweep)}")


def test_ctrl_c_and_a_second_one_and_resubmit(begin: Callable[..., Run], twins: Path, tmp_path: Path) -> None:
    """Reference: a sweep that is not stopped. This one resumes its heal at the step that it had reached."""
    sweep, first = tmp_path / "sweep", tmp_path / "sweep" / CELLS[0]
    run = begin("main", *SWEEP)
    until(healing(first), "it heals", run)
    run.signal(signal.SIGINT)
    assert run.end() == 130, run.said[-2000:]
    assert states(sweep) == dict.fromkeys(CELLS, "interrupted"), run.said[-2000:]
    assert read(first).message == "interrupted by Ctrl-C", read(first)
    assert read(sweep / CELLS[1]).message.startswith("not started"), read(sweep / CELLS[1])
    assert not held(tmp_path / "outputs/store"), "a lease was left"
    assert re.findall(r"^  .*\((\S+)\) +interrupted ", run.said, re.MULTILINE) == list(CELLS), run.said[-1000:]
    assert "sweep resubmit" in run.said.splitlines()[-1]
    assert "Traceback" not in run.said
    stopped = steps(first)
    assert HEALING <= stopped < STEPS, "the heal was over: this test shows nothing"

    run = begin("sweep", "resubmit", "sweep")
    until(healing(first, 1, stopped + HEALING), "it heals again", run)
    run.signal(signal.SIGINT, signal.SIGINT, signal.SIGINT)
    assert run.end() in (130, -signal.SIGINT), run.said[-2000:]
    assert gone_on(first) == [stopped], f"stopped after {stopped} steps, it went on at {gone_on(first)}"
    assert probe_status(first).state in ("lost", "interrupted"), probe_status(first)
    assert not (first / "result.json").exists()

    run = begin("sweep", "resubmit", "sweep")
    assert run.end() == 0, run.said[-2000:]
    assert gone_on(first)[1] >= stopped, f"it went on at {gone_on(first)}"
    assert_finished(sweep, twins, "stopped, then killed")
    print(f"\nCtrl-C after {stopped} steps; gone on at {gone_on(first)}")


def test_a_parallel_sweep_stopped_robbed_of_a_worker_and_of_its_launcher(
    begin: Callable[..., Run], twins: Path, tmp_path: Path
) -> None:
    """Reference: an undisturbed sweep; after each fault this one is only resubmitted."""
    sweep = tmp_path / "sweep"
    run = begin("main", *SWEEP, "hydra/launcher=parallel", "hydra.launcher.jobs=2")
    until(lambda: run.said.count(" started\n") == 2, "both workers are started", run)
    run.signal(signal.SIGINT)  # they are importing, and have not begun
    assert run.end() == 130, run.said[-2000:]
    assert states(sweep) == dict.fromkeys(CELLS, "interrupted"), run.said[-2000:]
    assert not workers(sweep), "orphans"

    run = begin("sweep", "resubmit", "sweep")
    until(healing(sweep / CELLS[0]), "it heals", run)
    run.signal(signal.SIGINT)
    assert run.end() == 130, run.said[-2000:]
    assert set(states(sweep).values()) <= {"interrupted", "finished"}, states(sweep)
    assert read(sweep / CELLS[0]).state == "interrupted", read(sweep / CELLS[0])
    assert not workers(sweep), "orphans"
    assert not held(tmp_path / "outputs/store"), "a lease was left"
    stopped = steps(sweep / CELLS[0])

    run = begin("sweep", "resubmit", "sweep")
    until(healing(sweep / CELLS[0], 1, stopped + HEALING), "it heals again", run)
    os.kill(read(sweep / CELLS[0]).owner["pid"], signal.SIGKILL)
    assert run.end() == 1, run.said[-2000:]
    assert states(sweep) == dict(zip(CELLS, ("failed", "finished"), strict=True)), run.said[-2000:]
    assert "was killed by SIGKILL" in read(sweep / CELLS[0]).message, read(sweep / CELLS[0])
    assert gone_on(sweep / CELLS[0]) == [stopped]

    tries = {cell: read(sweep / cell).attempt for cell in CELLS}
    run = begin("sweep", "resubmit", "sweep")
    until(healing(sweep / CELLS[0], 2, stopped + HEALING), "it heals a third time", run)
    owner = read(sweep / CELLS[0]).owner
    run.signal(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    until(lambda: dead(owner), "the worker stops by itself", run)
    assert not workers(sweep), "orphans"
    assert states(sweep) == dict(zip(CELLS, ("interrupted", "finished"), strict=True)), run.said[-2000:]
    assert {cell: read(sweep / cell).attempt - tries[cell] for cell in CELLS} == dict(zip(CELLS, (1, 0), strict=True))
    run = begin("sweep", "status", "sweep")
    assert run.end() == 1, run.said
    assert re.search(rf"^{CELLS[0]} +interrupted ", run.said, re.MULTILINE), run.said

    run = begin("sweep", "resubmit", "sweep")
    assert run.end() == 0, run.said[-2000:]
    assert gone_on(sweep / CELLS[0])[:2] == [stopped, stopped], "what a killed worker had done since is lost"
    assert gone_on(sweep / CELLS[0])[2] >= stopped + HEALING, "a worker whose launcher was killed saved nothing"
    assert_finished(sweep, twins, "stopped twice, then killed twice")
    print(f"\nparallel: gone on at {gone_on(sweep / CELLS[0])}")


def test_a_cell_without_memory_fails_alone(begin: Callable[..., Run], twins: Path, tmp_path: Path) -> None:
    """Under a limit on all addresses that no factor of its adapter fits into."""
    store = f"runtime.store={twins / 'store'}"
    given = (*CELL, "reg=nll", "lora.r=500000000,4", "hydra.sweep.dir=sweep", store)
    run = begin("main", "-m", *given, memory=12 * 10**9)
    assert run.end() == 1, run.said[-2000:]
    big, small = (tmp_path / "sweep" / name for name in ("0-nll", "1-nll"))
    assert (probe_status(big).state, probe_status(small).state) == ("failed", "finished"), run.said[-2000:]
    assert re.search("memory", read(big).message), read(big)
    assert re.search(r"^  .*\(0-nll\) +failed .*memory", run.said, re.MULTILINE), run.said[-2000:]
    assert_same_figures(small, twins / "one" / CELLS[1], "beside a cell that had no memory")


def test_a_figure_that_is_not_finite_fails_its_cell_alone(
    begin: Callable[..., Run], twins: Path, tmp_path: Path
) -> None:
    for name, text in MINE.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    store = f"runtime.store={twins / 'store'}"
    given = (*CELL, "reg=nll", "eval=[trait,damage,text,odd]", "eval.odd.bad=true,false", "hydra.sweep.dir=sweep")
    run = begin("main", "-m", "-cd", str(tmp_path / "mine"), *given, store)
    assert run.end() == 1, run.said[-2000:]
    bad, good = (tmp_path / "sweep" / name for name in ("0-nll", "1-nll"))
    assert (probe_status(bad).state, probe_status(good).state) == ("failed", "finished"), run.said[-2000:]
    assert read(bad).message == "NotFinite: not finite: odd = nan", read(bad)
    assert not (bad / "result.json").exists()
    assert command.result(good)["rounds"][0]["healed/odd"] == 1


def test_a_jumping_clock_changes_nothing(fork: Children, twins: Path, tmp_path: Path) -> None:
    """Hours back and forth, for the process and for the files that it touches. Reference: a steady clock."""
    (folder,) = frozen([(*CELL, f"reg={REGS[0]}")], tmp_path)
    looks = Counter[str]()
    with ThreadPoolExecutor(1) as one:
        running = one.submit(fork.run, folder, jumping=True)
        while not running.done():
            looks[probe_status(folder).state] += 1
            time.sleep(0.002)
    ended = running.result()
    assert ended.code == 0, ended.log[-2000:]
    assert looks.keys() <= {"waiting", "running", "finished"}, f"how it looked: {looks}"
    assert looks["running"] > 20, f"how it looked: {looks}"
    assert probe_status(folder).state == "finished"
    assert_same_figures(folder, twins / "one" / CELLS[0], "under a jumping clock")
