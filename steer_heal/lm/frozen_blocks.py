"""Ways to run a model's blocks in training: the same results within rounding, at other costs in time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Frozen:
    """The blocks below the lowest one with an adapter: what they give never changes, so it is computed once."""

    k: int  # the lowest block that runs
    states: list[Tensor]  # its input states [s, d] for each pair
    lengths: tuple[int | None, ...]  # how many values each block below passes on; None: the states alone, in no tuple


def freeze(model: PreTrainedModel, pairs: Sequence[Pair], k: int, pad_id: int, size: int) -> Frozen | None:
    """Run the blocks below `k` once over all pairs, `size` at a time.

    Returns None if the blocks from `k` on need more of those below than their states, such as keys or selected
    positions that they share: then they cannot be skipped.
    """
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        return None
    short = sorted(pairs, key=len)[:2]
    trial = _run_below(model, short, k, pad_id, len(short))
    return _run_below(model, pairs, k, pad_id, size) if _separable(model, short, trial, pad_id) else None


@torch.no_grad()
def _separable(model: PreTrainedModel, pairs: Sequence[Pair], frozen: Frozen, pad_id: int) -> bool:
    """Return True if the model gives the same states with the blocks below skipped."""
    batch = collate(pairs, pad_id, model.device)
    whole = states(model, batch).float()
    try:
        with skip_blocks(model, frozen, range(len(pairs))):
            part = states(model, batch).float()
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):  # whatever a block does without the rest
        return False
    return float((part - whole).norm()) <= 0.01 * float(whole.norm())


@torch.no_grad()
def _run_below(model: PreTrainedModel, pairs: Sequence[Pair], k: int, pad_id: int, size: int) -> Frozen:
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    caught: list[Tensor] = []
    lengths: dict[int, int | None] = {}

    def catch(_block: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        caught.append(given[0] if given else named["hidden_states"])
        raise StopForward

    def look(_block: nn.Module, _given: tuple[Tensor, ...], output: object, *, layer: int) -> None:
        lengths[layer] = len(output) if isinstance(output, tuple | list) else None

    blocks = blocks_of(model)
    hooks = [blocks[i].register_forward_hook(partial(look, layer=i)) for i in range(k)]
    hooks.append(blocks[k].register_forward_pre_hook(catch, with_kwargs=True))
    try:
        for group in by_length(pairs, size):
            with suppress(StopForward):
                states(model, collate([pairs[i] for i in group], pad_id, model.device))
            for i, rows in zip(group, caught.pop(), strict=True):
                found[i] = rows[: len(pairs[i])].cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return Frozen(k, found, tuple(lengths[i] for i in range(k)))


@contextmanager
def skip_blocks(model: PreTrainedModel, frozen: Frozen, group: Sequence[int]) -> Iterator[None]:
    """Skip the blocks below `frozen.k`: that block gets the states kept for the sequences of the batch, `group`."""
    kept = [frozen.states[i] for i in group]
    padded = nn.utils.rnn.pad_sequence(kept, batch_first=True).to(model.device)
    blocks = blocks_of(model)
    hook = blocks[frozen.k].register_forward_pre_hook(
        lambda _, given, named: ((padded, *given[1:]), named) if given else ((), named | {"hidden_states": padded}),
        with_kwargs=True,
    )
    skipped = [(block, vars(block).get("forward")) for block in blocks[: frozen.k]]
    for (block, _), length in zip(skipped, frozen.lengths, strict=True):
        output = padded if length is None else (padded, *[None] * (length - 1))
        block.forward = lambda *_, output=output, **__: output
    try:
        yield
    finally:
        hook.remove()
        for block, own in skipped:
            del block.forward
            if own is not None:
                block.forward = own
