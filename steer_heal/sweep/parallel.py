"""Cells side by side, each in a process of its own, within the cores, the memory and the GPUs of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from loguru import logger
from pydantic import Field

from steer_heal.config import build
from steer_heal.memory import available
from steer_heal.sweep import Sweep
from steer_heal.sweep.cell import thawed
from steer_heal.sweep.launcher import Launcher, give_up, tell
from steer_heal.sweep.status import looked_at, read, write

POLL_S = 0.2
PROCESS_GB = 1.5  # of a cell beside its weights: Python, torch, activations; the bundled model takes 2.1 to 2.4 in all
WEIGHTS = 4  # times its weights that a cell holds at its peak: the weights, those folded for generation, a heal


class Parallel(Launcher):
    """One that is killed ends that cell. A stage that several need is computed by one of them while the others wait."""

    name: Literal["parallel"]
    jobs: Annotated[int, Field(ge=1)] | Literal["auto"]  # cells at once; auto: what cores, memory and GPUs allow
    memory_gb: Annotated[float, Field(gt=0)] | Literal["auto"]  # that one cell takes; auto: by the size of its model

    def run(self, sweep: Sweep, cells: Sequence[str]) -> None:
        waiting, running = deque(cells), dict[str, _Worker]()
        gpus = _gpus() if self._on_gpu(sweep, cells) else []
        jobs = self.at_once(len(cells), gpus)
        need = {cell: self.need(sweep, cell) for cell in cells} if not gpus else dict.fromkeys(cells, 0.0)
        places, threads = list(range(jobs)), max(1, cores() // jobs)
        logger.info("{} cells, {} at once, {} threads each", len(cells), jobs, threads)
        try:
            while waiting or running:
                while waiting and places and (not running or _room(need[waiting[0]], running, need)):
                    cell, place = waiting.popleft(), places.pop(0)
                    running[cell] = _Worker(sweep, cell, place, threads, gpus[place] if gpus else None)
                for cell, worker in list(running.items()):
                    if worker.process.poll() is not None:
                        worker.end()
                        places.append(running.pop(cell).place)
                time.sleep(POLL_S)
        except (KeyboardInterrupt, SystemExit):
            for worker in running.values():
                worker.process.send_signal(signal.SIGTERM)
            for cell, worker in reversed(running.items()):
                worker.process.wait()
                if worker.process.returncode == -signal.SIGTERM and read(worker.folder).state == "waiting":
                    waiting.appendleft(cell)  # it was told before it could heed that
                else:
                    worker.end()
            give_up(sweep, list(waiting))

    def at_once(self, cells: int, gpus: Sequence[str]) -> int:
        """How many cells run side by side: no more than there are cells, GPUs if they are used, and cores."""
        most = cores() if self.jobs == "auto" else self.jobs
        return min(most, cells, *([len(gpus)] if gpus else []))

    def need(self, sweep: Sweep, cell: str) -> float:
        """GB of memory that a cell may take."""
        if self.memory_gb != "auto":
            return self.memory_gb
        model = build(thawed(sweep.place(cell)).model, "model")
        return PROCESS_GB + WEIGHTS * float(model.weights_bytes()) / 1e9

    def _on_gpu(self, sweep: Sweep, cells: Sequence[str]) -> bool:
        return bool(_gpus()) and any(
            thawed(sweep.place(cell)).model.get("device", "cpu") in ("auto", "cuda") for cell in cells
        )


class _Worker:
    """A process that runs a cell, and stops in good order when this one is gone."""

    def __init__(self, sweep: Sweep, cell: str, place: int, threads: int, gpu: str | None) -> None:
        self.cell, self.folder, self.place = cell, sweep.place(cell), place
        environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
        environ |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        command = [sys.executable, "-m", "steer_heal.sweep.cell", str(self.folder.resolve())]
        with (self.folder / "output.txt").open("ab") as output:
            # a session of its own: Ctrl-C at the terminal is for the launcher, which passes it on
            self.process = subprocess.Popen(
                command, cwd=sweep.record.cwd, env=environ, stdin=subprocess.PIPE, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        logger.info("{} begins", cell)

    def end(self) -> None:
        """Tell how it ended; say so in its status where it could not do that itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        status = read(self.folder)
        if status.state in ("waiting", "running") and self.process.returncode:
            message = f"the process {_how(self.process.returncode)}; output.txt in its folder may say why"
            write(self.folder, status.model_copy(update={"state": "failed", "message": message}))
        tell(self.cell, looked_at(self.folder))


def _how(code: int) -> str:
    """How a process ended, by its exit status."""
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}{', as happens when memory runs out' if name == 'SIGKILL' else ''}"


def _room(needed: float, running: dict[str, _Worker], need: dict[str, float]) -> bool:
    """Whether memory is left for one more, also once those that run have taken all that they may."""
    free = available(torch.device("cpu"))
    if free is None:
        return True
    promised = sum(max(0.0, need[cell] - _resident(worker.process.pid)) for cell, worker in running.items())
    return free / 1e9 - promised >= needed


def _resident(pid: int) -> float:
    """GB of memory that a process holds; 0 where that cannot be told."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (OSError, IndexError):
        return 0.0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """Names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES has them."""
    count = torch.cuda.device_count()
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return seen[:count] if seen else [str(i) for i in range(count)]
