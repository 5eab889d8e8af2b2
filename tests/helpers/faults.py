"""Complete cells in forked children of a process that has everything loaded, disturbed at chosen moments.

Run as a script it is that process: a line of JSON in, a line of JSON out.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import resource
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENDS_S = 300.0  # a safety net: no child takes that long unless it hangs
TIMED = ("time", "round/heal_seconds", "heal_seconds")


def frozen(cells: Sequence[Sequence[str]], root: Path) -> list[Path]:
    """Folders of the cells of a sweep, as its launcher writes them; each with a store of its own below `root`."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from steer_heal.config import CONF
    from steer_heal.sweep.cell import save_cell
    from steer_heal.sweep.preflight import whole_cells

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        hydra: Any = GlobalHydra.instance().hydra
        given = [
            "experiment=tiny",
            "hydra.mode=MULTIRUN",
            f"hydra.sweep.dir={root}",
            "hydra.sweep.subdir=${hydra:job.num}",
        ]
        config = hydra.compose_config("config", given, RunMode.MULTIRUN)
        named = [["experiment=tiny", *cell, f"runtime.store={root}/store-{i}"] for i, cell in enumerate(cells)]
        for i, whole in enumerate(whole_cells(config, GlobalHydra.instance().config_loader(), named, 0)):
            save_cell(root / str(i), whole)
    return [root / str(i) for i in range(len(cells))]


@dataclass(frozen=True)
class Ended:
    """The end of an attempt at a cell, and what it left."""

    code: int  # as subprocess has it: -9 for SIGKILL
    seconds: float
    log: str  # what it wrote into log.txt, whole lines

    @property
    def begun(self) -> list[str]:
        """The results that it started to compute, as stage/key, in order."""
        return ["/".join(Path(path).parts[-2:]) for path in re.findall(r" DEBUG computing (\S+)\n", self.log)]

    @property
    def goes_on(self) -> int | None:
        """The step at which it resumed a heal."""
        found = re.findall(r" resuming at step (\d+) of ", self.log)
        return int(found[0]) if found else None


class Children:
    """The client of the process that forks, which is started through `prefix`, possibly in another namespace."""

    def __init__(self, root: Path, prefix: Sequence[str] = ()) -> None:
        self.output = root.resolve() / "said.txt"
        tests = str(Path(__file__).parents[1])
        places = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
        environ = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": places}
        with (root / "children.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "helpers.faults"], cwd=root, env=environ, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
            )  # fmt: skip

    def run(
        self, folder: Path, after: str | None = None, wait: float | None = None,
        deed: Sequence[str] = (), most: int | None = None, jumping: bool = False,
    ) -> Ended:  # fmt: skip
        """One attempt at a cell; SIGKILL `wait` seconds after `after` has stood in its log, or after the fork.

        `deed`: a command that is run in place of the kill. `most`: bytes that a file of its may have. `jumping`: its
        clock does.
        """
        return Ended(**self._asked("cell", str(folder), after, wait, list(deed), most, jumping))

    def begin(
        self, folder: Path, module: str, *arguments: str, memory: int | None = None,
        environ: Mapping[str, str] | None = None, errors: Path | None = None,
    ) -> int:  # fmt: skip
        """`python -m steer_heal.<module> <arguments>` in a folder, left running; its number.

        What it says is in `output`, whence what others said is gone; its standard error in `errors`, if that is given.
        `memory`: bytes of addresses that it may have. `environ`: all of its environment.
        """
        self.output.unlink(missing_ok=True)
        streams = [str(self.output), str(errors or self.output)]
        return int(self._asked("begin", str(folder), module, list(arguments), memory, environ, streams))

    def end(self, pid: int) -> int:
        """Wait for a started process; return its exit status."""
        return int(self._asked("end", pid))

    def ready(self) -> None:
        """Wait until it has loaded everything."""
        self._asked("ready")

    def _asked(self, *what: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{json.dumps(what)}\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline()
        assert said, f"the process that forks is gone with {self.process.wait(ENDS_S)}; children.txt may say why"
        return json.loads(said)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(ENDS_S) == 0, "the process that forks did not end well"


@contextmanager
def children(root: Path, prefix: Sequence[str] = ()) -> Iterator[Children]:
    """A process that forks, for the time of the block."""
    running = Children(root, prefix)
    try:
        yield running
    finally:
        running.close()


def published(store: Path) -> dict[str, int]:
    """Inodes of the manifests of all results, by stage/key; a recomputed result has a new inode."""
    return {"/".join(path.parts[-3:-1]): path.stat().st_ino for path in store.glob("*/[!.]*/manifest.json")}


def held(store: Path) -> list[str]:
    """Leases that are there, as stage/key."""
    return [f"{path.parent.name}/{path.name[1:-6]}" for path in store.glob("*/.*.lease")]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of figures without durations."""
    return {name: value for name, value in row.items() if name not in TIMED}


def figures(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of metrics.jsonl and the rounds of result.json."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds = json.loads((folder / "result.json").read_text())["rounds"]
    return [untimed(row) for row in rows], [untimed(row) for row in rounds]


def assert_same_figures(found: Path, expected: Path, what: str) -> None:
    """Assert that no row is lost or duplicated and that all agree to the bit."""
    for name, one, other in zip(("rows", "rounds"), figures(found), figures(expected), strict=True):
        assert len(one) == len(other), f"{what}: {len(one)} {name}, undisturbed there are {len(other)}"
        differ = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
        assert not differ, f"{what}: {len(differ)} {name} differ, first {differ[0]}"


def _serve() -> None:
    """Load everything; no thread is alive when a child is forked."""
    import matplotlib.pyplot as plt
    import peft  # noqa: F401
    import torch

    from steer_heal.model import load
    from steer_heal.report import run_folder as results  # noqa: F401

    torch.set_num_threads(1)
    import hydra

    from helpers.compose import composed

    load(composed("experiment=tiny").model).model  # noqa: B018  # the weights
    figure = plt.figure()  # fonts are looked for once
    figure.text(0, 0, "x")
    figure.savefig(os.devnull, format="png")
    plt.close(figure)
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    for line in sys.stdin:
        what, *given = json.loads(line)
        deeds: dict[str, Any] = {"cell": _attempt, "begin": _begun, "end": _ended, "ready": lambda: None}
        print(json.dumps(deeds[what](*given)), flush=True)


def _begun(
    folder: str, module: str, arguments: Sequence[str], memory: int | None, environ: Mapping[str, str] | None,
    streams: Sequence[str],
) -> int:  # fmt: skip
    if pid := os.fork():
        return pid
    code: Any = 70
    try:
        _redirect(*map(Path, streams))
        os.chdir(folder)
        if environ is not None:
            os.environ.clear()
            os.environ.update(environ)
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        sys.argv = [module, *arguments]
        runpy.run_module(f"steer_heal.{module}", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # as the interpreter would at its end, which os._exit does not reach
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _ended(pid: int) -> int:
    """A child's exit status. One that hangs is killed."""
    end = time.monotonic() + ENDS_S
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, 9)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(done[1])


