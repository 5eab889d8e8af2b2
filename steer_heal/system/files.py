"""Files that are replaced in one step, so that a reader, or a process that is killed, never meets half of one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside a file to write to, which takes the file's place at the end; on failure it is removed.

    Raises OSError, naming the file: a write that fails does not name one.
    """
    fresh = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        yield fresh
        os.replace(fresh, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        fresh.unlink(missing_ok=True)
