"""Log-probabilities of completions given their prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from steer_heal.lm.base import head, vocabulary
from steer_heal.lm.batch import Pair
from steer_heal.lm.tree import completion_states
from steer_heal.runtime import LOGITS_BYTES
from steer_heal.system.terminal import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = 64  # positions in one pass, at any size of the vocabulary: each pass reads all of the head's weights


@torch.no_grad()
def score(
    model: PreTrainedModel, pairs: Sequence[Pair], *, pad_id: int, micro_batch: int, what: str = "score"
) -> list[Tensor]:
    """Return per-token log-probabilities [c] of each completion given its prompt, float32 on the CPU, nats."""
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    with bar(what, len(pairs)) as advance:
        for group, hidden in completion_states(model, pairs, pad_id=pad_id, size=micro_batch, advance=advance):
            values = logprobs(model, hidden, target_ids((pairs[i].completion for i in group), hidden.device)).cpu()
            for i, part in zip(group, values.split([len(pairs[i].completion) for i in group]), strict=True):
                found[i] = part
    return found


def target_ids(completions: Iterable[Sequence[int]], device: torch.device) -> Tensor:
    """Return the completions' ids [n], one after another."""
    return torch.tensor([token for ids in completions for token in ids], device=device)


@torch.no_grad()
def logprobs(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability [n] of each target id given the state [n, d] that predicts it, float32."""
    found = [cross_entropy(head(model, hidden[i]), targets[i], reduction="none") for i in parts(model, hidden)]
    return -torch.cat(found)


def parts(model: PreTrainedModel, hidden: Tensor) -> list[slice]:
    """Split states [n, d] into those that go through the head at once."""
    return even(len(hidden), max(LEAST, LOGITS_BYTES // (4 * vocabulary(model))))


def even(n: int, most: int) -> list[slice]:
    """Split n positions into even parts of at most `most`; each part, however small, reads the whole head."""
    size = math.ceil(n / math.ceil(n / most)) if n else 1
    return [slice(start, start + size) for start in range(0, n, size)]
