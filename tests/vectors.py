"""Made-up vector files, as other tools write them."""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
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


@functools.cache
def kept_file(seed: int = 0) -> Path:
    """A file for blocks 1 and 2 of the tiny model, which lasts as long as the tests run."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return as_safetensors(Path(folder.name) / "vector.safetensors", directions(seed=seed))
