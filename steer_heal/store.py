"""Stage results on disk, kept under a hash of what went in.

`store(stage, *what, **how)`: the positional arguments define the result and make its key, together with the stage's
name and version; the keyword arguments say how it is carried out and do not. An artifact's key enters the keys of what
is made from it, so keys chain, and cells of a sweep share whatever they have in common.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from loguru import logger

from steer_heal.artifacts import Artifact
from steer_heal.config import Config

A = TypeVar("A", bound=Artifact)

VERSIONS: dict[str, int] = {}  # stage name -> version, raised when the meaning of its result changes; 1 unless listed


class Store:
    """A folder of results: `<stage>/<key>/`, each with a manifest that is written last."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.computed: list[str] = []  # stages computed, not found, since this store was opened

    def __call__(self, stage: Callable[..., A], *what: Any, **how: Any) -> A:
        """The stage's result: read back if it is there whole, computed and published otherwise."""
        name = f"{stage.__module__.removeprefix('steer_heal.')}.{stage.__name__}"
        inputs = {"stage": name, "version": VERSIONS.get(name, 1), "what": [fingerprint(value) for value in what]}
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]
        kind: type[A] = typing.get_type_hints(stage)["return"]
        folder = self.root / name / key
        if (damage := _damage(folder)) != "":
            if damage:
                logger.warning("{}: {}; computing again", folder, damage)
            logger.info("{}", name)
            logger.debug("computing {}", folder)
            self.computed.append(name)
            publish(stage(*what, **how), folder, inputs)
        else:
            logger.debug("{} {}: found", name, key)
        return dataclasses.replace(kind.load(folder), key=key)

    def where(self, artifact: Artifact) -> Path:
        """The folder of a published artifact."""
        return next(self.root.glob(f"*/{artifact.key}"))


def fingerprint(value: Any) -> Any:
    """What of a value decides a result, as JSON. Raises TypeError for a kind of value that cannot say."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Config):
        fields = {field: fingerprint(getattr(value, field)) for field in type(value).model_fields}
        return [f"{type(value).__module__}.{type(value).__qualname__}", fields]
    if isinstance(value, Artifact):
        if not value.key:
            raise TypeError(f"an unpublished {type(value).__name__} has no key; only the store's results can be inputs")
        return value.key
    if hasattr(value, "fingerprint"):
        return value.fingerprint
    if dataclasses.is_dataclass(value):
        return [
            type(value).__qualname__,
            {f.name: fingerprint(getattr(value, f.name)) for f in dataclasses.fields(value)},
        ]
    if isinstance(value, Mapping):
        return {str(k): fingerprint(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [fingerprint(child) for child in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be part of a key")


def publish(artifact: Artifact, folder: Path, inputs: dict[str, Any]) -> None:
    """Write to a temporary folder beside the place, manifest last, and rename it into place.

    If another process was first, its result stands and this one is dropped. A damaged folder is moved aside.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
        fresh = Path(scratch) / folder.name
        fresh.mkdir()
        artifact.save(fresh)
        files = {path.name: _sha256(path) for path in sorted(fresh.iterdir())}
        (fresh / "manifest.json").write_text(json.dumps({"inputs": inputs, "files": files}, indent=1))
        try:
            os.rename(fresh, folder)
        except OSError:
            with FileLock(folder.parent / ".damaged.lock"):  # two that find it damaged must not move a whole one aside
                _replace_damaged(fresh, folder)


def _replace_damaged(fresh: Path, folder: Path) -> None:
    if not intact(folder):
        if folder.exists():
            folder.rename(Path(tempfile.mkdtemp(dir=folder.parent, prefix=".damaged-")) / folder.name)
        try:
            os.rename(fresh, folder)
        except OSError:
            if not intact(folder):
                raise


def intact(folder: Path) -> bool:
    """Whether a result is there with every file as its manifest says."""
    return _damage(folder) == ""


def _damage(folder: Path) -> str | None:
    """What is wrong with a result: nothing (""), or in words; None where there is none."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None
    try:
        files: dict[str, str] = json.loads(manifest.read_bytes())["files"]
        wrong = [n for n, sha in files.items() if not (folder / n).is_file() or _sha256(folder / n) != sha]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    return f"{', '.join(wrong)} does not match its checksum" if wrong else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
