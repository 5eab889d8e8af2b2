"""The status of a cell: `status.json` in its folder, written by the process that runs it and read by all others.

A process that runs a cell touches the file every few seconds, so that others notice if it is killed.
"""

from __future__ import annotations

import calendar
import errno
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from loguru import logger
from pydantic import Field, ValidationError

from steer_heal.config import Config, ConfigError
from steer_heal.store.lease import BEAT_S, STALE_S, silence
from steer_heal.system.files import replacing
from steer_heal.system.process import alive, current_process, dead, describe
from steer_heal.system.signals import stop_requested

State = Literal["waiting", "running", "finished", "failed", "interrupted", "lost", "missing"]
ENDED, BUSY = ("finished", "failed", "interrupted", "lost", "missing"), ("waiting", "running")
NAME, RESULT = "status.json", "result.json"
TIME = "%Y-%m-%dT%H:%M:%SZ"
ROOM = 4096  # minimum size of the file in bytes, padded with blanks, so that it can be overwritten on a full disk


class Status(Config):
    """A cell's status. Readers infer `lost`, if its process is gone, and `missing`, if its folder is."""

    state: State
    attempt: int = 0  # number of times that the cell was started
    owner: dict[str, Any] = Field(default_factory=dict)  # the process that last worked on it
    job: str | None = None  # Slurm's number of its task, such as 17_3
    began: str | None = None  # UTC
    ended: str | None = None
    seconds: float = 0.0  # spent on it, in all attempts since it last finished
    message: str = ""  # one line: why there is no result
    traceback: str = ""

    def where(self) -> str:
        """Describe the process that last worked on the cell; empty if there was none."""
        return describe(self.owner) if self.owner else ""


def read(folder: Path) -> Status:
    """Read a cell's status; without a file it is `finished` if there is a result, `waiting` otherwise.

    A file that cannot be read is retried for a second; then the cell is `lost`, or `finished` if there is a result.
    """
    problem: Exception
    for _ in range(20):
        try:
            found = Status.model_validate_json((folder / NAME).read_bytes())
            if found.state == "finished" and not (folder / RESULT).is_file():
                return found.model_copy(update={"state": "missing", "message": f"its {RESULT} is missing"})
            return found
        except FileNotFoundError:
            if not folder.is_dir():
                return Status(state="missing", message="its folder is missing")
            return Status(state="finished" if (folder / RESULT).is_file() else "waiting")
        except (OSError, ValidationError) as error:
            problem = error
            time.sleep(0.05)
    state: State = "finished" if (folder / RESULT).is_file() else "lost"
    return Status(state=state, message=f"{NAME} cannot be read: {str(problem).splitlines()[0]}")


def write(folder: Path, status: Status) -> None:
    """Replace the file atomically; on a full disk overwrite it in place, which needs no space. Raises OSError."""
    data = _padded(status)
    try:
        with replacing(folder / NAME) as fresh:
            fresh.write_bytes(data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        short = data if len(data) <= ROOM else _padded(status.model_copy(update={"traceback": "see log.txt"}))
        try:
            with (folder / NAME).open("r+b") as file:
                file.write(short)
                file.truncate()
        except FileNotFoundError:  # there is no file to overwrite; report the full disk
            raise error from None


def _padded(status: Status) -> bytes:
    return status.model_dump_json(indent=1).encode().ljust(ROOM)


def probe_status(folder: Path) -> Status:
    """Read a status; `lost` if its process is gone: detected at once on its machine, after STALE_S on another."""
    status = read(folder)
    if status.state != "running":
        return status
    if dead(status.owner):
        message = f"{status.where()} ended without writing its status: killed, or out of memory"
    elif not alive(status.owner) and (silent := silence(folder / NAME)) > STALE_S:
        message = f"{status.where()} has not reported for {silent:.0f} s"
    else:
        return status
    again = read(folder)  # it may have ended normally between the two reads
    return again.model_copy(update={"state": "lost", "message": message}) if again == status else probe_status(folder)


def seconds_spent(folder: Path, status: Status) -> float:
    """Seconds spent on a cell so far; 0 if it has finished. A killed attempt lasted to its last sign of life."""
    if status.state == "finished":
        return 0.0
    with suppress(OSError, ValueError):
        if status.began and not status.ended:
            begun = calendar.timegm(time.strptime(status.began, TIME))
            return status.seconds + max(0.0, (folder / NAME).stat().st_mtime - begun)
    return status.seconds


@contextmanager
def tracked_status(folder: Path) -> Iterator[float]:
    """Record the status of the work inside the context: running, then its final state, whatever the cause.

    Yields the seconds that earlier attempts took.

    Raises ConfigError if another process works on the same cell. An earlier process of the same Slurm task is assumed
    gone even if the file says `running`: Slurm runs a task in one place at a time, and requeues it if its node is lost.
    """
    before, job = probe_status(folder), slurm_job()
    if before.state == "running" and before.owner != current_process() and not (job and job == before.job):
        raise ConfigError(f"{folder}: {before.where()} works on this cell; no other process may use its folder")
    spent, begun = seconds_spent(folder, before), time.monotonic()
    status = Status(
        state="running", attempt=before.attempt + 1, owner=current_process(), job=job, began=_now(), seconds=spent
    )
    over, end = threading.Event(), dict[str, Any](state="finished")
    try:
        write(folder, status)
        threading.Thread(target=_beat, args=(folder / NAME, over), name="status", daemon=True).start()
        yield spent
    except BaseException as error:  # every cause is recorded and propagates
        end = {"state": "interrupted", "message": in_a_line(error)}
        if isinstance(error, Exception) and not stop_requested():  # code that a signal interrupts may raise any error
            end |= {"state": "failed", "traceback": traceback.format_exc()}
        raise
    finally:
        over.set()
        try:
            seconds = round(spent + time.monotonic() - begun, 3)
            write(folder, status.model_copy(update=end | {"ended": _now(), "seconds": seconds}))
        except OSError as error:  # readers will find that this process is gone
            logger.error("{}: the final status cannot be written: {}", folder / NAME, error.strerror)


def in_a_line(error: BaseException) -> str:
    """Type and message of an error in one line, at most 500 characters; a request to stop in plain words."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by Ctrl-C"
    if isinstance(error, SystemExit):
        return "asked to stop" if stop_requested() else f"exited with status {error.code}"
    kind = type(error).__name__
    return " ".join(f"{kind}: {error}".split())[:500] if str(error) else kind


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        with suppress(OSError):  # the next attempt may succeed
            os.utime(path)


def slurm_job() -> str | None:
    """Slurm's number of this array task or job; None outside of Slurm."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def _now() -> str:
    return time.strftime(TIME, time.gmtime())
