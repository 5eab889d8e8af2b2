"""A sweep's folder: the request and each cell's status, all stored in files so that any process can follow it.

sweep.json                 the cells, the launcher and its jobs
cells.zip                  a copy of each cell's configuration, from which `resubmit` makes a deleted one again
.sweep.lease               the process that is launching cells, or that runs them on its machine
multirun.yaml              the configuration that the cells have in common, as Hydra writes it
<cell>/.hydra/             a cell's configuration, composed when the sweep began: later edits of conf/ do not affect it
<cell>/status.json         the cell's status
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from steer_heal.config import Config, ConfigError
from steer_heal.config.overrides import differing
from steer_heal.store.lease import holder, lease, owner_of, take_away
from steer_heal.sweep import archive
from steer_heal.sweep.status import Status, probe_status, read, seconds_spent, write
from steer_heal.system.files import replacing
from steer_heal.system.process import current_process, describe

NAME, LEASE = "sweep.json", ".sweep.lease"


class Entry(Config):
    """One cell in sweep.json."""

    folder: str  # relative to the sweep's
    overrides: tuple[str, ...]


class Job(Config):
    """Cells submitted to Slurm as one array; task i of the array runs cell i."""

    cells: tuple[str, ...]
    name: str = ""  # also its name in Slurm
    id: str | None = None  # its number in Slurm, unknown until it is submitted


class Record(Config):
    """The content of sweep.json."""

    command: tuple[str, ...]
    cwd: str
    launcher: dict[str, Any]  # `_target_` and fields
    began: str
    cells: tuple[Entry, ...]
    jobs: tuple[Job, ...] = ()


class Sweep:
    """A sweep, read from and written to its folder."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record

    @classmethod
    def create(cls, folder: Path, cells: Iterable[Entry], launcher: dict[str, Any]) -> Sweep:
        """Write sweep.json, and copies of the cells, whose folders exist.

        An earlier sweep in the same folder is kept beside it as sweep.1.json and cells.1.zip, and so on.
        """
        cells = tuple(cells)
        if (folder / NAME).exists():
            free = next(n for n in count(1) if not (folder / f"sweep.{n}.json").exists())
            (folder / NAME).rename(folder / f"sweep.{free}.json")
            if (folder / archive.NAME).exists():
                (folder / archive.NAME).rename(folder / f"cells.{free}.zip")
        archive.keep(folder, [cell.folder for cell in cells])
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        command = tuple(sys.argv)
        record = Record(command=command, cwd=os.getcwd(), launcher=launcher, began=began, cells=cells)
        sweep = cls(folder, record)
        sweep._write()
        return sweep

    @classmethod
    def open(cls, folder: Path) -> Sweep:
        """Read a sweep from its folder. Raises ConfigError if it is not the folder of a sweep."""
        try:
            return cls(folder, Record.model_validate_json((folder / NAME).read_bytes()))
        except OSError as error:
            raise ConfigError(f"{folder}: not the folder of a sweep: {NAME}: {error.strerror}") from None
        except ValidationError as error:
            raise ConfigError(f"{folder / NAME} cannot be read: {str(error).splitlines()[0]}") from None

    def add(self, cells: Iterable[Entry]) -> None:
        """Add further cells, whose folders exist."""
        cells = tuple(cells)
        archive.keep(self.folder, [cell.folder for cell in cells])
        self.change(cells=(*self.record.cells, *cells))

    def change(self, **fields: Any) -> None:
        """Set fields of sweep.json."""
        self.record = self.record.model_copy(update=fields)
        self._write()

    def _write(self) -> None:
        with replacing(self.folder / NAME) as fresh:
            fresh.write_text(self.record.model_dump_json(indent=1), encoding="utf-8")

    @property
    def cells(self) -> list[str]:
        """Names of all cells, in order."""
        return [entry.folder for entry in self.record.cells]

    def place(self, cell: str) -> Path:
        """A cell's folder."""
        return self.folder / cell

    def label(self, cell: str) -> str:
        """A cell's name for people: what differs in it, and its folder."""
        own = _differences(self.record.cells).get(cell)
        return f"{own} ({cell})" if own else cell

    @property
    def places(self) -> list[Path]:
        """The folders of all cells, in order."""
        return [self.place(cell) for cell in self.cells]

    def status(self) -> dict[str, Status]:
        """The status of each cell, from its file alone; for one whose folder is missing, with what can be done."""
        found = {cell: probe_status(self.place(cell)) for cell in self.cells}
        if missing := [cell for cell, status in found.items() if status.state == "missing"]:
            copied = archive.held(self.folder)
            for cell in missing:
                whole = cell in copied or not archive.lacking(self.folder, cell)
                todo = "resubmit makes it again" if whole else self.anew(cell)
                found[cell] = found[cell].model_copy(update={"message": f"{found[cell].message}; {todo}"})
        return found

    def anew(self, cell: str) -> str:
        """How to run a cell of which the sweep has no copy."""
        (given,) = (entry.overrides for entry in self.record.cells if entry.folder == cell)
        place = str(self.place(cell).resolve())
        place = place if re.fullmatch(r"[\w/.:+-]+", place) else f"'{place}'"
        command = shlex.join(["python", "-m", "steer_heal.main", *given, f"hydra.run.dir={place}"])
        return f"there is no copy of its configuration; in {self.record.cwd}, with the conf/ of today: {command}"

    def wait_again(self, cells: Sequence[str]) -> None:
        """Set cells that are about to be run, or run again, to waiting."""
        for cell in cells:
            before = read(self.place(cell))
            seconds = seconds_spent(self.place(cell), before)
            write(self.place(cell), Status(state="waiting", attempt=before.attempt, seconds=seconds))

    def launched_by(self) -> dict[str, Any] | None:
        """The other process that is launching or running cells now; None if there is none."""
        return _launcher(self.folder)


@functools.lru_cache(maxsize=4)
def _differences(cells: tuple[Entry, ...]) -> dict[str, str]:
    own = differing([cell.overrides for cell in cells])
    return {cell.folder: " ".join(overrides) for cell, overrides in zip(cells, own, strict=True)}


@contextmanager
def launching(folder: Path) -> Iterator[None]:
    """Hold the exclusive right to launch a sweep's cells. Raises ConfigError if another process holds it."""
    last = owner_of(folder / LEASE)
    if (owner := _launcher(folder)) is not None:
        raise ConfigError(f"{folder}: {describe(owner)} runs this sweep; wait for it, or cancel it first")
    if last is not None:  # the process is gone
        take_away(folder / LEASE, last)
    with lease(folder / LEASE, done=lambda: False):
        yield


def _launcher(folder: Path) -> dict[str, Any] | None:
    owner = holder(folder / LEASE)
    return None if owner is None or owner | current_process() == owner else owner
