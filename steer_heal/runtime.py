"""Execution settings of a run. None of them enters a cache key; they are recorded beside the results."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from steer_heal.config import Config
from steer_heal.system.cpu import cores

LOGITS_BYTES = 2**26  # of float32 logits in one pass of the head; about six such tensors exist at once
DEFAULT_THREADS = torch.get_num_threads()


class Runtime(Config):
    """Sizes and paths; other values give the same results within rounding."""

    name: str
    store: Path  # where stage results are kept, shared by all runs
    micro_batch: int = Field(ge=1)  # sequences in one forward and backward pass of training
    score_batch: int = Field(ge=1)  # sequences in one forward pass without gradient
    generate_batch: int = Field(ge=1)  # rows generated side by side, at most
    cuda_graphs: bool  # on a GPU a step of generation is recorded once and replayed, for models that allow it
    head_chunk: Annotated[int, Field(ge=1)] | Literal["auto"]  # positions per pass of the head in training
    checkpoint_blocks: bool  # training keeps only the blocks' inputs and runs them again in backward
    checkpoint_seconds: float = Field(ge=0)  # a heal that takes longer is saved at this interval, to resume from
    threads: Annotated[int, Field(ge=1)] | Literal["auto"]  # of torch on the CPU

    def positions(self, vocabulary: int) -> int:
        """Number of positions that go through the head at once."""
        return max(1, LOGITS_BYTES // (4 * vocabulary)) if self.head_chunk == "auto" else self.head_chunk

    def apply(self) -> None:
        """Apply the settings that are global to the process."""
        _keep_memory()
        default = DEFAULT_THREADS if os.environ.get("OMP_NUM_THREADS") else min(DEFAULT_THREADS, cores())
        torch.set_num_threads(default if self.threads == "auto" else self.threads)


def _keep_memory() -> None:
    """Let glibc keep freed memory: every step allocates the same sizes again, and fresh pages are slow to get.

    M_MMAP_THRESHOLD is -3 and M_TRIM_THRESHOLD -1 in malloc.h; other C libraries are left alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(-3, 2**30)
        libc.mallopt(-1, 2**31 - 1)
