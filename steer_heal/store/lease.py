"""A lease: the right to compute one result, held by one process for as long as it shows that it lives.

A file that only one process can create names its owner; a thread of the owner touches it every few seconds. Whoever
finds it waits, and takes over when the owner is gone: at once if it was a process of the same machine, else when the
file was not touched for STALE_S seconds *by the waiter's own clock*, so that no two clocks are ever compared.
Two processes that both believe to hold a lease do the same work twice and no harm: results are published atomically.
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

from steer_heal.system.process import alive, dead, describe, me

BEAT_S, STALE_S = 5.0, 90.0  # network file systems may show a change a minute late
POLL_S, REMIND_S = 1.0, 60.0
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EMLINK)


@contextmanager
def lease(path: Path, done: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lease at `path`: yields True once this process has it, or False when `done` without it.

    Raises OSError where no file can be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = me() | {"token": uuid.uuid4().hex}
    if not _acquire(path, mine, done):
        yield False
        return
    over = threading.Event()
    threading.Thread(target=_beat, args=(path, mine, over), name="lease", daemon=True).start()
    try:
        yield True
    finally:
        over.set()
        if owner_of(path) == mine:  # it may have been taken from a process that stood still for long
            with suppress(OSError):  # one that stays is found dead by whoever meets it
                path.unlink()


def live(path: Path) -> bool:
    """Whether a lease is held, as far as one look can tell: a process of another machine is taken at its word."""
    owner = owner_of(path)
    return owner is not None and not dead(owner)


def _acquire(path: Path, mine: dict[str, Any], done: Callable[[], bool]) -> bool:
    """Create the lease, waiting while somebody else holds it; False when what it is about is done."""
    watched: tuple[Any, ...] = ()
    since = told = -float("inf")
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
        if owner and now - told > REMIND_S:
            logger.info("waiting for {}/{}: {} computes it", path.parent.name, path.stem[1:], describe(owner))
            told = now
        time.sleep(pause)
        pause = min(POLL_S, 1.5 * pause)
    return True


def _create(path: Path, mine: dict[str, Any]) -> bool:
    """Make the file, which names the owner from the start; False if it is there.

    One that is created and then written may stay empty, by a kill or on a full disk, and nobody could tell whose it is.
    """
    if path.exists():
        return False
    fresh = path.with_name(f"{path.name}-{mine['token']}")
    try:
        fresh.write_text(json.dumps(mine), encoding="utf-8")
        os.link(fresh, path)
    except FileExistsError:
        return owner_of(path) == mine  # where a network file system did it, and did it again
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _create_empty(path, mine)
    finally:
        fresh.unlink(missing_ok=True)
    return True


def _create_empty(path: Path, mine: dict[str, Any]) -> bool:
    """The same where a file system has no links: in two steps."""
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(mine, file)
    except FileExistsError:
        return False
    return True


def take_away(path: Path, owner: dict[str, Any]) -> None:
    """Take a dead owner's lease away. One that began between the look and the renaming is lost: work done twice."""
    aside = path.with_name(f"{path.name}-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        if owner_of(path) == owner:
            path.rename(aside)
            aside.unlink()


def owner_of(path: Path) -> dict[str, Any] | None:
    """Who holds a lease: {} if that cannot be read (yet, or at this moment), None if nobody does."""
    try:
        owner = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def silence(path: Path) -> float:
    """Seconds since a file was touched, by the clock of the file system that holds it; 0 where that cannot be told."""
    probe = path.with_name(f".now-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:  # of somebody else's folder only this machine's clock can be asked
        with suppress(OSError):
            return time.time() - path.stat().st_mtime
        return 0.0
    finally:
        with suppress(OSError):
            probe.unlink()


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds a lease, as far as one look can tell; nobody who is known to be gone, or was not heard of for long."""
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
        if owner_of(path) not in (mine, {}):  # it was taken; one that cannot be read at this moment may still be ours
            return
        with suppress(OSError):  # the next beat may get through; at worst the work is done twice
            os.utime(path)
