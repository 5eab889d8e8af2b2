"""The summary of a walk in docs/models.md."""

from __future__ import annotations

from typing import Any


def write_docs(rows: list[dict[str, Any]]) -> None:
    """Write."""
