"""The `slurm` launcher: submits cells as the tasks of a Slurm array, through submitit."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from loguru import logger
from pydantic import Field

from steer_heal.config import ConfigError
from steer_heal.store.lease import STALE_S, silence
from steer_heal.sweep import Job, Sweep
from steer_heal.sweep.cell import run_cell
from steer_heal.sweep.launcher import Launcher, give_up
from steer_heal.sweep.status import NAME, Status, slurm_job, write
from steer_heal.system import signals as stopping
from steer_heal.system.process import describe
from steer_heal.system.streams import escape_unprintable
from steer_heal.system.terminal import counted

PREEMPTED = ("RUNNING", "PREEMPTED")  # states in which Slurm reports a task that it is preempting
TASK = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
SETUP = (
    # Since 22.05 srun does not inherit --cpus-per-task, and torch would use every core that it sees.
    "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
    "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}",
    # Slurm counts a preempted task as failed if SIGTERM ends it, as it does in Python's first seconds.
    f"trap 'case $? in 143) case $(squeue -h -j {TASK} -o %T) in {'|'.join(PREEMPTED)})"
    f" scontrol requeue {TASK};; esac;; esac' EXIT",
)
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
ENVIRON = {  # field -> variables that take precedence over it in sbatch
    "partition": ("SBATCH_PARTITION",), "account": ("SBATCH_ACCOUNT",), "qos": ("SBATCH_QOS",),
    "constraint": ("SBATCH_CONSTRAINT",), "timeout_min": ("SBATCH_TIMELIMIT",), "signal_delay_s": ("SBATCH_SIGNAL",),
    "mem_gb": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "gpus_per_node": ("SBATCH_GPUS_PER_NODE", "SBATCH_GPUS"), "array_parallelism": ("SBATCH_ARRAY_INX",),
}  # fmt: skip
GIVEN = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")  # prefixes of the variables that a job receives
WHERE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS")  # these select the cluster
ASK_S = 60.0  # timeout of a Slurm command


class Slurm(Launcher):
    """Submit cells as an array. A task that is preempted or out of time is requeued and resumes in its stage."""

    name: Literal["slurm"]
    detach: bool  # submit and return at once
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    timeout_min: int = Field(ge=1)  # per attempt at a cell
    max_num_timeout: int = Field(ge=0)  # times that a cell may run out of time and resume
    signal_delay_s: int = Field(ge=1)  # seconds before the time limit: the task is signalled to save a checkpoint
    cpus_per_task: int = Field(ge=1)
    mem_gb: float | None = Field(gt=0)
    gpus_per_node: int | str | None  # such as 1 or a100:1
    array_parallelism: int = Field(ge=1)  # tasks at once
    max_array_size: int = Field(ge=1)  # tasks per array; further cells go into further arrays
    setup: tuple[str, ...]  # shell lines run before a task starts, such as module load cuda
    additional_parameters: dict[str, Any] | None  # of sbatch, such as {mail-type: END}

    def prepare(self) -> None:
        lacking = [name for name in ("sbatch", "srun", "squeue", "scancel") if shutil.which(name) is None]
        if lacking:
            raise ConfigError(
                f"hydra/launcher=slurm: this machine has no {', '.join(lacking)}; run this where jobs are submitted"
            )

    def model_post_init(self, _: Any) -> None:
        if self.signal_delay_s >= 60 * self.timeout_min:
            most = 60 * self.timeout_min
            raise ValueError(f"one with signal_delay_s under 60 * timeout_min = {most}, not {self.signal_delay_s}")

    def launch(self, sweep: Sweep, cells: Sequence[str]) -> None:
        for begin in range(0, len(cells), self.max_array_size):
            self._submit(sweep, cells[begin : begin + self.max_array_size], cells[begin:])

    def follow(self, sweep: Sweep) -> None:
        """Wait until all cells have ended, unless `detach` is set. When stopped, leave the jobs running."""
        if self.detach:
            return
        try:
            self.wait(sweep)
        except (KeyboardInterrupt, SystemExit):
            logger.warning(
                "the jobs continue; to follow: python -m steer_heal.sweep status|wait|cancel {}", sweep.folder
            )
            raise

    def _submit(self, sweep: Sweep, cells: Sequence[str], left: Sequence[str]) -> None:
        """Submit one array. Raises ConfigError if sbatch rejects it; the cells in `left` are then marked not started.

        The job is recorded before and after: if this process is killed in between, the array is found by its name.
        """
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        before, name = sweep.record.jobs, re.sub(r"[^\w.-]", "_", sweep.folder.resolve().name)
        job = Job(name=f"steer_heal-{name}-{uuid.uuid4().hex[:8]}", cells=tuple(cells))
        executor = SlurmExecutor(sweep.folder.resolve() / ".submitit", max_num_timeout=self.max_num_timeout)
        taken = ("partition", "account", "qos", "constraint", "cpus_per_task", "gpus_per_node", "signal_delay_s",
                 "array_parallelism", "additional_parameters")  # fmt: skip
        given = {name: value for name in taken if (value := getattr(self, name)) is not None}
        given |= {} if self.mem_gb is None else {"mem": f"{round(1024 * self.mem_gb)}M"}
        executor.update_parameters(
            job_name=job.name, time=self.timeout_min, setup=[*SETUP, *self.setup], stderr_to_stdout=True, **given
        )
        folders = [str(sweep.place(cell).resolve()) for cell in cells]
        sweep.change(jobs=(*before, job))
        try:
            with _for_sbatch(self):
                tasks = executor.map_array(Attempt(), folders)
        except (FailedJobError, FailedSubmissionError) as error:
            sweep.change(jobs=before)
            why = f"sbatch: {' '.join(str(error).split()).removeprefix('sbatch: ')[-300:]}"
            give_up(sweep, left, why)
            raise ConfigError(f"hydra/launcher=slurm: {why}") from None
        number = str(tasks[0].job_id).partition("_")[0]
        sweep.change(jobs=(*before, job.model_copy(update={"id": number})))
        logger.info("submitted job {}: {}", number, counted(len(cells), "cell"))

    def status(self, sweep: Sweep) -> dict[str, Status]:
        """The status of each cell: from Slurm's state of its task, and from its file, which has details of its end."""
        submitting = sweep.launched_by() is not None
        sweep.record = Sweep.open(sweep.folder).record  # another process may have resubmitted cells
        jobs = _jobs(sweep)
        tasks = _tasks([job.id for job in jobs or () if job.id])
        found = sweep.status()
        if jobs is None:
            return found
        for cell, status in found.items():
            task = _task_of(jobs, cell)
            if task is None and status.state == "waiting" and not submitting:
                found[cell] = status.model_copy(update={"state": "interrupted", "message": "never submitted"})
            elif task is not None and tasks is not None:
                found[cell] = _combined(status, task, tasks, sweep.place(cell))
        return found

    def cancel(self, sweep: Sweep) -> None:
        """Cancel the jobs that Slurm still has, and mark waiting cells as cancelled."""
        if (owner := sweep.launched_by()) is not None:
            raise ConfigError(f"{sweep.folder}: {describe(owner)} is submitting cells; cancel it when it is done")
        jobs = _jobs(sweep)
        if jobs is None:
            raise ConfigError(f"{sweep.folder}: squeue cannot list the sweep's jobs; try again")
        if numbers := [job.id for job in jobs if job.id]:
            try:
                said = _slurm("scancel", *numbers)
            except subprocess.TimeoutExpired:
                raise ConfigError(f"{sweep.folder}: scancel: no answer within {ASK_S:g} s") from None
            if said.returncode:
                raise ConfigError(f"{sweep.folder}: {' '.join(said.stderr.split())}")
        for cell, status in sweep.status().items():
            if status.state == "waiting":
                write(sweep.place(cell), status.model_copy(update={"state": "interrupted", "message": "cancelled"}))


