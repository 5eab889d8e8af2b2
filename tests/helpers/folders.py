"""Models in folders of their own, and functions that change their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.compose import composed
from steer_heal.lm.base import Base
from steer_heal.model import load
from steer_heal.model.tiny import TEMPLATE

# A template without a system role, as Gemma's is.
RAISING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)


def from_folder(folder: Path | str, *overrides: str) -> Base:
    """The model in a folder, in float32."""
    return load(composed("model=hub", f"model.id={folder}", "model.dtype=float32", *overrides).model)


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
