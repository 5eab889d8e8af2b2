"""Stage results on disk, kept under a hash of what went in.

`store(stage, *what, **how)`: the positional arguments define the result and make its key, together with the stage's
name and version; the keyword arguments say how it is carried out and do not. A result's key enters the keys of what
is made from it, so keys chain, and cells of a sweep share whatever they have in common.

    <root>/<stage>/<key>/            the result's files, and manifest.json, written last
    <root>/<stage>/.<key>.lease      who is computing it now
    <root>/<stage>/.<key>.partial    how far a stage that saves that has come; .failed: what one that failed had
    <root>/<stage>/.writing-<key>-*  a result on its way; .damaged-*: one set aside because it was no longer whole
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import inspect
import json
import os
import platform
import tempfile
import time
import typing
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from loguru import logger
from safetensors import SafetensorError

from steer_heal.store.keys import key_of, version
from steer_heal.store.lease import lease
from steer_heal.store.partial import Partial


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A stage's result. `key` is given by the store: what went in decides it, and later keys build on it."""

    key: str = dataclasses.field(default="", kw_only=True, compare=False)

    @property
    def fingerprint(self) -> str:
        """The key. Raises TypeError for a result that the store does not know, which has none."""
        if not self.key:
            raise TypeError(f"an unpublished {type(self).__name__} has no key; only the store's results can be inputs")
        return self.key

    def save(self, folder: Path) -> None:
        """Write the files of this artifact into an existing, empty folder."""
        raise NotImplementedError(type(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read back what `save` wrote."""
        raise NotImplementedError(cls)


A = TypeVar("A", bound=Artifact)


class Store:
    """A folder of results, which any number of processes may use at once: each result is computed by one of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.computed: list[str] = []  # stages computed, not found, since this store was opened
        self.used: list[str] = []  # keys of all results that it gave, computed or found
        self.seconds = 0.0  # spent on keys, files, checksums and waiting for other processes; not on stages

    def __call__(self, stage: Callable[..., A], *what: Any, **how: Any) -> A:
        """The stage's result: read back if it is there whole, computed and published otherwise.

        Raises TypeError for an argument that cannot be part of a key, and OSError where nothing can be written.
        """
        begun, name = time.monotonic(), stage_name(stage)
        key, prints = key_of(name, what)
        kind: type[A] = typing.get_type_hints(stage)["return"]
        folder = self.root / name / key
        if not _whole(folder):
            with lease(folder.with_name(f".{key}.lease"), done=lambda: intact(folder)) as mine:
                if mine and not intact(folder):  # nobody published it between the look and the lease
                    logger.info("{}", name)
                    logger.debug("computing {}", folder)
                    started = time.monotonic()
                    partial = Partial(folder.with_name(f".{key}.partial"))
                    goes_on = {"partial": partial} if "partial" in inspect.signature(stage).parameters else {}
                    artifact = stage(*what, **how, **goes_on)
                    took = time.monotonic() - started
                    self.seconds -= took
                    self.computed.append(name)
                    inputs = dict(zip(inspect.signature(stage).parameters, prints, strict=False))
                    publish(artifact, folder, {
                        "stage": name, "version": version(name), "inputs": inputs,
                        "seconds": round(took, 3), "host": platform.node(), "how": _how(how),
                        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    })  # fmt: skip
                    partial.drop()
        else:
            logger.debug("{} {}: found", name, key)
        self.used.append(key)
        with suppress(OSError):  # when it was last of use, for `gc`; another user's file cannot be touched
            os.utime(folder / "manifest.json")
        artifact = dataclasses.replace(kind.load(folder), key=key)
        self.seconds += time.monotonic() - begun
        return artifact

    def where(self, artifact: Artifact) -> Path | None:
        """The folder of a published artifact; None if somebody deleted it meanwhile."""
        return next(self.root.glob(f"*/{artifact.key}"), None)


class Later(Generic[A]):
    """A result that a stage may ask for: it counts as an input by its key, and is computed or read when it is called.

    What is served from the store then never asks for it.
    """

    def __init__(self, store: Store, stage: Callable[..., A], *what: Any, **how: Any) -> None:
        self.fingerprint, _ = key_of(stage_name(stage), what)
        self._get: Callable[[], A] = lambda: store(stage, *what, **how)

    def __call__(self) -> A:
        return self._get()


def _how(how: dict[str, Any]) -> dict[str, Any]:
    """What a result was computed with: it decides rounding, which in bf16 may flip a sampled token."""
    used = {name: value.model_dump(mode="json") for name, value in how.items() if hasattr(value, "model_dump")}
    return used | {name: metadata.version(name) for name in ("torch", "transformers", "peft")}


def stage_name(stage: Callable[..., Any]) -> str:
    """What a stage's results are filed under: `heal.heal`, `steer.extract`."""
    return f"{stage.__module__.removeprefix('steer_heal.')}.{stage.__name__}"


def publish(artifact: Artifact, folder: Path, about: dict[str, Any]) -> None:
    """Write to a temporary folder beside the place, manifest last, and rename it into place.

    If another process was first, its result stands and this one is dropped. A damaged folder is moved aside.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".writing-{folder.name}-") as scratch:
        fresh = Path(scratch) / folder.name
        fresh.mkdir()
        try:
            artifact.save(fresh)
            files = {f.name: {"sha256": _sha256(f), "bytes": f.stat().st_size} for f in sorted(fresh.iterdir())}
            (fresh / "manifest.json").write_text(json.dumps(about | {"files": files}, indent=1), encoding="utf-8")
        except SafetensorError as error:
            raise OSError(f"{folder}: {error}") from error
        except OSError as error:
            if error.errno is not None and error.filename is None:  # of a write
                error.filename = str(folder)
            raise
        while True:
            try:
                os.rename(fresh, folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if intact(folder):
                    return
            with suppress(FileNotFoundError):  # another process moved it first
                folder.rename(Path(tempfile.mkdtemp(dir=folder.parent, prefix=".damaged-")) / folder.name)


def intact(folder: Path) -> bool:
    """Whether a result is there with every file as its manifest says."""
    return damage(folder) == ""


def _whole(folder: Path) -> bool:
    """`intact`, with a word about damage."""
    if wrong := damage(folder):
        logger.warning("{}: {}; computing again", folder, wrong)
    return wrong == ""


def damage(folder: Path) -> str | None:
    """What is wrong with a result: nothing (""), or in words; None where there is none."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None
    try:
        files: dict[str, dict[str, Any]] = json.loads(manifest.read_bytes())["files"]
        wrong = [
            name
            for name, file in files.items()
            if not (folder / name).is_file() or _sha256(folder / name) != file["sha256"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    return f"{', '.join(wrong)} does not match its checksum" if wrong else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
