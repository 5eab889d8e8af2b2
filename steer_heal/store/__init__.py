"""Stage results on disk, stored under a hash of their inputs.

`store(function, *inputs, **runtime)`: the positional arguments define the result and form its key, together with the
stage's name and version; the keyword arguments set how it is computed and are not part of the key. A result's key
enters the keys of everything derived from it, so keys chain, and cells of a sweep share the results they have in
common.

    <root>/<stage>/<key>/            the result's files, and manifest.json, written last
    <root>/<stage>/.<key>.lease      the process that is computing it now
    <root>/<stage>/.<key>.partial    the checkpoint of a stage that saves one; .failed: the output of a failed stage
    <root>/<stage>/.writing-<key>-*  a result being written; .damaged-*: one moved aside because a checksum failed
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
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, ParamSpec, Self, TypeVar

from loguru import logger
from safetensors import SafetensorError

from steer_heal.store.checkpoint import Checkpoint
from steer_heal.store.keys import key_of, version
from steer_heal.store.lease import lease
from steer_heal.system.terminal import position


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A stage's result. `key` is set by the store: it is derived from the inputs, and later keys build on it."""

    key: str = dataclasses.field(default="", kw_only=True, compare=False)

    @property
    def fingerprint(self) -> str:
        """The key. Raises TypeError for a result that was not published by a store and so has no key."""
        if not self.key:
            raise TypeError(f"an unpublished {type(self).__name__} has no key; only the store's results can be inputs")
        return self.key

    def save(self, folder: Path) -> None:
        """Write the files of this artifact into an existing, empty folder."""
        raise NotImplementedError(type(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the files that `save` wrote."""
        raise NotImplementedError(cls)


A = TypeVar("A", bound=Artifact)
P = ParamSpec("P")


def stage(name: str) -> Callable[[Callable[P, A]], Callable[P, A]]:
    """Name a function as a stage: its results are stored under that name, which is part of their keys.

    The name stays the same when the function moves. When its code gives different results, raise `keys.VERSIONS`.
    """

    def named(function: Callable[P, A]) -> Callable[P, A]:
        function.stage = name  # type: ignore[attr-defined]
        return function

    return named


def stage_name(function: Callable[..., Any]) -> str:
    """The name set by `stage`, such as `heal.heal`. Raises TypeError for a function without one."""
    name = getattr(function, "stage", None)
    if not isinstance(name, str):
        raise TypeError(f"{function!r} is not a stage: name it with @stage(...)")
    return name


class Store:
    """A folder of results that any number of processes may use at once: each result is computed by one of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.computed: list[str] = []  # stages computed (not found) since this store was opened
        self.used: list[str] = []  # keys of all results returned, computed or found
        self.purposes: dict[str, str] = {}  # of each key: stage and position in the run, `heal.heal: round 0`
        self._served: list[tuple[str, str]] = []  # position and stage of results found and not logged yet
        self.seconds = 0.0  # time spent on keys, files, checksums and waiting for other processes; not on stages

    def __call__(self, function: Callable[P, A], /, *inputs: P.args, **how: P.kwargs) -> A:
        """Return the stage's result: read from disk if it is intact, computed and published otherwise.

        A stage with a parameter `checkpoint` receives one, to resume from the state that an earlier attempt saved.

        Raises TypeError for an argument that cannot be part of a key, and OSError if the store cannot be written.
        """
        begun, name = time.monotonic(), stage_name(function)
        key, prints = key_of(name, inputs)
        kind: type[A] = typing.get_type_hints(function)["return"]
        folder, computed = self.root / name / key, False
        if not _found(folder):
            with lease(folder.with_name(f".{key}.lease"), done=lambda: intact(folder)) as mine:
                if mine and not intact(folder):  # not published between the check and the lease
                    self.log_served()
                    logger.info("{}", _at(name))
                    logger.debug("computing {}", folder)
                    started = time.monotonic()
                    checkpoint = Checkpoint(folder.with_name(f".{key}.partial"))
                    given: dict[str, Any] = dict(how)
                    if "checkpoint" in inspect.signature(function).parameters:
                        given["checkpoint"] = checkpoint
                    artifact = function(*inputs, **given)
                    took = time.monotonic() - started
                    self.seconds -= took
                    self.computed.append(name)
                    computed = True
                    names = inspect.signature(function).parameters
                    publish(artifact, folder, {
                        "stage": name, "version": version(name), "inputs": dict(zip(names, prints, strict=False)),
                        "seconds": round(took, 3), "host": platform.node(), "how": _how(how),
                        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    })  # fmt: skip
                    checkpoint.drop()
        if not computed:
            logger.debug("{} {}: found", name, key)
            if key not in self.purposes:  # not one that this run has had before
                self._served.append((position(), name))
        self.used.append(key)
        said = self.purposes.get(key, "")
        self.purposes[key] = said if _at(name) in said.split("; ") else "; ".join(filter(None, (said, _at(name))))
        with suppress(OSError):  # the time of last use, for `gc`; another user's file cannot be touched
            os.utime(folder / "manifest.json")
        artifact = dataclasses.replace(kind.load(folder), key=key)
        self.seconds += time.monotonic() - begun
        return artifact

    def log_served(self) -> None:
        """Log in one line the stages whose results were found since the last such line, with their number if several.

        It is called before a stage is computed and at the end of a round.
        """
        if self._served:
            places = ", ".join(filter(None, dict.fromkeys(where.partition(",")[0] for where, _ in self._served)))
            counts = Counter(name for _, name in self._served)
            stages = ", ".join(name if n == 1 else f"{name} ({n})" for name, n in counts.items())
            logger.info("{}from the store: {}", f"{places}, " if places else "", stages)
        self._served.clear()

    def where(self, artifact: Artifact) -> Path | None:
        """The folder of a published artifact; None if it has been deleted since."""
        return next(self.root.glob(f"*/{artifact.key}"), None)


class Lazy(Generic[A]):
    """A result computed or read on demand, when it is called; its key counts as an input of the stage.

    If the stage's own result is found in the store, this one is never computed or read.
    """

    def __init__(self, store: Store, function: Callable[P, A], /, *inputs: P.args, **how: P.kwargs) -> None:
        self.fingerprint, _ = key_of(stage_name(function), inputs)
        self._get: Callable[[], A] = lambda: store(function, *inputs, **how)

    def __call__(self) -> A:
        return self._get()


def _at(name: str) -> str:
    """A stage and the position in the run, such as `eval.evaluate: round 0, healed, trait`."""
    return ": ".join(filter(None, (name, position())))


def _how(how: Mapping[str, Any]) -> dict[str, Any]:
    """Runtime settings and library versions: they affect rounding, which in bf16 may change a sampled token."""
    used = {name: value.model_dump(mode="json") for name, value in how.items() if hasattr(value, "model_dump")}
    return used | {name: metadata.version(name) for name in ("torch", "transformers", "peft")}


def publish(artifact: Artifact, folder: Path, about: dict[str, Any]) -> None:
    """Write to a temporary folder in the same parent, manifest last, and rename it into place.

    If another process was first, its result is kept and this one is discarded. A damaged folder is moved aside.
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
            if error.errno is not None and error.filename is None:  # raised by a write, which does not name the file
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
    """True if a result exists and every file matches its manifest."""
    return damage(folder) == ""


def _found(folder: Path) -> bool:
    """Return `intact(folder)`, and log a warning about damage."""
    if wrong := damage(folder):
        logger.warning("{}: {}; computing again", folder, wrong)
    return wrong == ""


def damage(folder: Path) -> str | None:
    """A description of the damage to a result: "" if it is intact, None if there is no manifest."""
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
