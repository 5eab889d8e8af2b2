"""Prompts and completions as padded batches, and the model's states at completion positions.

Prompt and completion are joined as ids. With P prompt and C completion tokens the states at positions P-1 ... P+C-2
predict the completion. Padding is on the right: a causal model never looks ahead, so no mask is needed. For the same
reason the prefix that all sequences of a batch share (at least the template and the system message) runs only once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer_heal.lm.base import body

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

PADDING, SLACK = 2, 256  # texts in one batch: as many times as long as the shortest, and so many tokens more
MIN_PREFIX = 4  # shortest prefix, in tokens, for which running it separately saves more than it costs


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion, as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def cut(self, max_len: int) -> Pair:
        """Truncate to `max_len` tokens, keeping the front. The completion may end up empty."""
        prompt = self.prompt[:max_len]
        return Pair(prompt, self.completion[: max_len - len(prompt)])

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Batch:
    """Padded sequences. `n` counts the completion positions of all of them, in order."""

    prefix: int  # tokens that all sequences begin with and that predict no target
    ids: Tensor  # [b, s], padded on the right
    where: Tensor  # [n], positions into the flattened [b * s]
    targets: Tensor  # [n], the ids to be predicted there
    owner: Tensor  # [n], the sequence that each position belongs to


def collate(pairs: Sequence[Pair], pad_id: int, device: torch.device) -> Batch:
    """Pad to the longest pair. Raises ValueError for a pair without a prompt or a completion."""
    width = max(len(pair) for pair in pairs)
    ids = torch.full((len(pairs), width), pad_id)
    where, targets, owner = [], [], []
    for i, pair in enumerate(pairs):
        if not pair.prompt or not pair.completion:
            raise ValueError("a sequence needs at least one prompt token and one completion token")
        ids[i, : len(pair)] = torch.tensor(pair.prompt + pair.completion)
        start = i * width + len(pair.prompt) - 1
        where.append(torch.arange(start, start + len(pair.completion)))
        targets.append(torch.tensor(pair.completion))
        owner.append(torch.full((len(pair.completion),), i))
    flat = (torch.cat(parts).to(device) for parts in (where, targets, owner))
    return Batch(shared_length([pair.prompt for pair in pairs]), ids.to(device), *flat)


def shared_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Count the tokens that all prompts begin with, excluding their last, which predicts a target."""
    first, last = min(prompts), max(prompts)  # all others sort between these two
    shortest = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


class StopForward(Exception):
    """Raised by a hook to end a forward pass early."""


def states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return post-final-norm states [n, d] at the completion positions, before the head."""
    hidden: Tensor = body(model)(input_ids=batch.ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.where]


def shared_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return `states` with the shared prefix run only once; values and gradients agree within rounding."""
    cache = shared_prefix(model, batch.ids, batch.prefix)
    if cache is None:
        return states(model, batch)
    rest = batch.ids[:, batch.prefix : -1]  # the last token predicts no target
    hidden: Tensor = body(model)(input_ids=rest, past_key_values=cache, use_cache=True).last_hidden_state
    s = batch.ids.shape[1]
    row, column = batch.where // s, batch.where % s
    return hidden[row, column - batch.prefix]


def shared_prefix(model: PreTrainedModel, ids: Tensor, prefix: int) -> DynamicCache | None:
    """Run the first `prefix` tokens of ids [b, s], which all rows share, once; return the cache, repeated for all rows.

    Returns None if that would save nothing, or if the model's cache cannot be shared. Blocks above one whose hook
    raises `StopForward` have no entries.
    """
    b, s = ids.shape
    if b == 1 or prefix < MIN_PREFIX or not keys_alone(model, s):
        return None
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with suppress(StopForward):
        body(model)(input_ids=ids[:1, :prefix], past_key_values=cache, use_cache=True)
    if cache.get_seq_length() != prefix:  # a family without a key-value cache (GPT-1)
        return None
    cache.batch_repeat_interleave(b)
    return cache


def keys_alone(model: PreTrainedModel, width: int) -> bool:
    """Return True if a token depends on earlier ones by their keys and values alone, in texts of `width` tokens.

    Then they can be run once for several texts, and gradients flow through a cache of them.

    Blocks under transformers' gradient checkpointing cache nothing, and some RoPE variants rotate all keys differently
    beyond a certain length.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *rope.values()]:  # one set for all layers, or one per kind of layer
        if isinstance(one, dict) and one.get("rope_type") in ("dynamic", "longrope"):
            known = one.get("original_max_position_embeddings") or config.max_position_embeddings
            if width > min(known, config.max_position_embeddings):
                return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    attends = kinds <= {"full_attention", "sliding_attention"} and not model._is_stateful
    return attends and not getattr(model, "is_activation_checkpointing", False)


def by_length(pairs: Sequence[Sized], size: int) -> Iterator[list[int]]:
    """Yield indices in groups of at most `size` and alike in length; the longest come first, to fail early."""
    for alike in alike_in_length(pairs):
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def alike_in_length(pairs: Sequence[Sized]) -> Iterator[list[int]]:
    """Yield indices in as few groups as keep padding low, the longest first: a single long text pads no short ones.

    In a group the longest is at most PADDING times as long as the shortest, or SLACK tokens longer than that.
    """
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i]))
    group: list[int] = []
    for i in order:
        if group and len(pairs[group[0]]) > PADDING * len(pairs[i]) + SLACK:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
