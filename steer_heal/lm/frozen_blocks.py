"""Ways to run a model's blocks in training: the same results within rounding, at other costs in time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class FrozenBlocks:
    """The blocks below the lowest adapted one, which training skips: what they give for a sequence never changes."""

    lowest: int  # the first block that runs
    states: Sequence[Tensor]  # each pair's input states [s, d] to it
    others: int | None  # how many values a block returns behind its states; None: the states alone, not a tuple

    @contextmanager
    def skipped(self, model: PreTrainedModel, group: Sequence[int]) -> Iterator[None]:
        """Skip the blocks: the lowest adapted one gets the states of the pairs in `group`, which make up the batch."""
        padded = nn.utils.rnn.pad_sequence([self.states[i] for i in group], batch_first=True).to(model.device)
        given = padded if self.others is None else (padded, *[None] * self.others)
        hook = blocks_of(model)[self.lowest].register_forward_pre_hook(
            lambda _, given, named: ((padded, *given[1:]), named) if given else ((), named | {"hidden_states": padded}),
            with_kwargs=True,
        )
        skipped = [(block, vars(block).get("forward")) for block in blocks_of(model)[: self.lowest]]
        for block, _ in skipped:
            block.forward = lambda *_, **__: given
        try:
            yield
        finally:
            hook.remove()
            for block, own in skipped:
                del block.forward
                if own is not None:
                    block.forward = own


@torch.no_grad()
def frozen_blocks(
    model: PreTrainedModel, pairs: Sequence[Pair], lowest: int, pad_id: int, size: int
) -> FrozenBlocks | None:
    """Run the blocks below `lowest` once for every pair, `size` at a time.

    Returns None if there are none, or if the model's states are others without them: its upper blocks then need more
    of the lower ones than their states.
    """
    if not lowest or not separable(model):
        return None
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    caught: list[Tensor] = []
    others: list[int | None] = []

    def catch(_block: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        caught.append(given[0] if given else named["hidden_states"])
        raise StopForward

    def count(_block: nn.Module, _given: Any, out: Any) -> None:
        others.append(len(out) - 1 if isinstance(out, tuple | list) else None)

    blocks = blocks_of(model)
    hooks = [
        blocks[lowest].register_forward_pre_hook(catch, with_kwargs=True),
        blocks[lowest - 1].register_forward_hook(count),
    ]
    try:
        for group in by_length(pairs, size):
            with suppress(StopForward):
                states(model, collate([pairs[i] for i in group], pad_id, model.device))
            for i, rows in zip(group, caught.pop(), strict=True):
                found[i] = rows[: len(pairs[i])].cpu()
    finally:
        for hook in hooks:
            hook.remove()
    frozen, one = FrozenBlocks(lowest, found, others[-1]), collate(pairs[:1], pad_id, model.device)
    whole = states(model, one)
    with frozen.skipped(model, [0]):
        off = float((states(model, one) - whole).float().norm())
    return frozen if off <= 0.02 * float(whole.float().norm()) else None
