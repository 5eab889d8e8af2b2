"""The `parallel` launcher: runs cells side by side, each in its own process.

The cells that run at once fit the cores, memory and GPUs of this machine.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

import torch
from loguru import logger
from omegaconf import OmegaConf
from pydantic import Field

from steer_heal.config import build
from steer_heal.lm.memory import available
from steer_heal.sweep import Sweep
from steer_heal.sweep.cell import LAUNCHED, UNUSABLE
from steer_heal.sweep.launcher import Launcher, give_up, log_status
from steer_heal.sweep.status import Status, in_a_line, probe_status, read, write
from steer_heal.system.cpu import cores
from steer_heal.system.terminal import cells_bar, counted

POLL_S, STOPS_S = 0.2, 300.0  # a training step of a large model on a CPU takes minutes
PROCESS_GB = 1.5  # per cell beyond its weights: Python, torch, activations; the bundled model takes 2.1 to 2.4 in all
WEIGHTS = 4  # copies of its weights that a cell holds at its peak: the weights, those merged for generation, a heal


class Parallel(Launcher):
    """Run several cells at once; a killed process ends only its cell. A stage that several need is computed once."""

    name: Literal["parallel"]
    jobs: Annotated[int, Field(ge=1)] | Literal["auto"]  # cells at once; auto: as many as cores, memory and GPUs allow
    memory_gb: Annotated[float, Field(gt=0)] | Literal["auto"]  # per cell; auto: from the size of its model

    def launch(self, sweep: Sweep, cells: Sequence[str]) -> None:
        waiting, running, need = deque(cells), dict[str, _Worker](), dict[str, float]()
        gpus = self.gpus(sweep, cells)
        jobs = self.at_once(len(cells), gpus)
        places, threads = list(range(jobs)), threads_given() or max(1, cores() // jobs)
        each = counted(threads, "thread")
        logger.info("{}, {} at once, {} each", counted(len(cells), "cell"), jobs, each)
        try:
            with cells_bar(len(cells)) as shown:
                while waiting or running:
                    while waiting and places and self._fits(sweep, waiting[0], running, need, bool(gpus)):
                        cell, place = waiting.popleft(), places.pop(0)
                        try:
                            running[cell] = _Worker(sweep, cell, place, threads, gpus[place] if gpus else None)
                        except OSError as error:  # the cell's folder cannot be written, or is gone
                            log_status(sweep.label(cell), Status(state="failed", message=in_a_line(error)))
                            places.append(place)
                            shown.finished()
                    for cell, worker in list(running.items()):
                        if worker.process.poll() is not None:
                            worker.end()
                            places.append(running.pop(cell).place)
                            shown.finished()
                    shown.at(f"cells {shown.done}/{len(cells)}", f"{len(running)} running")
                    time.sleep(POLL_S)
        except (KeyboardInterrupt, SystemExit):
            for worker in running.values():
                worker.process.send_signal(signal.SIGTERM)
            end = time.monotonic() + STOPS_S
            for cell, worker in reversed(running.items()):
                worker.stop(end - time.monotonic())
                if worker.process.returncode and read(worker.folder).state == "waiting":
                    waiting.appendleft(cell)  # stopped before its signal handlers were installed
                else:
                    worker.end()
            give_up(sweep, list(waiting))
            raise

    def at_once(self, cells: int, gpus: Sequence[str]) -> int:
        """The number of cells that run at once: at most the number of cells, and of GPUs, or cores if none is used.

        With OMP_NUM_THREADS in the environment, `auto` starts as many as have cores for so many threads each.
        """
        most = len(gpus) or cores()
        if self.jobs != "auto":
            if self.jobs > most:
                are = "is" if most == 1 else "are"
                logger.warning(
                    "hydra.launcher.jobs={}: there {} {}", self.jobs, are, counted(most, "GPU" if gpus else "core")
                )
            return min(most, cells, self.jobs)
        return min(cells, most if gpus else max(1, most // (threads_given() or 1)))

    def need(self, sweep: Sweep, cell: str, on_gpu: bool) -> float:
        """Host memory that a cell may use, in GB."""
        if self.memory_gb != "auto":
            return self.memory_gb
        return PROCESS_GB + (1 if on_gpu else WEIGHTS) * _weights_gb(json.dumps(_model(sweep, cell), sort_keys=True))

    def gpus(self, sweep: Sweep, cells: Sequence[str]) -> list[str]:
        """Names of the GPUs that this process sees, as in CUDA_VISIBLE_DEVICES; empty if no cell uses one."""
        count = torch.cuda.device_count()
        if not count or not any(_may_use_gpu(sweep, cell) for cell in cells):
            return []
        seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return seen[:count] if seen else [str(i) for i in range(count)]

    def _fits(self, sweep: Sweep, cell: str, running: dict[str, _Worker], need: dict[str, float], on_gpu: bool) -> bool:
        """True if enough memory is left for another cell even when the running ones use all that they may.

        A cell that would run alone is always started, and may fail.
        """
        try:
            need[cell] = need[cell] if cell in need else self.need(sweep, cell, on_gpu)
        except UNUSABLE:  # the cell's own process reports the error
            need[cell] = 0.0
        free = available(torch.device("cpu"))
        if not running or free is None:
            return True
        promised = sum(max(0.0, need[other] - _resident(worker.process.pid)) for other, worker in running.items())
        return free / 1e9 - promised >= need[cell]


def _may_use_gpu(sweep: Sweep, cell: str) -> bool:
    try:
        return _model(sweep, cell).get("device") in ("auto", "cuda")
    except UNUSABLE:  # the cell's own process reports the error
        return False


@functools.cache
def _weights_gb(model: str) -> float:
    """Size of a model's weights in GB, given the model's configuration as JSON."""
    return float(build(json.loads(model), "model").weights_bytes()) / 1e9


def _model(sweep: Sweep, cell: str) -> dict[str, Any]:
    """The configuration of a cell's model, from the cell's folder."""
    found = OmegaConf.to_container(OmegaConf.load(sweep.place(cell) / ".hydra/config.yaml").model, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


class _Worker:
    """A child process that runs a cell, and stops gracefully when this process is gone."""

    def __init__(self, sweep: Sweep, cell: str, place: int, threads: int, gpu: str | None) -> None:
        self.label, self.folder, self.place = sweep.label(cell), sweep.place(cell), place
        environ = os.environ | ({} if threads_given() else {"OMP_NUM_THREADS": str(threads)})
        environ |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        command = [sys.executable, "-m", "steer_heal.sweep.cell", str(self.folder.resolve()), LAUNCHED]
        with (self.folder / "output.txt").open("ab") as output:
            # A new session, so that Ctrl-C at the terminal reaches only the launcher, which passes it on.
            self.process = subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        logger.info("{} started", self.label)

    def stop(self, seconds: float) -> None:
        """Wait for the process to end, and kill it if it does not within `seconds`."""
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def end(self) -> None:
        """Log the cell's final status; if the process failed without writing one, write `failed` first."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        status = read(self.folder)
        if status.state in ("waiting", "running") and self.process.returncode:
            message = f"the process {_how(self.process.returncode)}; output.txt in its folder may say why"
            with suppress(OSError):  # a folder that was deleted, or a full disk: readers find the process gone
                write(self.folder, status.model_copy(update={"state": "failed", "message": message}))
        log_status(self.label, probe_status(self.folder))


def _how(code: int) -> str:
    """Describe how a process ended, from its exit status."""
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}{', as happens when memory runs out' if name == 'SIGKILL' else ''}"


def _resident(pid: int) -> float:
    """Resident memory of a process in GB; 0 if it cannot be determined."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (OSError, IndexError):
        return 0.0


def threads_given() -> int:
    """The threads a process that OMP_NUM_THREADS asks for; 0 if it is not set, or not a number."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # one number a level of nesting
    return int(first) if first.isdecimal() else 0
