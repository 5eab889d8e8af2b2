"""Prompts and completions as padded batches, and the model's states and log-probabilities at completion positions.

Prompt and completion are joined as ids. With P prompt and C completion tokens the states at positions P-1 ... P+C-2
predict the completion. Padding is on the right: a causal model never looks at it, so no mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer_heal.model import head
from steer_heal.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions a pass of the head. Logits of more would pass the size up to which the C library reuses memory, and each
# pass would then pay for fresh pages.
HEAD_POSITIONS = 64


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
    return Batch(*(t.to(device) for t in (ids, torch.cat(where), torch.cat(targets), torch.cat(owner))))


def states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Post-final-norm states [n, d] at the completion positions; the head has not run."""
    hidden: Tensor = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.where]


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
