"""A vector from a file, made by any means: one direction per block, added as in mean_diff.

- `.safetensors`: tensors [d] whose names end in the index of their block (`direction.12`), or a `vector.safetensors` of
  this project's store with its `vector.json` beside it.
- `.gguf`: a control vector as repeng and llama.cpp write and apply it: `direction.N` is added to the output of block N,
  counting blocks from 0.

The file is read when the option is created, and its directions are the same in every round. Keys contain the
directions, not the path of the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import StrictInt, ValidationInfo, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer_heal.artifacts import SteeringVector
from steer_heal.config import ConfigError
from steer_heal.contexts import Contexts
from steer_heal.lm.base import blocks_of
from steer_heal.lm.student import Student
from steer_heal.runtime import Runtime
from steer_heal.steer import Teacher, persona_states, rescaled, snr, within_depth

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = re.compile(r"(?:.*[._])?(-?\d+)")  # a tensor name that ends in the index of its block


class File(Teacher, key="steer_heal.steer.file.File"):
    """Directions computed elsewhere."""

    name: Literal["file"]
    path: Path
    layers: tuple[StrictInt, ...] | None  # a subset of the blocks in the file; None: all
    norm: Literal["mean_diff", "own"]  # scaled like other methods' directions, or as in the file

    @field_validator("path")
    @classmethod
    def _readable(cls, path: Path) -> Path:
        read(path)
        return path

    @field_validator("layers")
    @classmethod
    def _in_file(cls, layers: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if layers is not None and "path" in info.data:
            held = read(info.data["path"])
            if not layers or len(set(layers)) < len(layers) or not held.keys() >= set(layers):
                raise ValueError(f"null, or distinct blocks of those in the file, {_listed(held)}")
        return layers

    @functools.cached_property
    def held(self) -> dict[int, Tensor]:
        """The directions [d] of the file by block."""
        return read(self.path)

    @property
    def needs_model(self) -> bool:
        return True

    def key_fields(self) -> dict[str, Any]:
        """Return the fields with a hash of the directions in place of the path."""
        content = hashlib.sha256(self._directions().numpy().tobytes()).hexdigest()
        return super().key_fields() | {"path": content, "layers": self._chosen()}

    def check_model(self, model: PreTrainedModel) -> None:
        given, depth = f"steer.path={str(self.path)!r}", len(blocks_of(model))
        there, here = self._directions().shape[1], model.config.get_text_config().hidden_size
        if there != here:
            raise ConfigError(f"{given} is not allowed: its directions have {there} numbers, the model's states {here}")
        if self.layers is None and max(self.held) >= depth:
            raise ConfigError(
                f"{given} is not allowed: it is for blocks {_listed(self.held)}, the model has {depth} blocks, 0 to "
                f"{depth - 1}; 'steer.layers=[...]' chooses among them"
            )
        within_depth(self._chosen(), depth)

    def teach(
        self, student: Student, personas: tuple[str, str], contexts: Contexts, runtime: Runtime
    ) -> SteeringVector:
        layers, found = self._chosen(), self._directions()
        positive, negative = persona_states(student, personas, contexts, layers, runtime)
        if self.norm == "mean_diff":
            found = rescaled(found, positive - negative)
        return SteeringVector(layers, found, snr(found, positive - negative))

    def _chosen(self) -> tuple[int, ...]:
        return self.layers or tuple(self.held)

    def _directions(self) -> Tensor:
        return torch.stack([self.held[layer] for layer in self._chosen()])


def read(path: Path) -> dict[int, Tensor]:
    """Read the directions [d] of a file, float32, by block, the lowest first.

    Raises ValueError, saying what the file must be, if it holds no valid directions.
    """
    readers = {".safetensors": _safetensors, ".gguf": _gguf}
    if path.suffix not in readers:
        raise ValueError(f"a {' or '.join(readers)} file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"a file that can be read: {error.strerror}") from None
    try:
        found = _by_block(readers[path.suffix](path))
    except _Unusable as error:
        raise ValueError(f"a file of directions, one a block; this one {' '.join(str(error).split())}") from None
    return dict(sorted(found.items()))


class _Unusable(Exception):
    """A problem with a file; the message is a sentence without its subject."""


def _safetensors(path: Path) -> list[tuple[str, Tensor]]:
    """Read the tensors that are named after a block, by name."""
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name == "directions" or BLOCK.fullmatch(name)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise _Unusable(f"cannot be read as safetensors: {error}") from None
    if "directions" in tensors:
        return _stored(path.with_suffix(".json"), tensors["directions"])
    return list(tensors.items())


def _stored(about: Path, directions: Tensor) -> list[tuple[str, Tensor]]:
    """Return the directions [l, d] of a vector in the store's format, described by a JSON file beside it."""
    try:
        record = json.loads(about.read_text(encoding="utf-8-sig"))
        operation, layers = record["how"], record["layers"]
        named = [(f"direction.{layer}", direction) for layer, direction in zip(layers, directions, strict=True)]
    except (OSError, ValueError, TypeError, KeyError):
        raise _Unusable(f"has a tensor named directions but no {about.name} beside it that lists its blocks") from None
    if operation != "add":
        raise _Unusable(f"cannot be added to states: it was made to {operation}")
    return named


def _gguf(path: Path) -> list[tuple[str, Tensor]]:
    """Read all tensors of a GGUF control vector, by name."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(path)
        kind = reader.get_field("general.architecture")
        architecture = None if kind is None else kind.contents()
        if architecture != "controlvector":
            raise _Unusable(f"is of architecture {architecture!r}, not 'controlvector'")
        if reader.byte_order != "I":
            raise _Unusable("has a different byte order from this machine")
        plain = {
            t.name: t.data if t.data.dtype.kind == "f" else dequantize(t.data, t.tensor_type) for t in reader.tensors
        }
    except (ValueError, IndexError, KeyError, NotImplementedError) as error:
        raise _Unusable(f"cannot be read as GGUF: {error}") from None
    return [(name, torch.from_numpy(array.astype("float32"))) for name, array in plain.items()]


def _by_block(tensors: Iterable[tuple[str, Tensor]]) -> dict[int, Tensor]:
    """Return directions [d] by the block index that their names end in."""
    found: dict[int, Tensor] = {}
    for name, tensor in tensors:
        match = BLOCK.fullmatch(name)
        if match is None:
            continue
        block = int(match[1])
        if block < 0 or block in found:
            raise _Unusable(f"has {'several tensors' if block in found else 'a tensor'} for block {block}")
        found[block] = tensor.float()
    if not found:
        raise _Unusable("has no tensor that is named after a block, such as direction.12")
    shapes = {tuple(direction.shape) for direction in found.values()}
    if len(shapes) > 1 or len(min(shapes)) != 1:
        raise _Unusable(
            f"has tensors of the shapes {', '.join(str(list(s)) for s in sorted(shapes))}, not vectors of one length"
        )
    if bad := [block for block, direction in found.items() if not 0 < float(direction.norm()) < float("inf")]:
        raise _Unusable(f"has directions whose norms are 0 or not finite, for block {_listed(bad)}")
    return found


def _listed(blocks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(blocks)))
