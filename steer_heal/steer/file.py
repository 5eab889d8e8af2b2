"""A vector from a file, made by whatever means: one direction a block, added as mean_diff's is.

- `.safetensors`: tensors [d] whose names end in the index of their block (`direction.12`), or a `vector.safetensors` of
  this project's store with its `vector.json` beside it.
- `.gguf`: a control vector as repeng and llama.cpp write and apply it: `direction.N` is added to what block N gives,
  blocks counted from 0.

The file enters keys by what it holds, not by where it lies. Its directions are the same in every round.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import StrictInt, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from steer_heal.artifacts import SteeringVector
from steer_heal.config import ConfigError
from steer_heal.contexts import Contexts
from steer_heal.model import blocks_of, sha256
from steer_heal.runtime import Runtime
from steer_heal.steer import Teacher, persona_states, rescaled, snr, within_depth
from steer_heal.student import Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = re.compile(r"(?:.*[._-])?(\d+)")  # a tensor's name that ends in the index of its block


class File(Teacher):
    """Directions that were found elsewhere."""

    name: Literal["file"]
    path: Path
    layers: tuple[StrictInt, ...] | None  # of those in the file; None: all
    norm: Literal["mean_diff", "own"]  # scaled like all other methods' directions, or as they are in the file

    @model_validator(mode="after")
    def _usable(self) -> Self:
        held = self._held()
        if self.layers is not None and (missing := sorted(set(self.layers) - set(held))):
            raise ValueError(f"layers of those in {self.path}, {_listed(held)}; {_listed(missing)} are not there")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError("layers that are distinct indices of blocks")
        return self

    @property
    def needs_look(self) -> bool:
        return True

    def meaning(self) -> dict[str, Any]:
        """What the file holds in place of where it lies."""
        meaning = super().meaning()
        return meaning | {"path": sha256(self.path), "layers": self._chosen()}

    def fit(self, model: PreTrainedModel) -> None:
        within_depth(self._chosen(), len(blocks_of(model)))
        there, here = len(next(iter(self._held().values()))), model.config.get_text_config().hidden_size
        if there != here:
            raise ConfigError(f"steer.path={str(self.path)!r}: directions of {there} numbers; the model's have {here}")

    def teach(
        self, student: Student, personas: tuple[str, str], contexts: Contexts, runtime: Runtime
    ) -> SteeringVector:
        layers, held = self._chosen(), self._held()
        found = torch.stack([held[layer] for layer in layers])
        positive, negative = persona_states(student, personas, contexts, layers, runtime)
        if self.norm == "mean_diff":
            found = rescaled(found, positive - negative)
        return SteeringVector(layers, found, snr(found, positive - negative))

    def _held(self) -> dict[int, Tensor]:
        return read(self.path, sha256(self.path) if self.path.is_file() else "")

    def _chosen(self) -> tuple[int, ...]:
        return self.layers or tuple(sorted(self._held()))


@functools.lru_cache(maxsize=8)
def read(path: Path, _digest: str) -> dict[int, Tensor]:
    """The directions [d] of a file, float32, by block. Raises ValueError for a file that holds no such thing."""
    if not path.is_file():
        raise ValueError(f"a file that is there, and steer.path={str(path)!r} is not")
    readers = {".safetensors": _safetensors, ".gguf": _gguf}
    if path.suffix not in readers:
        raise ValueError(f"a .safetensors or .gguf file, and steer.path={str(path)!r} is neither")
    try:
        found = readers[path.suffix](path)
    except (SafetensorError, ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"a file of directions, and {path} is not: {' '.join(str(error).split())}") from None
    if not found:
        raise ValueError(f"a file of directions, and {path} holds no tensor that is named after a block")
    widths = {tuple(direction.shape) for direction in found.values()}
    if len(widths) > 1 or len(next(iter(widths))) != 1:
        raise ValueError(f"a file of directions of one length, and those in {path} have the shapes {sorted(widths)}")
    bad = [layer for layer, d in sorted(found.items()) if not d.isfinite().all() or not d.any()]
    if bad:
        raise ValueError(f"a file of directions other than 0, and {path} has none for blocks {_listed(bad)}")
    return found


def _safetensors(path: Path) -> dict[int, Tensor]:
    tensors = load_file(path)
    if "directions" in tensors:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if about["how"] != "add":
            raise ValueError(f"its vector is not added to states; it was made to {about['how']}")
        return dict(zip(about["layers"], tensors["directions"].float(), strict=True))
    return _by_block(tensors)


def _gguf(path: Path) -> dict[int, Tensor]:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    if architecture != "controlvector":
        raise ValueError(f"its architecture is {architecture!r}, not 'controlvector'")
    return _by_block({t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors})


def _by_block(tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    """Tensors by the block that their names end in. Raises ValueError for two of one block."""
    found: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        match = BLOCK.fullmatch(name)
        if match is None:
            continue
        if int(match[1]) in found:
            raise ValueError(f"it has several tensors for block {match[1]}")
        found[int(match[1])] = tensor.float()
    return found


def _listed(layers: Any) -> str:
    return ", ".join(map(str, sorted(layers)))
