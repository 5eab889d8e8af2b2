"""KL between two models on text that one of them generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer_heal.artifacts import Completion, Completions, Metrics, Row
from steer_heal.lm.base import head
from steer_heal.lm.batch import HEAD_POSITIONS, Pair, by_length, collate, logprobs, states
from steer_heal.lm.divergence import kl_both
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime
from steer_heal.store import stage
from steer_heal.system.terminal import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPREAD = ("p50", "p95", "max")
FAR = 1e6  # nats, used where steering left no valid distribution; JSON has no infinity


@stage("apart.strength")
def steering_kl(subject: Subject, answers: Completions, *, runtime: Runtime) -> Metrics:
    """`spread` of `steering_divergences` over all positions."""
    return Metrics(spread(torch.cat(steering_divergences(subject, answers, runtime)), "kl"))


def steering_divergences(subject: Subject, answers: Completions, runtime: Runtime) -> list[Tensor]:
    """Return KL(steered || unsteered student), nats, at the positions of each steered answer [c]."""
    _, found = token_kl(subject, Subject(subject.student), answers.rows, runtime, "strength")
    return [values.nan_to_num(nan=FAR, posinf=FAR) for values in found]


def spread(values: Tensor, name: str) -> Row:
    """Return mean, median, 95th percentile and maximum as `<name>_mean`, `_p50`, `_p95` and `_max`."""
    at = values.quantile(torch.tensor([0.5, 0.95, 1.0])).tolist()
    return {f"{name}_mean": float(values.mean()), **{f"{name}_{n}": v for n, v in zip(SPREAD, at, strict=True)}}


@torch.no_grad()
def token_kl(
    subject: Subject, reference: Subject, rows: Sequence[Completion], runtime: Runtime, what: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Return, per token [c] of each completion, log-probability under the reference and KL(subject || reference), nats.

    Each of the two runs under its own system message.
    """
    base = subject.student.base
    groups = list(by_length([Pair(row.prompt_ids, row.ids) for row in rows], runtime.score_batch))
    targets = [torch.tensor([token for i in group for token in rows[i].ids], device=base.device) for group in groups]
    with bar(what, 2 * len(rows)) as advance:
        own, fixed = (_states(one, rows, groups, advance) for one in (subject, reference))
    scored, found = [torch.empty(0)] * len(rows), [torch.empty(0)] * len(rows)
    for group, given, here, there in zip(groups, targets, own, fixed, strict=True):
        lengths = [len(rows[i].ids) for i in group]
        likely = logprobs(base.model, there, given).cpu().split(lengths)
        reverse = both_divergences(base.model, here, there, HEAD_POSITIONS)[1].cpu().split(lengths)
        for i, s, d in zip(group, likely, reverse, strict=True):
            scored[i], found[i] = s, d
    return scored, found


def _states(
    subject: Subject, rows: Sequence[Completion], groups: Sequence[Sequence[int]], advance: Callable[[int], None]
) -> list[Tensor]:
    """Return a subject's states [n, d] at each group's completion positions, run under its own system message."""
    base, found = subject.student.base, []
    system = subject.system  # a completion's stored prompt ids are under the neutral one
    with subject.view() as model:
        for group in groups:
            prompts = [base.chat.prompt(system, rows[i].prompt) if system else rows[i].prompt_ids for i in group]
            pairs = [Pair(prompt, rows[i].ids) for prompt, i in zip(prompts, group, strict=True)]
            found.append(states(model, collate(pairs, base.pad_id, base.device)))
            advance(len(group))
    return found


@torch.no_grad()
def both_divergences(model: PreTrainedModel, hidden: Tensor, reference: Tensor, chunk: int) -> Tensor:
    """Return KL(reference || student) and KL(student || reference) [2, n] at states [n, d], nats, without gradient."""
    parts = [
        kl_both(head(model, h).log_softmax(-1), head(model, r).log_softmax(-1))
        for h, r in zip(hidden.split(chunk), reference.split(chunk), strict=True)
    ]
    return torch.cat(parts, dim=1)
