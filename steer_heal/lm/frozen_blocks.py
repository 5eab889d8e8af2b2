"""How a model's blocks are carried out in training: within rounding the same, in other time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steer_heal.lm.attention import short_sequences
from steer_heal.lm.batch import Enough, Pair, by_length, collate, states
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


def separable(model: PreTrainedModel) -> bool:
    """Whether blocks take from those below no more than their states: in some families upper ones share keys too."""
    return not getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)


@torch.no_grad()
def below(model: PreTrainedModel, pairs: Sequence[Pair], k: int, pad_id: int, size: int) -> list[Tensor]:
    """The states [s, d] that enter block `k` for each pair. What is below has no adapter, so they never change."""
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    caught: list[Tensor] = []

    def catch(_block: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        caught.append(given[0] if given else named["hidden_states"])
        raise Enough

    hook = blocks_of(model)[k].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for group in by_length(pairs, size):
            with suppress(Enough):
                states(model, collate([pairs[i] for i in group], pad_id, model.device))
            for i, rows in zip(group, caught.pop(), strict=True):
                found[i] = rows[: len(pairs[i])].cpu()
    finally:
        hook.remove()
    return found


@contextmanager
def resting(model: PreTrainedModel, k: int, entering: Sequence[Tensor]) -> Iterator[None]:
    """Blocks below `k` do not run: block `k` gets what `below` found for the sequences of the batch."""
    padded = nn.utils.rnn.pad_sequence(list(entering), batch_first=True).to(model.device)
    hook = blocks_of(model)[k].register_forward_pre_hook(
        lambda _, given, named: ((padded, *given[1:]), named) if given else ((), named | {"hidden_states": padded}),
        with_kwargs=True,
    )
    idle = [(block, vars(block).get("forward")) for block in blocks_of(model)[:k]]
    for block, _ in idle:
        block.forward = lambda *_, **__: padded
    try:
        yield
    finally:
        hook.remove()
        for block, own in idle:
            del block.forward
            if own is not None:
                block.forward = own
