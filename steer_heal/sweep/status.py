"""How a cell fares: `status.json` in its folder, written by whoever runs it and read by everybody.

A process that works on a cell touches the file every few seconds, so that a killed one is found out without it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from loguru import logger
from pydantic import Field, ValidationError

from steer_heal.config import Config, ConfigError
from steer_heal.store.lease import BEAT_S, STALE_S, silence
from steer_heal.system.process import alive, dead, describe, me
from steer_heal.system.signals import asked

State = Literal["waiting", "running", "finished", "failed", "interrupted", "lost"]
ENDED = ("finished", "failed", "interrupted", "lost")
NAME = "status.json"
ROOM = 4096  # bytes that the file has from the start, of blanks if need be


class Status(Config):
    """What is known of a cell. `lost`, gone without a word, is what readers find out; nobody writes it."""

    state: State
    attempt: int = 0  # times that it was begun
    owner: dict[str, Any] = Field(default_factory=dict)  # the process that last worked on it
    job: str | None = None  # Slurm's number of it, such as 17_3
    began: str | None = None  # UTC
    ended: str | None = None
    message: str = ""  # why it has no result, in a line
    traceback: str = ""

    def where(self) -> str:
        """The process, for people."""
        return describe(self.owner) if self.owner else ""


def read(folder: Path) -> Status:
    """A cell's status; one that was never begun waits. What cannot be read at this moment is tried again shortly."""
    for _ in range(20):
        try:
            return Status.model_validate_json((folder / NAME).read_bytes())
        except FileNotFoundError:
            return Status(state="waiting")
        except (OSError, ValidationError) as error:
            problem = error
            time.sleep(0.05)
    return Status(state="lost", message=f"{NAME} cannot be read: {str(problem).splitlines()[0]}")


def write(folder: Path, status: Status) -> None:
    """Replace the file in one step; on a full disk write over it, which takes no room. Raises OSError."""
    data, fresh = _padded(status), folder / f".{NAME}-{uuid.uuid4().hex}"
    try:
        fresh.write_bytes(data)
        os.replace(fresh, folder / NAME)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        short = data if len(data) <= ROOM else _padded(status.model_copy(update={"traceback": "see log.txt"}))
        try:
            with (folder / NAME).open("r+b") as file:
                file.write(short)
                file.truncate()
        except FileNotFoundError:  # there is none yet: what is wrong is the disk
            raise error from None
    finally:
        fresh.unlink(missing_ok=True)


def _padded(status: Status) -> bytes:
    return status.model_dump_json(indent=1).encode().ljust(ROOM)


def looked_at(folder: Path) -> Status:
    """The same as `read`, but a cell whose process is gone is `lost`: known at once on its machine, else by silence."""
    status = read(folder)
    if status.state != "running":
        return status
    if dead(status.owner):
        message = f"{status.where()} ended without a word: killed, or out of memory"
    elif not alive(status.owner) and (silent := silence(folder / NAME)) > STALE_S:
        message = f"{status.where()} has not been heard of for {silent:.0f} s"
    else:
        return status
    again = read(folder)  # it may have ended properly between the two looks
    return again.model_copy(update={"state": "lost", "message": message}) if again == status else looked_at(folder)


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Write how the work within it goes: running, and then how it ended, whatever ended it.

    Raises ConfigError where another process works on the same cell. One of the same Slurm task is gone, whatever the
    file says: Slurm runs a task once at a time, and requeues it when its node is lost.
    """
    before, job = looked_at(folder), slurm_job()
    if before.state == "running" and before.owner != me() and not (job and job == before.job):
        raise ConfigError(f"{folder}: {before.where()} works on this cell; its folder is no place for a second one")
    status = Status(state="running", attempt=before.attempt + 1, owner=me(), job=job, began=_now())
    over, end = threading.Event(), dict[str, Any](state="finished")
    try:
        write(folder, status)
        threading.Thread(target=_beat, args=(folder / NAME, over), name="status", daemon=True).start()
        yield
    except BaseException as error:  # whatever ends the work is written down, and passes on
        end = {"state": "interrupted", "message": in_a_line(error)}
        if isinstance(error, Exception) and not asked():  # what a signal breaks into may fail with anything
            end |= {"state": "failed", "traceback": traceback.format_exc()}
        raise
    finally:
        over.set()
        try:
            write(folder, status.model_copy(update=end | {"ended": _now()}))
        except OSError as error:  # readers will find that this process is gone
            logger.error("{}: how it ended cannot be written: {}", folder / NAME, error.strerror)


def in_a_line(error: BaseException) -> str:
    """Kind and reason of an error."""
    kind = type(error).__name__
    return " ".join(f"{kind}: {error}".split())[:500] if str(error) else kind


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        with suppress(OSError):  # the next one may get through
            os.utime(path)


def slurm_job() -> str | None:
    """The number of the array's task that this is, or of the job."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
