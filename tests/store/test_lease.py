"""The lease: one of all processes that want a result computes it, whichever dies, stalls, or is on another machine."""

from __future__ import annotations

import errno
import json
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.leases import (
    ELSEWHERE,
    LEASE,
    Note,
    always,
    asking,
    assert_clean,
    begun,
    got,
    lease_of,
    left,
    note,
    place_of,
    said,
    until,
)
from helpers.leases import folder as folder

from steer_heal.store import Store, publish
from steer_heal.store import stage as named
from steer_heal.system import process as processes

ROUNDS = 12


@pytest.mark.parametrize("damaged", [False, True])
def test_many_ask_at_once_and_one_computes(tmp_path: Path, damaged: bool) -> None:
    """Reference: one line in a file outside the store; every waiter says whom it waits for, and gets that one's text.

    Likewise where a damaged result stands.
    """
    if damaged:
        publish(Note("old"), place_of(tmp_path), {})
        (place_of(tmp_path) / "note").write_text("damaged")
    with asking(tmp_path, 4):
        until(lambda: sum("waiting for" in said(tmp_path, i) for i in range(4)) == 3, "three of four wait")
        (tmp_path / "gate").touch()
    answers = [got(tmp_path, i) for i in range(4)]
    ((_, owner),) = begun(tmp_path)
    assert [answer["texts"] for answer in answers] == [[f"0 by {owner}"]] * 4, f"not one result for all: {answers}"
    assert sorted(len(answer["computed"]) for answer in answers) == [0, 0, 0, 1], f"computed by several: {answers}"
    stage, key = place_of(tmp_path).parts[-2:]
    told = f"waiting for {stage}/{key}: process {owner} on {platform.node()} computes it"
    for i, answer in enumerate(answers):
        assert (told in said(tmp_path, i)) != bool(answer["computed"]), f"process {i} said {said(tmp_path, i)!r}"
    if damaged:
        (aside,) = (tmp_path / "store").glob("*/.damaged-*/*/note")
        assert aside.read_text() == "damaged", "what was damaged was not kept as it was"
        return
    assert_clean(tmp_path)


def test_a_killed_owner_is_replaced_at_once(tmp_path: Path) -> None:
    """Reference: a lease is never stale here, so that only the look for the process can tell; it is not even reaped."""
    with asking(tmp_path, 1) as (owner,):
        until(lambda: begun(tmp_path), "the first one is at work")
        with asking(tmp_path, 2, first=1):
            until(lambda: all("waiting for" in said(tmp_path, i) for i in (1, 2)), "both wait")
            os.kill(owner.pid, 9)
            until(lambda: len(begun(tmp_path)) > 1, "one of them takes over")
            (tmp_path / "gate").touch()
    heirs = [f"0 by {pid}" for _, pid in begun(tmp_path)[1:]]
    texts = [got(tmp_path, i)["texts"] for i in (1, 2)]
    assert texts[0] == texts[1], f"the waiters have other results: {texts}"
    assert texts[0][0] in heirs, f"{texts[0][0]} was made by none of the heirs {heirs}"
    log = said(tmp_path, 1) + said(tmp_path, 2)
    key, dead = place_of(tmp_path).name, f"process {owner.pid} on {platform.node()}"
    assert f"{key} {dead} is gone; taking over its work" in log, f"the dead owner is not named: {log}"
    assert_clean(tmp_path)


def test_two_wait_for_the_same_dead_owner(folder: Path) -> None:
    """Reference: usually one successor; two may both take over, and then the work is done twice without harm."""
    dead = processes.current_process() | {"started": "long ago", "token": "dead"}
    for value in range(ROUNDS):
        left(lease_of(folder, value), dead)
    with asking(folder, 2, range(ROUNDS)):
        pass
    makers = begun(folder)
    texts = [got(folder, i)["texts"] for i in range(2)]
    assert texts[0] == texts[1], "the two have other results"
    for value, text in enumerate(texts[0]):
        assert text in {f"{v} by {pid}" for v, pid in makers if v == value}, f"result {value} is a wrong one: {text}"
    twice = [value for value, times in Counter(value for value, _ in makers).items() if times > 1]
    assert len(twice) <= 2, f"{twice} of {ROUNDS} were computed twice"
    assert_clean(folder)


def test_where_leases_do_not_work_the_work_is_done_twice_and_no_harm(tmp_path: Path) -> None:
    """Reference: a file system that lets everybody create the same file. Both compute, and the first result is kept."""
    with asking(tmp_path, 2, _create=always):
        until(lambda: len(begun(tmp_path)) == 2, "both are at work")
        (tmp_path / "gate").touch()
    texts = [got(tmp_path, i)["texts"] for i in range(2)]
    assert texts[0] == texts[1], f"each kept its own result: {texts}"
    assert texts[0][0] in {f"0 by {pid}" for _, pid in begun(tmp_path)}, f"the result is nobody's: {texts}"
    assert [len(got(tmp_path, i)["computed"]) for i in range(2)] == [1, 1], "one of them did not compute"
    assert_clean(tmp_path)