class Attempt:
    """The function that a task runs. submitit pickles it with its arguments, and calls it again after a requeue."""

    def __call__(self, folder: str) -> None:
        stopping.before_leaving[:] = [_requeue_if_preempted]
        escape_unprintable()
        stopping.install_handlers()  # before the imports of a cell, which are slow
        ended = run_cell(Path(folder))
        ended.return_value  # noqa: B018  # raises the cell's exception, so that the task fails in Slurm too

    def checkpoint(self, folder: str) -> Any:
        """Return the call to run after a requeue: the same one, as the store holds the finished stages."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, folder)


def _requeue_if_preempted() -> None:
    """Requeue this task at SIGTERM if Slurm preempts it: unlike a cancelled one, it still counts as running.

    submitit's handler of SIGUSR2 requeues the task and exits.
    """
    task = slurm_job()
    handler = signal.getsignal(signal.SIGUSR2)
    if task is not None and callable(handler):
        state, _ = (_tasks([task]) or {}).get(task, ("", ""))
        logger.info("Slurm reports the state of this task as {}", state or "unknown")
        if state in PREEMPTED:
            handler(signal.SIGUSR2, None)


@contextmanager
def _for_sbatch(slurm: Slurm) -> Iterator[None]:
    """Remove from the environment the sbatch variables that would take precedence over fields set here.

    Those of a job that this process runs in are removed too, as tasks would inherit them.
    """
    wins = {name for field, names in ENVIRON.items() if getattr(slurm, field) is not None for name in names}
    wins |= {name for name in os.environ if name.startswith(GIVEN) and name not in WHERE}
    kept = {name: os.environ.pop(name) for name in wins if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)


def _squeue(*words: str) -> list[str] | None:
    """Lines of squeue about tasks in any state; None if it cannot be queried.

    Slurm forgets a job some minutes after its end, and then rejects its number as invalid.
    """
    if shutil.which("squeue") is None:
        return None
    try:
        said = _slurm("squeue", "--noheader", "--states=all", *words)
    except subprocess.TimeoutExpired:
        _warn(f"squeue: no answer within {ASK_S:g} s")
        return None
    if said.returncode and "Invalid job id" not in said.stderr:
        _warn(" ".join(said.stderr.split()))
        return None
    return [line.strip() for line in said.stdout.splitlines()]


@functools.cache
def _warn(reason: str) -> None:
    """Log a warning, once per reason: the next query is likely to fail in the same way."""
    logger.warning("Slurm cannot be queried; the status is from the cells' files alone: {}", reason)


def _tasks(jobs: Sequence[str]) -> dict[str, tuple[str, str]] | None:
    """State and reason of every task that Slurm still knows, by its number; None if it cannot be queried."""
    if not jobs:
        return {}
    lines = _squeue("--array", f"--jobs={','.join(jobs)}", "--format=%i|%T|%r")
    if lines is None:
        return None
    fields = [line.split("|", 2) for line in lines if line.count("|") >= 2]
    return {number: (state, reason) for number, state, reason in fields}


def _jobs(sweep: Sweep) -> list[Job] | None:
    """A sweep's jobs; None if Slurm cannot be queried.

    A job whose number was not recorded, because its submitter was killed, is looked up by name. If it still has no
    number, Slurm does not know it.
    """
    jobs = []
    for job in sweep.record.jobs:
        if job.id is None:
            lines = _squeue(f"--name={job.name}", "--format=%F")
            if lines is None:
                return None
            job = job.model_copy(update={"id": lines[0] if lines else None})
        jobs.append(job)
    return jobs


def _task_of(jobs: Sequence[Job], cell: str) -> str | None:
    """Slurm's number of a cell's latest task; None if it has none."""
    job = next((job for job in reversed(jobs) if cell in job.cells), None)
    if job is None or job.id is None:
        return None
    return job.id if len(job.cells) == 1 else f"{job.id}_{job.cells.index(cell)}"


def _combined(status: Status, task: str, tasks: Mapping[str, tuple[str, str]], folder: Path) -> Status:
    """Combine a cell's status with Slurm's state of its task, which was queried before the file was read."""
    state, reason = tasks.get(task, ("", ""))
    now: dict[str, Any] = {"job": task}
    if status.state in ("finished", "failed", "missing"):
        return status
    if state in QUEUED:  # not started yet, or requeued
        now |= {"state": "waiting", "message": ""}
    elif state in AT_WORK:
        now |= {"state": "waiting" if status.state == "waiting" else "running", "message": ""}
    elif status.state == "interrupted" or (state == "COMPLETED" and silence(folder / NAME) < STALE_S):
        pass  # the file has the reason or will soon: a shared file system shows changes late
    elif state:
        now |= {"state": "lost", "message": f"Slurm ended task {task}: {state} ({reason})"}
    else:
        now |= {"state": "lost", "message": f"Slurm no longer knows task {task}"}
    return status.model_copy(update=now)
