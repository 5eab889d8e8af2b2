"""How a run is carried out. Nothing here enters a key; it is recorded beside the results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from steer_heal.config import Config

DEFAULT_THREADS = torch.get_num_threads()


class Runtime(Config):
    """Sizes and places; other values give the same results within rounding."""

    name: str
    store: Path  # where stage results are kept, shared by all runs
    micro_batch: int = Field(ge=1)  # sequences in one forward and backward pass of training
    score_batch: int = Field(ge=1)  # sequences in one forward pass without gradient
    generate_batch: int = Field(ge=1)  # rows generated side by side
    head_chunk: int = Field(ge=1)  # positions in one pass of the head during training
    threads: Annotated[int, Field(ge=1)] | Literal["auto"]  # of torch on the CPU

    def apply(self) -> None:
        """Set what is global to the process."""
        torch.set_num_threads(DEFAULT_THREADS if self.threads == "auto" else self.threads)