@pytest.mark.parametrize("reason", [errno.EPERM, errno.EOPNOTSUPP])
def test_where_there_are_no_links_leases_work_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    """Reference: a file system such as exFAT."""

    def link(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", link)
    assert Store(folder / "store")(note, 0, folder=folder).text == f"0 by {os.getpid()}"
    left(lease_of(folder, 1), ELSEWHERE)
    assert not LEASE._create(lease_of(folder, 1), ELSEWHERE | {"token": "mine"}), "a lease that is held was given away"
    lease_of(folder, 1).unlink()
    assert_clean(folder)


def test_a_lease_that_finds_no_room_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty lease would block everybody for STALE_S, since its owner is unknown."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        Store(folder / "store")(note, 0, folder=folder)
    assert_clean(folder)


def raising(error: type[BaseException]) -> Callable[..., Note]:
    @named("leases.raising")
    def stage(*, folder: Path) -> Note:
        held = [path for path in (folder / "store").rglob(".*.lease") if LEASE.owner_of(path)["pid"] == os.getpid()]
        assert len(held) == 1, f"the stage runs under {held}"
        raise error("from the stage")

    stage.__annotations__["return"] = Note
    return stage


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_stage_that_does_not_end_well_gives_its_lease_back(folder: Path, error: type[BaseException]) -> None:
    """Reference: no file is left, so the next one begins at once."""
    stage = raising(error)
    for _ in range(2):
        with pytest.raises(error, match="from the stage"):
            Store(folder / "store")(stage, folder=folder)
        assert_clean(folder)


@named("leases.unsaved")
def unsaved(*, folder: Path) -> Note:
    class Bad(Note):
        def save(self, folder: Path) -> None:
            raise OSError("disk full")

    return Bad("")


def test_a_result_that_cannot_be_written_gives_its_lease_back(folder: Path) -> None:
    """Reference: no file is left, neither the lease nor half a result."""
    with pytest.raises(OSError, match="disk full"):
        Store(folder / "store")(unsaved, folder=folder)
    assert_clean(folder)


def beating() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_the_owner_touches_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the time of the file, set back twice; the thread ends with the lease."""
    monkeypatch.setattr(LEASE, "BEAT_S", 0.01)
    path = tmp_path / "store" / "stage" / ".key.lease"
    with LEASE.lease(path, done=lambda: False) as mine:
        assert mine, "nobody else wanted it"
        for _ in range(2):
            os.utime(path, (0, 0))
            until(lambda: path.stat().st_mtime > 0, "the lease is touched")
    until(lambda: not beating(), "the thread ends")
    assert_clean(tmp_path)


def test_a_lease_that_was_taken_is_another_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the file of who took it, which is neither touched nor deleted."""
    monkeypatch.setattr(LEASE, "BEAT_S", 0.01)
    path = tmp_path / "store" / "stage" / ".key.lease"
    with LEASE.lease(path, done=lambda: False):
        beside = left(path.with_name("other"), ELSEWHERE)
        os.utime(beside, (0, 0))
        beside.rename(path)
        until(lambda: not beating(), "the thread sees that it was taken")
        assert path.stat().st_mtime == 0, "another one's lease was touched"
    assert json.loads(path.read_bytes()) == ELSEWHERE, "another one's lease was changed"


def test_an_error_of_the_file_system_does_not_stop_the_touching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the next touch. Network file systems fail now and then (ESTALE, EIO), in reading too."""
    monkeypatch.setattr(LEASE, "BEAT_S", 0.01)
    path, read, failed = tmp_path / "store" / "stage" / ".key.lease", Path.read_bytes, list[Any]()

    def failing(self: Path) -> bytes:
        if self == path and not failed:
            failed.append(threading.current_thread().name)
            raise OSError(116, "Stale file handle")
        return read(self)

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with LEASE.lease(path, done=lambda: False):
        monkeypatch.setattr(Path, "read_bytes", failing)
        until(lambda: failed, "the file system fails")
        assert failed == ["lease"], f"it failed for {failed}"
        time.sleep(0.05)
        assert beating(), "one error ended the touching, so others will take over from a process that lives"


def test_an_error_of_the_file_system_at_the_end_costs_no_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the result, which was published before."""
    read = Path.read_bytes

    def failing(self: Path) -> bytes:
        if self == lease_of(folder) and place_of(folder).exists():
            raise OSError(116, "Stale file handle")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", failing)
    assert Store(folder / "store")(note, 0, folder=folder).text == f"0 by {os.getpid()}"
