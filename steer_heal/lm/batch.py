"""Prompts and completions as padded batches, and the model's states and log-probabilities at completion positions.

Prompt and completion are joined as ids. With P prompt and C completion tokens the states at positions P-1 ... P+C-2
predict the completion. Padding is on the right: a causal model never looks at it, so no mask is needed. Nor does it
look ahead: how all sequences of a batch begin, the template and the system message at least, need run only once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer_heal.model import head
from steer_heal.system.terminal import bar

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

# Positions a pass of the head where text is scored, whatever the runtime: logits that fit in memory at any vocabulary.
HEAD_POSITIONS = 64
WORTH = 4  # tokens of a prefix from which on running it apart costs less than it saves


@dataclass(frozen=True)
class Pair:
    """A prompt and what was said to it, as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def cut(self, max_len: int) -> Pair:
        """At most `max_len` tokens; the front is kept. The completion may come out empty."""
        prompt = self.prompt[:max_len]
        return Pair(prompt, self.completion[: max_len - len(prompt)])

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Batch:
    """Sequences side by side. `n` counts the completion positions of all of them, in order."""

    prefix: int  # tokens that all sequences begin with and that predict no target
    ids: Tensor  # [b, s], padded on the right
    where: Tensor  # [n], positions into the flattened [b * s]
    targets: Tensor  # [n], the ids to be predicted there
    owner: Tensor  # [n], the sequence that each position belongs to


def collate(pairs: Sequence[Pair], pad_id: int, device: torch.device) -> Batch:
    """Pad to the longest. Every pair needs a prompt and a completion; raises ValueError otherwise."""
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
    """Tokens that all prompts begin with, but for their last, which predicts a target."""
    first, last = min(prompts), max(prompts)  # all others lie between the two
    shortest = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


class Enough(Exception):
    """Raised by a hook where a forward pass has come far enough."""


def states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Post-final-norm states [n, d] at the completion positions; the head has not run."""
    hidden: Tensor = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.where]


def shared_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """`states`, the prefix run once for all sequences; within rounding the same, and so are gradients."""
    cache = shared_prefix(model, batch.ids, batch.prefix)
    if cache is None:
        return states(model, batch)
    rest = batch.ids[:, batch.prefix : -1]  # what the last token would predict is no target
    hidden: Tensor = model.base_model(input_ids=rest, past_key_values=cache, use_cache=True).last_hidden_state
    s = batch.ids.shape[1]
    row, column = batch.where // s, batch.where % s
    return hidden[row, column - batch.prefix]


def shared_prefix(model: PreTrainedModel, ids: Tensor, prefix: int) -> DynamicCache | None:
    """What a model keeps of the first `prefix` of ids [b, s], which all rows share, after running them once.

    None where that would save nothing, or where what a model keeps cannot be shared. Of blocks above one whose hook
    raises `Enough` nothing is kept.
    """
    b, s = ids.shape
    if prefix < WORTH or not _remembers(model, s):
        return None
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with suppress(Enough):
        model.base_model(input_ids=ids[:1, :prefix], past_key_values=cache, use_cache=True)
    if cache.get_seq_length() != prefix:  # a family that knows no cache of keys and values (GPT-1)
        return None
    cache.batch_repeat_interleave(b)
    return cache


def _remembers(model: PreTrainedModel, width: int) -> bool:
    """Whether what a model keeps of earlier tokens is their keys and values, through which gradients flow.

    Blocks that transformers checkpoints keep nothing, and some RoPE turns all keys otherwise beyond a certain length.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *rope.values()]:  # for all layers, or for each kind of them
        if isinstance(one, dict) and one.get("rope_type") in ("dynamic", "longrope"):
            known = one.get("original_max_position_embeddings") or config.max_position_embeddings
            if width > min(known, config.max_position_embeddings):
                return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    attends = kinds <= {"full_attention", "sliding_attention"} and not model._is_stateful
    return attends and not getattr(model, "is_activation_checkpointing", False)


@torch.no_grad()
def logprobs(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability [n] of each target id under the states [n, d] that predict it, float32."""
    parts = []
    for h, t in zip(hidden.split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True):
        logits = head(model, h)
        parts.append(logits.gather(-1, t[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts)


def by_length(pairs: Sequence[Sized], size: int) -> Iterator[list[int]]:
    """Indices in groups of `size` of like length, so that little is padded; the longest first, to fail early."""
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def score(
    model: PreTrainedModel, pairs: Sequence[Pair], *, pad_id: int, micro_batch: int, what: str = "score"
) -> list[Tensor]:
    """Per-token log-probabilities [c] of each completion given its prompt, float32 on the CPU, nats."""
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    with bar(what, len(pairs)) as advance:
        for group in by_length(pairs, micro_batch):
            batch = collate([pairs[i] for i in group], pad_id, model.device)
            values = logprobs(model, states(model, batch), batch.targets).cpu()
            lengths = [len(pairs[i].completion) for i in group]
            for i, part in zip(group, values.split(lengths), strict=True):
                found[i] = part
            advance(len(group))
    return found
