"""Ways to run a model's blocks in training: the same results within rounding, at other costs in time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steer_heal.lm.attention import short_sequences
from steer_heal.lm.base import blocks_of
from steer_heal.lm.batch import Pair, StopForward, by_length, collate, states
from steer_heal.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def training_blocks(model: PreTrainedModel, runtime: Runtime) -> Iterator[None]:
    """Use short attention where it pays, and recompute blocks in the backward pass if `runtime` says so.

    A recomputed block keeps only its input instead of all its activations, for about a third more time.
    (transformers' own checkpointing needs the model in training mode, in which some models apply dropout.)
    """
    blocks = list(blocks_of(model)) if runtime.checkpoint_blocks else []
    with short_sequences(model):
        try:
            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            yield
        finally:
            for block in blocks:
                del block.forward  # removes the instance attribute, uncovering the class's method


def separable(model: PreTrainedModel) -> bool:
    """Return True if blocks need only the states from the blocks below: in some families upper ones also share keys."""
    return not getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)


@torch.no_grad()
def frozen_states(model: PreTrainedModel, pairs: Sequence[Pair], k: int, pad_id: int, size: int) -> list[Tensor]:
    """Return each pair's input states [s, d] to block `k`. Blocks below have no adapter, so these never change."""
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    caught: list[Tensor] = []

    def catch(_block: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        caught.append(given[0] if given else named["hidden_states"])
        raise StopForward

    hook = blocks_of(model)[k].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for group in by_length(pairs, size):
            with suppress(StopForward):
                states(model, collate([pairs[i] for i in group], pad_id, model.device))
            for i, rows in zip(group, caught.pop(), strict=True):
                found[i] = rows[: len(pairs[i])].cpu()
    finally:
        hook.remove()
    return found


@contextmanager
def skip_blocks(model: PreTrainedModel, k: int, frozen: Sequence[Tensor]) -> Iterator[None]:
    """Skip blocks below `k`: block `k` gets what `frozen_states` returned for the sequences of the batch."""
    padded = nn.utils.rnn.pad_sequence(list(frozen), batch_first=True).to(model.device)
    hook = blocks_of(model)[k].register_forward_pre_hook(
        lambda _, given, named: ((padded, *given[1:]), named) if given else ((), named | {"hidden_states": padded}),
        with_kwargs=True,
    )
    skipped = [(block, vars(block).get("forward")) for block in blocks_of(model)[:k]]
    for block, _ in skipped:
        block.forward = lambda *_, **__: padded
    try:
        yield
    finally:
        hook.remove()
        for block, own in skipped:
            del block.forward
            if own is not None:
                block.forward = own
