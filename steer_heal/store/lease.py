"""A lease: the right to compute one result, held by one process for as long as it keeps signalling that it is alive.

A file that only one process can create names its owner; a thread of the owner touches it every BEAT_S seconds. A
process that finds it waits, and takes over when the owner is gone: at once if the owner ran on the same machine, else
when the file was not touched for STALE_S seconds *by the waiter's own clock*, so that no two clocks are ever compared.
If two processes both believe they hold a lease, the work is done twice without harm: results are published atomically.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loguru import logger

from steer_heal.system.process import alive, current_process, dead, describe

BEAT_S, STALE_S = 5.0, 90.0  # network file systems may show a change a minute late
POLL_S, REMIND_S = 1.0, 60.0
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EMLINK)


@contextmanager
def lease(path: Path, done: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lease at `path`. Yields True once this process has it, or False if `done()` turns true before that.

    Raises OSError if the file cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = current_process() | {"token": uuid.uuid4().hex}
    if not _acquire(path, mine, done):
        yield False
        return
    over = threading.Event()
    threading.Thread(target=_beat, args=(path, mine, over), name="lease", daemon=True).start()
    try:
        yield True
    finally:
        over.set()
        if owner_of(path) == mine:  # it may have been taken over while this process was suspended
            with suppress(OSError):  # a file that stays is recognized as stale by the next process
                path.unlink()


def live(path: Path) -> bool:
    """True if a lease appears to be held, judged from one read: an owner on another machine is assumed to be alive."""
    owner = owner_of(path)
    return owner is not None and not dead(owner)


def _acquire(path: Path, mine: dict[str, Any], done: Callable[[], bool]) -> bool:
    """Create the lease, waiting while another process holds it; False once `done()` is true."""
    watched: tuple[Any, ...] = ()
    since = reminded = -float("inf")
    pause = 0.02
    while not _create(path, mine):
        if done():
            return False
        owner, now = owner_of(path), time.monotonic()
        if (seen := (owner, _touched(path))) != watched:
            watched, since = seen, now
        if owner is not None and (dead(owner) or now - since > STALE_S):
            logger.warning("{} {} is gone; taking over its work", path.stem.strip("."), describe(owner))
            take_away(path, owner)
            continue
        if owner and now - reminded > REMIND_S:
            logger.info("waiting for {}/{}: {} computes it", path.parent.name, path.stem[1:], describe(owner))
            reminded = now
        time.sleep(pause)
        pause = min(POLL_S, 1.5 * pause)
    return True


def _create(path: Path, mine: dict[str, Any]) -> bool:
    """Create the file with the owner's name already in it; False if it exists.

    A file that is created first and written afterwards may stay empty after a kill or on a full disk, and then its
    owner would be unknown.
    """
    if path.exists():
        return False
    fresh = path.with_name(f"{path.name}-{mine['token']}")
    try:
        fresh.write_text(json.dumps(mine), encoding="utf-8")
        os.link(fresh, path)
    except FileExistsError:
        return owner_of(path) == mine  # a network file system may create the link and retry
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _create_empty(path, mine)
    finally:
        fresh.unlink(missing_ok=True)
    return True


def _create_empty(path: Path, mine: dict[str, Any]) -> bool:
    """Create and write the file in two steps, for file systems without hard links; False if it exists."""
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(mine, file)
    except FileExistsError:
        return False
    return True


def take_away(path: Path, owner: dict[str, Any]) -> None:
    """Remove a dead owner's lease. A lease created between the check and the rename is lost: the work is done twice."""
    aside = path.with_name(f"{path.name}-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        if owner_of(path) == owner:
            path.rename(aside)
            aside.unlink()


def owner_of(path: Path) -> dict[str, Any] | None:
    """The owner of a lease: {} if the file cannot be read (yet, or at this moment), None if there is no file."""
    try:
        owner = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def silence(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its own file system; 0 if that cannot be determined."""
    probe = path.with_name(f".now-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:  # another user's folder cannot be written: use this machine's clock
        with suppress(OSError):
            return time.time() - path.stat().st_mtime
        return 0.0
    finally:
        with suppress(OSError):
            probe.unlink()


def holder(path: Path) -> dict[str, Any] | None:
    """The owner of a lease, judged from one read; None if it is gone, or silent for STALE_S and not known to live."""
    owner = owner_of(path)
    if owner is None or dead(owner) or (not alive(owner) and silence(path) > STALE_S):
        return None
    return owner


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _beat(path: Path, mine: dict[str, Any], over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        if owner_of(path) not in (mine, {}):  # taken over; an unreadable file ({}) may still be ours
            return
        with suppress(OSError):  # the next beat may get through; at worst the work is done twice
            os.utime(path)
