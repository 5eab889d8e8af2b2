"""Waiting for a lease: its duration, the owner, and what ends it, by a clock that only waiting moves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.leases import ELSEWHERE, LEASE, Note, assert_clean, begun, lease_of, left, note, place_of, until
from helpers.leases import folder as folder

from steer_heal.store import Store, publish
from steer_heal.system import process as processes

EPOCHS = {"now": time.time(), "in the far future": 4e9, "in 1970": 0.0}


class Clock:
    """Time that passes in `sleep` only; `meanwhile` is what others do. It stands for `time` in the lease."""

    def __init__(self, meanwhile: Callable[[float], None]) -> None:
        self.now, self.meanwhile = 0.0, meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 1e5, "it waits for ever"
        self.meanwhile(self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """A function that makes waiting take no time."""

    def start(meanwhile: Callable[[float], None] = lambda now: None) -> Clock:
        clock = Clock(meanwhile)
        monkeypatch.setattr(LEASE, "time", clock)
        return clock

    return start


@pytest.mark.parametrize("epoch", EPOCHS)
def test_a_process_of_another_machine_is_waited_for_while_it_touches_its_lease(
    folder: Path, clock: Callable[..., Clock], warnings: list[str], epoch: str
) -> None:
    """Reference: a time of STALE_S since the last touch by the waiter's clock; whatever the time of the file is."""
    path, touched = left(lease_of(folder), ELSEWHERE), list[Any]()
    os.utime(path, (EPOCHS[epoch], EPOCHS[epoch]))

    def meanwhile(now: float) -> None:
        assert not begun(folder), "computed while the owner lives"
        if now < 20 * LEASE.STALE_S:
            beats = int(now // (LEASE.STALE_S / 3))
            if beats > len(touched):
                touched.append(now)
                os.utime(path, (EPOCHS[epoch] + beats, EPOCHS[epoch] + beats))

    waited = clock(meanwhile)
    made = Store(folder / "store")(note, 0, folder=folder)
    assert made.text == f"0 by {os.getpid()}", f"a wrong result: {made.text}"
    silent = waited.now - touched[-1]
    assert LEASE.STALE_S < silent <= LEASE.STALE_S + 3 * LEASE.POLL_S, f"taken over {silent} s after the last touch"
    assert len(touched) > 50, "the owner lived too short to tell"
    (warning,) = warnings
    assert f"process {os.getpid()} on elsewhere is gone" in warning, warning
    assert_clean(folder)


@pytest.mark.parametrize("released", [False, True])
def test_a_waiter_takes_what_appears_meanwhile(folder: Path, clock: Callable[..., Clock], released: bool) -> None:
    """Reference: the owner's text, as soon as it is there, before and after the owner gave back its lease."""
    path = left(lease_of(folder), ELSEWHERE)

    def meanwhile(now: float) -> None:
        if now > 30 and path.exists():
            publish(Note("theirs"), place_of(folder), {})
            if released:
                path.unlink()

    waited, store = clock(meanwhile), Store(folder / "store")
    assert store(note, 0, folder=folder).text == "theirs"
    assert not begun(folder), "computed all the same"
    assert not store.computed, "it counts as computed"
    assert waited.now <= 30 + 2 * LEASE.POLL_S, f"waited on until {waited.now}"
    if not released:
        assert json.loads(path.read_bytes()) == ELSEWHERE, "the lease of a process that lives was touched"
        path.unlink()
    assert_clean(folder)


@pytest.mark.parametrize("text", [b"", b'{"host": "elsew', b"\xff\xfe", b"[1]", b"null", b"{}"])
def test_a_lease_that_says_nothing_is_waited_for_and_then_taken_over(
    folder: Path, clock: Callable[..., Clock], text: bytes
) -> None:
    """Reference: STALE_S; its owner may be about to write, or was killed between creating the file and writing it."""
    left(lease_of(folder), text)
    waited, store = clock(), Store(folder / "store")
    store(note, 0, folder=folder)
    assert store.computed == ["leases.note"], "not computed"
    assert LEASE.STALE_S < waited.now <= LEASE.STALE_S + 3 * LEASE.POLL_S, f"taken over after {waited.now} s"
    assert_clean(folder)


def test_a_lease_that_is_written_late_is_its_owners(folder: Path, clock: Callable[..., Clock]) -> None:
    """Reference: STALE_S after the writing, not after the creation."""
    path, written = left(lease_of(folder), b""), LEASE.STALE_S - 5

    def meanwhile(now: float) -> None:
        if now > written and path.read_bytes() == b"":
            path.write_text(json.dumps(ELSEWHERE))

    waited = clock(meanwhile)
    Store(folder / "store")(note, 0, folder=folder)
    assert waited.now > written + LEASE.STALE_S, f"taken over after {waited.now} s"
    assert_clean(folder)


@contextmanager
def zombie() -> Iterator[dict[str, Any]]:
    """A process of this machine that has ended, while its parent has not asked how; as an owner."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = processes.current_process() | {"pid": child.pid, "started": processes.started(child.pid), "token": "theirs"}
    assert not processes.dead(owner), "a process that runs counts as dead"
    child.kill()
    until(lambda: re.search(r"\) Z ", Path(f"/proc/{child.pid}/stat").read_text()), "it is a zombie")
    yield owner
    child.wait()


@pytest.mark.parametrize("epoch", EPOCHS)
def test_a_dead_process_of_this_machine_is_replaced_at_once(
    folder: Path, clock: Callable[..., Clock], epoch: str
) -> None:
    """Reference: no time at all, whatever the time of the file: nobody has the id, somebody else has it, a zombie."""
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    me, waited, store = processes.current_process(), clock(), Store(folder / "store")
    with zombie() as undead:
        others = [me | {"started": "another time"}, me | {"pid": os.getppid(), "started": "another time"}]
        owners = [me | {"pid": int(gone.stdout)}, *others, undead]
        for value, owner in enumerate(owners):
            path = left(lease_of(folder, value), owner | {"token": "theirs"})
            os.utime(path, (EPOCHS[epoch], EPOCHS[epoch]))
            assert not LEASE.live(path), f"counts as held: {owner}"
            store(note, value, folder=folder)
            assert waited.now == 0, f"waited {waited.now} s for {owner}"
    assert len(store.computed) == len(owners), f"computed {len(store.computed)} of {len(owners)}"
    assert_clean(folder)


def test_a_live_process_of_this_machine_is_waited_for(folder: Path, clock: Callable[..., Clock]) -> None:
    """Reference: STALE_S. The owner lives, but does not touch its lease: it is stalled, or has lost the store."""
    path = left(lease_of(folder), processes.current_process() | {"token": "another thread's"})
    assert LEASE.live(path), "a process that lives counts as gone"
    waited = clock()
    Store(folder / "store")(note, 0, folder=folder)
    assert waited.now > LEASE.STALE_S, f"taken over after {waited.now} s"
    assert not LEASE.live(path), "held after its end"
    assert_clean(folder)


def test_a_lease_that_cannot_be_read_is_waited_for(
    folder: Path, clock: Callable[..., Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: STALE_S, as for one that says nothing."""
    path, read, fails = left(lease_of(folder), ELSEWHERE), Path.read_bytes, [True]

    def failing(self: Path) -> bytes:
        if self == path and fails[0]:
            raise OSError(5, "Input/output error")
        return read(self)

    def meanwhile(now: float) -> None:
        fails[0] = now < 10

    monkeypatch.setattr(Path, "read_bytes", failing)
    waited = clock(meanwhile)
    Store(folder / "store")(note, 0, folder=folder)
    assert waited.now > LEASE.STALE_S, f"taken over after {waited.now} s"
    assert_clean(folder)


@pytest.mark.parametrize("root", ["file/store", "file"])
def test_a_store_that_cannot_be_written_is_an_error_at_once(
    folder: Path, clock: Callable[..., Clock], root: str
) -> None:
    """Reference: OSError before the stage runs, and no waiting; the store's folder would stand in a regular file."""
    (folder / "file").write_text("a regular file")
    waited = clock()
    with pytest.raises(OSError, match="file"):
        Store(folder / root)(note, 0, folder=folder)
    assert waited.now == 0, f"waited {waited.now} s"
    assert not begun(folder), "the stage ran for nothing"
    assert (folder / "file").read_text() == "a regular file", "the file was changed"


def test_a_stage_whose_folder_is_a_file_is_an_error_at_once(folder: Path, clock: Callable[..., Clock]) -> None:
    """Reference: OSError, which is not taken for a lease that somebody holds."""
    place_of(folder).parent.parent.mkdir()
    place_of(folder).parent.write_text("a regular file")
    waited = clock()
    with pytest.raises(OSError, match=r"leases\.note"):
        Store(folder / "store")(note, 0, folder=folder)
    assert waited.now == 0, f"waited {waited.now} s"
    assert not begun(folder), "the stage ran for nothing"
