"""The lease: of all who want a result one computes it, whoever dies, stands still, or is on another machine."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from loguru import logger

from steer_heal.store import Artifact, Store, publish
from steer_heal.store.keys import key_of

LEASE: Any = importlib.import_module("steer_heal.store.lease")  # the package's attribute `lease` is the function
SPAWN = multiprocessing.get_context("spawn")
NET_S = 60.0  # a safety net: nothing here waits that long unless it is broken
NEVER_S = 1e9
ROUNDS = 12


@dataclass(frozen=True)
class Note(Artifact):
    """A text."""

    text: str

    def save(self, folder: Path) -> None:
        (folder / "note").write_text(self.text)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls((folder / "note").read_text())


def note(value: int, *, folder: Path) -> Note:
    """Record that it was begun, and go on once there is a file `gate`. The text tells who made it."""
    with (folder / "begun").open("a") as file:
        file.write(f"{value} {os.getpid()}\n")
    until(lambda: (folder / "gate").exists(), "the gate opens")
    return Note(f"{value} by {os.getpid()}")


def until(true: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + NET_S
    while not true():
        assert time.monotonic() < end, f"waited {NET_S:g} s in vain until {what}"
        time.sleep(0.005)


def always(*_: Any) -> bool:
    """What a file system says on which a file can be created again and again."""
    return True


def ask(folder: Path, n: int, values: range, settings: dict[str, Any], start: Any) -> None:
    """In a process of its own: ask for results, each at the same moment as the others, and write down what came."""
    for name, value in settings.items():
        setattr(LEASE, name, value)
    logger.remove()
    logger.add(folder / f"log-{n}", format="{message}")
    store, texts = Store(folder / "store"), []
    for value in values:
        start.wait(NET_S)
        texts.append(store(note, value, folder=folder).text)
    (folder / f"got-{n}").write_text(json.dumps({"texts": texts, "computed": store.computed}))


@contextmanager
def asking(folder: Path, n: int, values: range = range(1), first: int = 0, **settings: Any) -> Iterator[list[Any]]:
    """`n` processes that ask for the same; none outlives the block."""
    start = SPAWN.Barrier(n)
    quick = {"POLL_S": 0.02, "STALE_S": NEVER_S} | settings
    processes = [SPAWN.Process(target=ask, args=(folder, first + i, values, quick, start)) for i in range(n)]
    for process in processes:
        process.start()
    try:
        yield processes
        for process in processes:
            process.join(NET_S)
    finally:
        for process in processes:
            process.kill()
            process.join()


def begun(folder: Path) -> list[tuple[int, int]]:
    """Value and process id of every computation that was begun."""
    path = folder / "begun"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(value), int(pid)) for value, pid in (line.split() for line in lines)]


def said(folder: Path, n: int) -> str:
    path = folder / f"log-{n}"
    return path.read_text() if path.exists() else ""


def got(folder: Path, n: int) -> Any:
    assert (folder / f"got-{n}").exists(), f"process {n} ended without a result; it said {said(folder, n)!r}"
    return json.loads((folder / f"got-{n}").read_text())


def place_of(folder: Path, value: int = 0) -> Path:
    """Where a result is filed; its lease is the hidden file beside it."""
    return folder / "store" / "test_lease.note" / key_of("test_lease.note", [value])[0]


def lease_of(folder: Path, value: int = 0) -> Path:
    result = place_of(folder, value)
    return result.with_name(f".{result.name}.lease")


def left(path: Path, text: bytes | dict[str, Any]) -> Path:
    """A lease as somebody else left it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())
    return path


def assert_clean(folder: Path) -> None:
    """Nothing but results: no lease, no scratch folder, nothing set aside."""
    hidden = [str(path.relative_to(folder)) for path in (folder / "store").rglob(".*")]
    assert not hidden, f"{hidden} was left behind"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place for a store, with the gate of `note` open."""
    (tmp_path / "gate").touch()
    return tmp_path


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
    """Reference: one heir, as a rule: both may believe to be it, and then the work is done twice and no harm."""
    dead = LEASE._me() | {"started": "long ago", "token": "dead"}
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
    """Reference: a file system that lets everybody create the same file. Both compute, the first result stands."""
    with asking(tmp_path, 2, _create=always):
        until(lambda: len(begun(tmp_path)) == 2, "both are at work")
        (tmp_path / "gate").touch()
    texts = [got(tmp_path, i)["texts"] for i in range(2)]
    assert texts[0] == texts[1], f"each kept its own result: {texts}"
    assert texts[0][0] in {f"0 by {pid}" for _, pid in begun(tmp_path)}, f"the result is nobody's: {texts}"
    assert [len(got(tmp_path, i)["computed"]) for i in range(2)] == [1, 1], "one of them did not compute"
    assert_clean(tmp_path)


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


ELSEWHERE = {"host": "elsewhere", "place": "another boot", "pid": os.getpid(), "started": "1", "token": "theirs"}
EPOCHS = {"now": time.time(), "in the far future": 4e9, "in 1970": 0.0}


@pytest.mark.parametrize("epoch", EPOCHS)
def test_a_process_of_another_machine_is_waited_for_while_it_touches_its_lease(
    folder: Path, clock: Callable[..., Clock], warnings: list[str], epoch: str
) -> None:
    """Reference: a time of STALE_S since the last touch by the waiter's clock; whatever the time of the file is."""
    path, touched = left(lease_of(folder), ELSEWHERE), []
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
    assert store.computed == ["test_lease.note"], "not computed"
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
    owner = LEASE._me() | {"pid": child.pid, "started": LEASE._started(child.pid), "token": "theirs"}
    assert not LEASE._dead(owner), "a process that runs counts as dead"
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
    me, waited, store = LEASE._me(), clock(), Store(folder / "store")
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
    """Reference: STALE_S. It lives, but does not touch its lease: it stands still, or lost sight of the store."""
    path = left(lease_of(folder), LEASE._me() | {"token": "another thread's"})
    assert LEASE.live(path), "a process that lives counts as gone"
    waited = clock()
    Store(folder / "store")(note, 0, folder=folder)
    assert waited.now > LEASE.STALE_S, f"taken over after {waited.now} s"
    assert not LEASE.live(path), "held after its end"
    assert_clean(folder)


def raising(error: type[BaseException]) -> Callable[..., Note]:
    def stage(*, folder: Path) -> Note:
        held = [path for path in (folder / "store").rglob(".*.lease") if LEASE._owner(path)["pid"] == os.getpid()]
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
    path, read, failed = tmp_path / "store" / "stage" / ".key.lease", Path.read_bytes, []

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
    with pytest.raises(OSError, match=r"test_lease\.note"):
        Store(folder / "store")(note, 0, folder=folder)
    assert waited.now == 0, f"waited {waited.now} s"
    assert not begun(folder), "the stage ran for nothing"
