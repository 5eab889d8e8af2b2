"""What the store holds for the cells of a sweep before it starts: the loop is followed over stored results alone."""

from __future__ import annotations

import dataclasses
import math
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from loguru import logger

from steer_heal.artifacts import RoundFailed
from steer_heal.experiment import Experiment
from steer_heal.loop import run
from steer_heal.store import Artifact, Store, stage_name
from steer_heal.store.keys import key_of
from steer_heal.system.terminal import bar, counted
from steer_heal.tracker import Tracker

LOOK_S = 10.0  # seconds after which the remaining cells are not looked at
SMALL, KEPT = 2**20, 64  # bytes of a result that is kept in memory for the next cells, and how many are
A = TypeVar("A", bound=Artifact)
P = ParamSpec("P")


class NotStored(Exception):
    """The store lacks a result; the message is its stage."""


class _Reader(Store):
    """A store that computes nothing. Checksums are left to the run."""

    def __init__(self, root: Path, read: dict[str, Artifact]) -> None:
        super().__init__(root)
        self.read = read

    def __call__(self, function: Callable[P, A], /, *inputs: P.args, **how: P.kwargs) -> A:
        """Return the stage's stored result. Raises NotStored."""
        name = stage_name(function)
        key, _ = key_of(name, inputs)
        if key in self.read:
            return self.read[key]  # type: ignore[return-value]
        folder = self.root / name / key
        if not (folder / "manifest.json").is_file():
            raise NotStored(name)
        kind: type[A] = typing.get_type_hints(function)["return"]
        artifact = dataclasses.replace(kind.load(folder), key=key)
        if sum(file.stat().st_size for file in folder.iterdir()) < SMALL:
            if len(self.read) >= KEPT:
                self.read.clear()
            self.read[key] = artifact
        return artifact


class _Untracked(Tracker):
    """A tracker that records nothing."""

    def __init__(self) -> None:
        self.mirror = None

    def log(self, row: Mapping[str, float | str]) -> None:
        """Drop a row."""

    def records(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Drop the rows of a file."""


def next_stage(exp: Experiment, read: dict[str, Artifact]) -> str:
    """The first stage that a cell has to compute; empty if the store holds everything, "unknown" if that fails.

    Loads no weights. `read` keeps small results for the next cell.
    """
    try:
        run(exp, _Reader(exp.runtime.store, read), _Untracked())
    except NotStored as missing:
        return str(missing)
    except RoundFailed:
        return ""  # the stored results show that the cell ends there
    except Exception:  # noqa: BLE001  a user's option or a damaged result, which a preview must not make fatal
        return "unknown"
    return ""


def preview(experiments: Iterable[Experiment]) -> str:
    """A sentence on how many cells the store holds entirely, and where the others continue; empty if nothing is known,
    as on a machine without the device that they need. Takes LOOK_S at most.
    """
    cells, found, read = list(experiments), Counter[str](), dict[str, Artifact]()
    end = math.inf
    logger.disable("steer_heal")
    try:
        with bar("looking into the store", len(cells)) as advance:
            for exp in cells:
                if time.monotonic() > end:
                    break
                found[next_stage(exp, read)] += 1
                advance(1)
                end = min(end, time.monotonic() + LOOK_S)  # the first one also imports what the run needs
    finally:
        logger.enable("steer_heal")
    return "" if found.keys() <= {"unknown"} else _told(found, len(cells))


def _told(found: Mapping[str, Any], cells: int) -> str:
    whole, looked = found.get("", 0), sum(found.values())
    of = f"of the first {looked} cells" if looked < cells else f"of {counted(cells, 'cell')}"
    rest = sorted(((stage, n) for stage, n in found.items() if stage), key=lambda one: -one[1])
    if not rest:
        return f"the store holds all results {of}"
    told = ", ".join(f"{stage} ({n})" for stage, n in rest)
    return f"the store holds all results of {whole} {of}; next in the others: {told}"
