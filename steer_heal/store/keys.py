"""Store keys: hashes over the parts of the inputs that determine a result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VERSIONS: dict[str, int] = {
    "apart.strength": 2,
    "eval.evaluate": 3,
    "generate.generate": 3,
    "heal.drift.drift": 2,
    "heal.heal": 3,
    "steer.extract": 3,
}  # stage -> version, raised when its code gives different results; 1 unless listed


def version(stage: str) -> int:
    """The version of a stage's code."""
    return VERSIONS.get(stage, 1)


def key_of(stage: str, what: Sequence[Any]) -> tuple[str, list[Any]]:
    """The key of a stage's result, and the fingerprints of the arguments it is derived from."""
    prints = [fingerprint(value) for value in what]
    inputs = json.dumps([stage, version(stage), prints], sort_keys=True, allow_nan=False)
    return hashlib.sha256(inputs.encode()).hexdigest()[:24], prints


def fingerprint(value: Any) -> Any:
    """Convert a value to JSON. An object with its own `fingerprint` (an option, a result, a student) gives that.

    Raises TypeError for a type that has neither a fingerprint nor a JSON form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "fingerprint"):
        return value.fingerprint
    if dataclasses.is_dataclass(value):
        fields = {field.name: fingerprint(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [type(value).__qualname__, fields]
    if isinstance(value, Mapping):
        return {str(k): fingerprint(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [fingerprint(child) for child in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be part of a key")