def _redirect(*outputs: Path) -> None:
    """Standard output and error into files, which may be one."""
    ends = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in outputs]
    for stream, end in enumerate((os.open(os.devnull, os.O_RDONLY), *ends)):
        os.dup2(end, stream)


def _jump() -> None:
    """A clock that jumps by hours, for readers of the time and for file timestamps."""
    status: Any = importlib.import_module("steer_heal.sweep.status")
    hours, now, touch = itertools.cycle((0, 5, -7, 26, -50, 3)), time.time, os.utime
    time.time = lambda: now() + 3600 * next(hours)
    os.utime = lambda path, times=None, **how: touch(path, None if how else times or (time.time(),) * 2, **how)
    leases: Any = importlib.import_module("steer_heal.store.lease")  # the package's attribute `lease` is the function
    status.BEAT_S = leases.BEAT_S = 0.01


def _attempt(
    folder: str, after: str | None, wait: float | None, deed: Sequence[str], most: int | None, jumping: bool
) -> dict[str, Any]:
    path = Path(folder) / "log.txt"
    before = path.stat().st_size if path.exists() else 0
    begun = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(Path(folder), most, jumping)
    code = _watched(pid, path, before, begun, after, wait, deed)
    seconds = time.monotonic() - begun
    log = path.read_bytes()[before:].decode() if path.exists() else ""
    return {"code": code, "seconds": seconds, "log": log[: log.rfind("\n") + 1]}


def _watched(
    pid: int, path: Path, before: int, begun: float, after: str | None, wait: float | None, deed: Sequence[str]
) -> int:
    """Kill the child at its moment, or do something else; return its exit status."""
    due = None if wait is None or after is not None else begun + wait
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if due is None and after is not None and wait is not None and path.exists() and path.stat().st_size > before:
            with path.open("rb") as file:
                file.seek(before)
                if f"{after}\n".encode() in file.read():
                    due = time.monotonic() + wait
        if time.monotonic() > (begun + ENDS_S if due is None else due):
            if deed and due is not None:
                subprocess.run(deed, check=True)
                due, after, deed = None, None, ()
                continue
            os.kill(pid, 9)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.0005)


def _child(folder: Path, most: int | None, jumping: bool) -> None:
    """Never returns."""
    try:
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        if jumping:
            _jump()
        _redirect(folder / "output.txt", folder / "output.txt")
        from hydra.core.utils import JobStatus

        from steer_heal.sweep.cell import run_cell

        os._exit(0 if run_cell(folder).status == JobStatus.COMPLETED else 1)
    finally:
        os._exit(70)


if __name__ == "__main__":
    _serve()
