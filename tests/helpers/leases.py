"""A stage that waits at a gate, processes that request its result, and leases left by others."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from loguru import logger

from steer_heal.store import Artifact, Store
from steer_heal.store import stage as named
from steer_heal.store.keys import key_of

LEASE: Any = importlib.import_module("steer_heal.store.lease")  # the package's attribute `lease` is the function
SPAWN = multiprocessing.get_context("spawn")
NET_S = 60.0  # a safety net: nothing here waits that long unless it is broken
NEVER_S = 1e9
ELSEWHERE = {"host": "elsewhere", "place": "another boot", "pid": os.getpid(), "started": "1", "token": "theirs"}


@dataclass(frozen=True)
class Note(Artifact):
    """A text."""

    text: str

    def save(self, folder: Path) -> None:
        (folder / "note").write_text(self.text)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls((folder / "note").read_text())


@named("leases.note")
def note(value: int, *, folder: Path) -> Note:
    """Record the start, and continue once a file `gate` exists. The text names the process that made it."""
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
    """The answer of a file system on which the same file can be created again and again."""
    return True


def ask(folder: Path, n: int, values: range, settings: dict[str, Any], start: Any) -> None:
    """Request results in a process of its own, each at the same moment as the others, and record the answers."""
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
    """`n` processes that request the same results; none outlives the block."""
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
    """Value and process id of every computation that was started."""
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
    """The path of a result; its lease is the hidden file beside it."""
    return folder / "store" / "leases.note" / key_of("leases.note", [value])[0]


def lease_of(folder: Path, value: int = 0) -> Path:
    result = place_of(folder, value)
    return result.with_name(f".{result.name}.lease")


def left(path: Path, text: bytes | dict[str, Any]) -> Path:
    """A lease left by another process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())
    return path


def assert_clean(folder: Path) -> None:
    """Assert that only results are there: no lease, no scratch folder, nothing moved aside."""
    hidden = [str(path.relative_to(folder)) for path in (folder / "store").rglob(".*")]
    assert not hidden, f"{hidden} was left behind"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place for a store, with the gate of `note` open."""
    (tmp_path / "gate").touch()
    return tmp_path
