"""Cells side by side, each in a process of its own, within the cores, the memory and the GPUs of this machine."""

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
from typing import Annotated, Any, Literal

import torch
from loguru import logger
from omegaconf import OmegaConf
from pydantic import Field

from steer_heal.config import build
from steer_heal.lm.memory import available
from steer_heal.sweep import Sweep
from steer_heal.sweep.cell import LAUNCHED, UNUSABLE
from steer_heal.sweep.launcher import Launcher, give_up, tell
from steer_heal.sweep.status import looked_at, read, write

POLL_S, STOPS_S = 0.2, 300.0  # a training step of a large model on a CPU takes minutes
PROCESS_GB = 1.5  # of a cell beside its weights: Python, torch, activations; the bundled model takes 2.1 to 2.4 in all
WEIGHTS = 4  # times its weights that a cell holds at its peak: the weights, those folded for generation, a heal


class Parallel(Launcher):
    """One that is killed ends that cell. A stage that several need is computed by one of them while the others wait."""

    name: Literal["parallel"]
    jobs: Annotated[int, Field(ge=1)] | Literal["auto"]  # cells at once; auto: what cores, memory and GPUs allow
    memory_gb: Annotated[float, Field(gt=0)] | Literal["auto"]  # that one cell takes; auto: by the size of its model

    def launch(self, sweep: Sweep, cells: Sequence[str]) -> None:
        waiting, running, need = deque(cells), dict[str, _Worker](), dict[str, float]()
        gpus = self.gpus(sweep, cells)
        jobs = self.at_once(len(cells), gpus)
        places, threads = list(range(jobs)), max(1, cores() // jobs)
        logger.info("{} cells, {} at once, {} threads each", len(cells), jobs, threads)
        try:
            while waiting or running:
                while waiting and places and self._fits(sweep, waiting[0], running, need, bool(gpus)):
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
            end = time.monotonic() + STOPS_S
            for cell, worker in reversed(running.items()):
                worker.stop(end - time.monotonic())
                if worker.process.returncode and read(worker.folder).state == "waiting":
                    waiting.appendleft(cell)  # it was told before it could heed that
                else:
                    worker.end()
            give_up(sweep, list(waiting))
            raise

    def at_once(self, cells: int, gpus: Sequence[str]) -> int:
        """How many cells run side by side: no more than there are cells, nor GPUs if they are used, else cores."""
        most = len(gpus) or cores()
        if self.jobs != "auto" and self.jobs > most:
            logger.warning("hydra.launcher.jobs={}: there are {} {}", self.jobs, most, "GPUs" if gpus else "cores")
        return min(most, cells, most if self.jobs == "auto" else self.jobs)

    def need(self, sweep: Sweep, cell: str, on_gpu: bool) -> float:
        """GB of the host's memory that a cell may take."""
        if self.memory_gb != "auto":
            return self.memory_gb
        return PROCESS_GB + (1 if on_gpu else WEIGHTS) * _weights_gb(json.dumps(_model(sweep, cell), sort_keys=True))

    def gpus(self, sweep: Sweep, cells: Sequence[str]) -> list[str]:
        """Names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES has them; none if no cell would use one."""
        count = torch.cuda.device_count()
        if not count or all(_model(sweep, cell).get("device") not in ("auto", "cuda") for cell in cells):
            return []
        seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return seen[:count] if seen else [str(i) for i in range(count)]

    def _fits(self, sweep: Sweep, cell: str, running: dict[str, _Worker], need: dict[str, float], on_gpu: bool) -> bool:
        """Whether memory is left for one more, also once those that run have taken all that they may.

        One alone is let run in any case, to fail by itself if it does.
        """
        try:
            need[cell] = need[cell] if cell in need else self.need(sweep, cell, on_gpu)
        except UNUSABLE:  # which its own process will say
            need[cell] = 0.0
        free = available(torch.device("cpu"))
        if not running or free is None:
            return True
        promised = sum(max(0.0, need[other] - _resident(worker.process.pid)) for other, worker in running.items())
        return free / 1e9 - promised >= need[cell]


@functools.cache
def _weights_gb(model: str) -> float:
    """GB of a model's weights, of its configuration as JSON."""
    return float(build(json.loads(model), "model").weights_bytes()) / 1e9


def _model(sweep: Sweep, cell: str) -> dict[str, Any]:
    """The configuration of a cell's model."""
    found = OmegaConf.to_container(OmegaConf.load(sweep.place(cell) / ".hydra/config.yaml").model, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


class _Worker:
    """A process that runs a cell, and stops in good order when this one is gone."""

    def __init__(self, sweep: Sweep, cell: str, place: int, threads: int, gpu: str | None) -> None:
        self.cell, self.folder, self.place = cell, sweep.place(cell), place
        environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
        environ |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        command = [sys.executable, "-m", "steer_heal.sweep.cell", str(self.folder.resolve()), LAUNCHED]
        with (self.folder / "output.txt").open("ab") as output:
            # a session of its own: Ctrl-C at the terminal is for the launcher, which passes it on
            self.process = subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        logger.info("{} begins", cell)

    def stop(self, seconds: float) -> None:
        """Wait for its end, and bring it about if it does not come."""
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

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
