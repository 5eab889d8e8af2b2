"""Saved state of a long stage, so that a killed or failed stage need not start from scratch."""

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


class Checkpoint:
    """One file beside a stage's future result, replaced as the stage runs and deleted once the result is published.

    The stage decides its content. The file starts with a checksum, so that a damaged file is not resumed from.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._saved = path, time.monotonic()

    def age(self) -> float:
        """Seconds since the last save, or since the stage began."""
        return time.monotonic() - self._saved

    def save(self, data: bytes) -> None:
        """Replace the saved bytes. Raises OSError if the file cannot be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The usual permissions, so that it is as readable as results are; tempfile would make it private.
        fresh = self.path.with_name(f"{self.path.name}-{uuid.uuid4().hex}")
        try:
            fresh.write_bytes(hashlib.sha256(data).digest() + data)
            os.replace(fresh, self.path)
        finally:
            fresh.unlink(missing_ok=True)  # a partial file is left on a full disk
        self._saved = time.monotonic()

    def load(self) -> bytes | None:
        """The bytes saved last; None if there are none, or if the file is damaged."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        digest, data = content[:32], content[32:]
        if hashlib.sha256(data).digest() != digest:
            logger.warning("{} does not match its checksum; starting from scratch", self.path)
            return None
        return data

    def keep(self, artifact: Artifact) -> Path:
        """Write the output of a stage that cannot continue, and return its folder. An earlier one is replaced."""
        folder = self.path.with_suffix(".failed")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        artifact.save(folder)
        return folder

    def drop(self) -> None:
        """Delete the checkpoint, because the result is published."""
        with suppress(FileNotFoundError):
            self.path.unlink()
