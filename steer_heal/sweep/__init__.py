"""A sweep's folder: what was asked for, and how each cell fares. All of it is in files, so it can be followed later.

sweep.json                 the cells, the launcher and its jobs
.sweep.lease               the process that launches cells at the moment, or watches over those of its machine
multirun.yaml              the configuration that the cells have in common, as Hydra writes it
<cell>/.hydra/             a cell's own, composed when the sweep began: what changes in conf/ later does not reach it
<cell>/status.json         how it fares
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from steer_heal.config import Config, ConfigError
from steer_heal.store.lease import holder, lease, owner_of, take_away
from steer_heal.sweep.status import Status, looked_at, read, write
from steer_heal.system.process import describe, me

NAME, LEASE = "sweep.json", ".sweep.lease"


class Entry(Config):
    """One cell, as sweep.json has it."""

    folder: str  # below the sweep's
    overrides: tuple[str, ...]


class Job(Config):
    """Cells that are handed to Slurm together; task i of the array is cell i of them."""

    cells: tuple[str, ...]
    name: str = ""  # by which Slurm knows it too
    id: str | None = None  # its number, not yet known while it is submitted


class Record(Config):
    """What sweep.json holds."""

    command: tuple[str, ...]
    cwd: str
    launcher: dict[str, Any]  # `_target_` and fields
    began: str
    cells: tuple[Entry, ...]
    jobs: tuple[Job, ...] = ()


class Sweep:
    """A sweep's folder."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record

    @classmethod
    def create(cls, folder: Path, cells: Iterable[Entry], launcher: dict[str, Any]) -> Sweep:
        """Write sweep.json; an earlier one in the same folder is kept beside it as sweep.1.json and so on."""
        if (folder / NAME).exists():
            free = next(n for n in count(1) if not (folder / f"sweep.{n}.json").exists())
            (folder / NAME).rename(folder / f"sweep.{free}.json")
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        command = tuple(sys.argv)
        record = Record(command=command, cwd=os.getcwd(), launcher=launcher, began=began, cells=tuple(cells))
        sweep = cls(folder, record)
        sweep._write()
        return sweep

    @classmethod
    def open(cls, folder: Path) -> Sweep:
        """Raises ConfigError for what is no sweep's folder."""
        try:
            return cls(folder, Record.model_validate_json((folder / NAME).read_bytes()))
        except OSError as error:
            raise ConfigError(f"{folder}: not the folder of a sweep: {NAME}: {error.strerror}") from None
        except ValidationError as error:
            raise ConfigError(f"{folder / NAME} cannot be read: {str(error).splitlines()[0]}") from None

    def change(self, **fields: Any) -> None:
        """Set fields of sweep.json."""
        self.record = self.record.model_copy(update=fields)
        self._write()

    def _write(self) -> None:
        fresh = self.folder / f".{NAME}-{uuid.uuid4().hex}"
        try:
            fresh.write_text(self.record.model_dump_json(indent=1), encoding="utf-8")
            os.replace(fresh, self.folder / NAME)
        finally:
            fresh.unlink(missing_ok=True)

    @property
    def cells(self) -> list[str]:
        """Names of all cells, in order."""
        return [entry.folder for entry in self.record.cells]

    def place(self, cell: str) -> Path:
        """A cell's folder."""
        return self.folder / cell

    @property
    def places(self) -> list[Path]:
        """Their folders."""
        return [self.place(cell) for cell in self.cells]

    def status(self) -> dict[str, Status]:
        """How each cell fares, from its file alone."""
        return {cell: looked_at(self.place(cell)) for cell in self.cells}

    def wait_again(self, cells: Sequence[str]) -> None:
        """Cells that are about to be run, or run again: they wait."""
        for cell in cells:
            before = read(self.place(cell))
            write(self.place(cell), Status(state="waiting", attempt=before.attempt))

    def launched_by(self) -> dict[str, Any] | None:
        """The other process that launches cells now, or watches over those of its machine; None if none does."""
        return _launcher(self.folder)


@contextmanager
def launching(folder: Path) -> Iterator[None]:
    """Be the one that launches cells of the sweep in a folder. Raises ConfigError while another process is."""
    last = owner_of(folder / LEASE)
    if (owner := _launcher(folder)) is not None:
        raise ConfigError(f"{folder}: {describe(owner)} runs this sweep; wait for it, or cancel it first")
    if last is not None:  # which is gone
        take_away(folder / LEASE, last)
    with lease(folder / LEASE, done=lambda: False):
        yield


def _launcher(folder: Path) -> dict[str, Any] | None:
    owner = holder(folder / LEASE)
    return None if owner is None or owner | me() == owner else owner
