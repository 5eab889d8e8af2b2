"""What a long stage has done so far, so that a killed or failed one need not begin again."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from steer_heal.store import Artifact


class Partial:
    """One file beside a stage's result to be, replaced as the stage goes on and gone when its result is published.

    The stage decides what it holds. It is begun with its own checksum, so that what is not whole is not gone on from.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._saved = path, time.monotonic()

    def age(self) -> float:
        """Seconds since it was last saved, or since the stage began."""
        return time.monotonic() - self._saved

    def save(self, data: bytes) -> None:
        """Replace what was saved. Raises OSError where that cannot be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f"{self.path.name}-{uuid.uuid4().hex}")  # as readable as results, unlike tempfile's
        try:
            fresh.write_bytes(hashlib.sha256(data).digest() + data)
            os.replace(fresh, self.path)
        finally:
            fresh.unlink(missing_ok=True)  # half of one on a full disk
        self._saved = time.monotonic()

    def load(self) -> bytes | None:
        """What was saved last; None where there is nothing, or nothing whole."""
        try:
            whole = self.path.read_bytes()
        except FileNotFoundError:
            return None
        digest, data = whole[:32], whole[32:]
        if hashlib.sha256(data).digest() != digest:
            logger.warning("{} does not match its checksum; beginning again", self.path)
            return None
        return data

    def keep(self, artifact: Artifact) -> Path:
        """Write what a stage that cannot go on has to show for itself; where it is. One kept earlier is replaced."""
        folder = self.path.with_suffix(".failed")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        artifact.save(folder)
        return folder

    def drop(self) -> None:
        """There is a result now."""
        with suppress(FileNotFoundError):
            self.path.unlink()
