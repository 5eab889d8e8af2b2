"""A copy of each cell's configuration as it was composed when the sweep began, from which a lost one is made again."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

from steer_heal.system.files import replacing

NAME = "cells.zip"
PARTS = tuple(f".hydra/{part}.yaml" for part in ("config", "hydra", "overrides"))


def keep(folder: Path, cells: Iterable[str]) -> None:
    """Add the configuration of cells to the archive in a sweep's folder; it is replaced in one step. Raises OSError."""
    with replacing(folder / NAME) as fresh:
        if (folder / NAME).exists():
            shutil.copyfile(folder / NAME, fresh)
        with zipfile.ZipFile(fresh, "a", zipfile.ZIP_DEFLATED) as archive:
            held = set(archive.namelist())
            for cell in cells:
                for part in PARTS:
                    if f"{cell}/{part}" not in held and (folder / cell / part).is_file():
                        archive.write(folder / cell / part, f"{cell}/{part}")


def held(folder: Path) -> set[str]:
    """The cells in the archive of a sweep; none if there is no archive, or none that can be read."""
    try:
        with zipfile.ZipFile(folder / NAME) as archive:
            return {name.removesuffix(f"/{PARTS[0]}") for name in archive.namelist() if name.endswith(PARTS[0])}
    except (OSError, zipfile.BadZipFile):
        return set()


def lacking(folder: Path, cell: str) -> list[str]:
    """The files of a cell's configuration that are missing or empty."""
    return [part for part in PARTS if not _size(folder / cell / part)]


def restore(folder: Path, cell: str) -> list[str]:
    """Write the files of a cell's configuration that are missing or empty; return those that still are. Raises OSError.

    A file with content stays as it is, also one that was edited.
    """
    if cell in held(folder):
        with zipfile.ZipFile(folder / NAME) as archive:
            for part in lacking(folder, cell):
                place = folder / cell / part
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    content = archive.read(f"{cell}/{part}")
                except (KeyError, zipfile.BadZipFile):  # not kept, or damaged since
                    continue
                with replacing(place) as fresh:
                    fresh.write_bytes(content)
    return lacking(folder, cell)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
