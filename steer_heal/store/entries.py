"""Contents of a store, read from its manifests alone: for listing and for deleting unused results."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_heal.store.keys import version
from steer_heal.store.lease import live

FORGOTTEN_S = 30 * 86400.0  # age at which a checkpoint, or the output of a failed stage, counts as left over
ABANDONED_S = 3600.0  # age at which a scratch folder without a held lease counts as left over


@dataclass(frozen=True)
class Entry:
    """One result. `manifest` is empty if it cannot be read, and then `bytes` is 0."""

    folder: Path
    manifest: dict[str, Any]
    used: float  # time of last use: the manifest's modification time, in seconds

    @property
    def stage(self) -> str:
        return self.folder.parent.name

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.manifest.get("files", {}).values())

    @property
    def outdated(self) -> bool:
        """True if the stage's code has a later version, so that no run can request this result."""
        return bool(self.manifest) and self.manifest["version"] < version(self.stage)


def entries(root: Path, stage: str | None = None) -> Iterator[Entry]:
    """Yield all results, sorted by stage and key."""
    for place in sorted(_folders(root)):
        if stage in (None, place.name):
            for folder in sorted(_folders(place)):
                yield _entry(folder)


def find(root: Path, prefix: str) -> list[Entry]:
    """The results whose key begins with `prefix`."""
    found = [folder for place in _folders(root) for folder in _folders(place) if folder.name.startswith(prefix)]
    return [_entry(folder) for folder in sorted(found)]


def leftovers(root: Path) -> list[Path]:
    """Paths that no process will use again: damaged folders, and scratch files and leases of dead processes."""
    found, now = list[Path](), time.time()
    for place in _folders(root):
        for path in sorted(place.glob(".*")):
            if path.name.startswith(".damaged-"):
                found.append(path)
            elif ".lease" in path.name:
                if not _held(path, now):
                    found.append(path)
            elif path.name.endswith((".partial", ".failed")):
                lease = path.with_suffix(".lease")
                if not _held(lease, now) and now - _touched(path) > FORGOTTEN_S:
                    found.append(path)
            elif path.name.startswith((".writing-", ".deleting-")) or ".partial-" in path.name:
                key = path.name.split(".")[1] if ".partial-" in path.name else path.name.split("-")[1]
                lease = place / f".{key}.lease"
                if not _held(lease, now) and now - _touched(path) > ABANDONED_S:
                    found.append(path)
    return found


def used_by_runs(runs: Path) -> set[str]:
    """Keys of every result referenced by a finished run below a folder. Raises ValueError for an unreadable run.

    `used` in result.json is an object by key; runs of earlier versions have a list of keys.
    """
    found = set[str]()
    for path in runs.rglob("result*.json"):
        try:
            found.update(json.loads(path.read_text(encoding="utf-8")).get("used", ()))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read, so the results it references are unknown: {error}") from error
    return found


def remove(path: Path) -> None:
    """Delete a file, or a folder atomically as seen by other processes that read the store."""
    if path.is_dir():
        aside = path.with_name(f".deleting-{uuid.uuid4().hex}")
        path.rename(aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Size in bytes of a file or of all files in a folder."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files)


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as found:
        return [Path(item.path) for item in found if not item.name.startswith(".") and item.is_dir()]


def _held(lease: Path, now: float) -> bool:
    """True if a process works under the lease: it would have touched the file recently."""
    return live(lease) and now - _touched(lease) < ABANDONED_S


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process deleted it
        return 0.0


def _entry(folder: Path) -> Entry:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        used = path.stat().st_mtime
    except (OSError, ValueError):
        return Entry(folder, {}, folder.stat().st_mtime)
    return Entry(folder, manifest if isinstance(manifest, dict) and "version" in manifest else {}, used)
