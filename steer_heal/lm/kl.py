"""How far two models are apart on what one of them says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steer_heal.artifacts import Completion, Completions, Metrics
from steer_heal.eval import Subject
from steer_heal.heal.chunked_nll import both_divergences
from steer_heal.lm.batch import HEAD_POSITIONS, Pair, by_length, collate, logprobs, states
from steer_heal.model import chat_ids
from steer_heal.runtime import Runtime
from steer_heal.system.terminal import bar

FAR = 1e6  # nats, where steering left no distribution; JSON has no infinity


def strength(subject: Subject, answers: Completions, *, runtime: Runtime) -> Metrics:
    """What steering at a dose comes to: KL(steered || unsteered student) at every position of the steered answers.

    `kl_mean`, `kl_p50`, `kl_p95` and `kl_max`, nats, of all positions.
    """
    _, divergences = apart(subject, Subject(subject.student), answers.rows, runtime, "strength")
    every = torch.cat(divergences).nan_to_num(nan=FAR, posinf=FAR)
    spread = every.quantile(torch.tensor([0.5, 0.95, 1.0])).tolist()
    return Metrics({"kl_mean": float(every.mean()), **dict(zip(("kl_p50", "kl_p95", "kl_max"), spread, strict=True))})


@torch.no_grad()
def apart(
    subject: Subject, reference: Subject, rows: Sequence[Completion], runtime: Runtime, what: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Of every completion, per token [c]: its log-probability under the reference, and KL(subject || reference); nats.

    Each of the two is asked under its own system message.
    """
    base = subject.student.base
    groups = list(by_length([Pair(row.prompt_ids, row.ids) for row in rows], runtime.score_batch))
    targets = [torch.tensor([token for i in group for token in rows[i].ids], device=base.device) for group in groups]
    with bar(what, 2 * len(rows)) as advance:
        own, fixed = (_states(who, rows, groups, advance) for who in (subject, reference))
    scored, found = [torch.empty(0)] * len(rows), [torch.empty(0)] * len(rows)
    for group, given, here, there in zip(groups, targets, own, fixed, strict=True):
        lengths = [len(rows[i].ids) for i in group]
        likely = logprobs(base.model, there, given).cpu().split(lengths)
        reverse = both_divergences(base.model, here, there, HEAD_POSITIONS)[1].cpu().split(lengths)
        for i, s, d in zip(group, likely, reverse, strict=True):
            scored[i], found[i] = s, d
    return scored, found


def _states(
    who: Subject, rows: Sequence[Completion], groups: Sequence[Sequence[int]], advance: Callable[[int], None]
) -> list[Tensor]:
    """Somebody's states [n, d] at the positions of each group of completions, asked under their own system message."""
    base, found = who.student.base, []
    system = who.told  # the ids of a completion's prompt are under the neutral one
    with who.view() as model:
        for group in groups:
            prompts = [
                chat_ids(base.tokenizer, system, rows[i].prompt) if system else rows[i].prompt_ids for i in group
            ]
            pairs = [Pair(prompt, rows[i].ids) for prompt, i in zip(prompts, group, strict=True)]
            found.append(states(model, collate(pairs, base.pad_id, base.device)))
            advance(len(group))
    return found
