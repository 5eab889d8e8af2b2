"""How a run is carried out. Nothing here enters a key; it is recorded beside the results."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from steer_heal.config import Config

LOGITS_BYTES = 2**26  # of float32 logits in one pass of the head; about six such tensors stand at once
DEFAULT_THREADS = torch.get_num_threads()


class Runtime(Config):
    """Sizes and places; other values give the same results within rounding."""

    name: str
    store: Path  # where stage results are kept, shared by all runs
    micro_batch: int = Field(ge=1)  # sequences in one forward and backward pass of training
    score_batch: int = Field(ge=1)  # sequences in one forward pass without gradient
    generate_batch: int = Field(ge=1)  # rows generated side by side at most
    cuda_graphs: bool  # on a GPU a step of generation is recorded once and replayed, for models that allow it
    head_chunk: Annotated[int, Field(ge=1)] | Literal["auto"]  # positions in one pass of the head where text is trained
    checkpoint_blocks: bool  # training keeps the inputs of blocks only and runs them again on the way back
    checkpoint_seconds: float = Field(ge=0)  # a heal that takes longer is saved so often, and goes on there
    threads: Annotated[int, Field(ge=1)] | Literal["auto"]  # of torch on the CPU

    def positions(self, vocabulary: int) -> int:
        """How many positions go through the head at once."""
        return max(1, LOGITS_BYTES // (4 * vocabulary)) if self.head_chunk == "auto" else self.head_chunk

    def apply(self) -> None:
        """Set what is global to the process."""
        _keep_memory()
        torch.set_num_threads(DEFAULT_THREADS if self.threads == "auto" else self.threads)


def _keep_memory() -> None:
    """Let glibc keep what is freed: every step takes the same memory again, and fresh pages cost more than they hold.

    M_MMAP_THRESHOLD is -3 and M_TRIM_THRESHOLD -1 in malloc.h; other C libraries are left alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(-3, 2**30)
        libc.mallopt(-1, 2**31 - 1)
