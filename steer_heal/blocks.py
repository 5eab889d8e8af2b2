"""How a model's blocks are carried out in training: within rounding the same, in other time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch.utils.checkpoint import checkpoint

from steer_heal.attention import short_sequences
from steer_heal.model import blocks_of
from steer_heal.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def carried_out(model: PreTrainedModel, runtime: Runtime) -> Iterator[None]:
    """Short attention where it pays, and blocks that are run again on the way back where `runtime` says so.

    Such a block keeps its input instead of all that it computes, for about a third more time. (transformers' own way
    needs the model in training mode, in which some models drop out.)
    """
    blocks = list(blocks_of(model)) if runtime.checkpoint_blocks else []
    with short_sequences(model):
        try:
            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            yield
        finally:
            for block in blocks:
                del block.forward  # the instance's; that of its class shows again
