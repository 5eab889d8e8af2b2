"""Made-up vector files, as other tools write them."""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 32  # of the tiny model's states


def directions(layers: tuple[int, ...] = (1, 2), width: int = WIDTH, seed: int = 0) -> dict[int, Tensor]:
    """A random direction [d] for each block."""
    rng = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(width, generator=rng) for layer in layers}


def as_safetensors(path: Path, by_block: Mapping[int, Tensor]) -> Path:
    """One tensor a block, named after it."""
    save_file({f"direction.{layer}": direction for layer, direction in by_block.items()}, path)
    return path


def as_gguf(
    path: Path, tensors: Mapping[str, Any], kind: str = "F32", architecture: str = "controlvector", **how: Any
) -> Path:
    """A control vector as repeng and llama.cpp's generator write it, from numpy arrays by name."""
    writer = GGUFWriter(path, architecture, **how)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, array in tensors.items():
        if kind in ("F32", "F16", "F64"):
            writer.add_tensor(name, array.astype({"F32": np.float32, "F16": np.float16, "F64": np.float64}[kind]))
        else:
            which = GGMLQuantizationType[kind]
            writer.add_tensor(name, quantize(array, which), raw_dtype=which)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def named(by_block: Mapping[int, Tensor]) -> dict[str, Any]:
    """Numpy arrays by the names that control vectors have."""
    return {f"direction.{block}": direction.numpy() for block, direction in by_block.items()}


@functools.cache
def kept_file(seed: int = 0) -> Path:
    """A file for blocks 1 and 2 of the tiny model, which lasts as long as the tests run."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return as_safetensors(Path(folder.name) / "vector.safetensors", directions(seed=seed))
