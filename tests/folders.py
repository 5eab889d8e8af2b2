"""Models in folders of their own, and ways to change what lies there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import composed

from steer_heal.model import Base, load


def from_folder(folder: Path | str, *overrides: str) -> Base:
    """The model in a folder, in float32."""
    return load(composed("model=hub", f"model.id={folder}", "model.dtype=float32", *overrides).model)


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
