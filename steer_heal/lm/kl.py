"""KL between two models on text that one of them generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer_heal.artifacts import Completions, Metrics, Row, States
from steer_heal.lm.base import head
from steer_heal.lm.batch import Pair
from steer_heal.lm.divergence import kl_both
from steer_heal.lm.score import parts, target_ids
from steer_heal.lm.student import Subject
from steer_heal.lm.tree import states_of_each
from steer_heal.runtime import Runtime
from steer_heal.store import stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPREAD = ("p50", "p95", "max")
FAR = 1e6  # nats, used where steering left no valid distribution; JSON has no infinity


@stage("lm.kl.answer_states")
def answer_states(subject: Subject, answers: Completions, *, runtime: Runtime) -> States:
    """A subject's states at the tokens of answers, run under its own system message."""
    base, system = subject.student.base, subject.system  # a completion's stored prompt ids are under the neutral one
    pairs = [Pair(base.chat.prompt(system, row.prompt) if system else row.prompt_ids, row.ids) for row in answers.rows]
    with subject.view() as model:
        found = states_of_each(model, pairs, pad_id=base.pad_id, size=runtime.score_batch, what="states")
    return States(states=tuple(found))


@stage("apart.strength")
def steering_kl(subject: Subject, answers: Completions, *, runtime: Runtime) -> Metrics:
    """`spread` of KL(steered || unsteered student) over all positions of the steered answers, nats."""
    own, unsteered = (answer_states(one, answers, runtime=runtime) for one in (subject, Subject(subject.student)))
    return Metrics(spread(torch.cat(token_kl(subject, answers, own, unsteered)[1]), "kl"))


def token_kl(subject: Subject, answers: Completions, own: States, others: States) -> tuple[list[Tensor], list[Tensor]]:
    """Return, per token [c] of each answer, log-probability under another model and KL(subject || other), nats.

    `own` and `others` are the states of both models there.
    """
    base, lengths = subject.student.base, [len(row.ids) for row in answers.rows]
    ids = target_ids((row.ids for row in answers.rows), base.device)
    likely, apart = kl_of_states(base.model, torch.cat(own.states), torch.cat(others.states), ids)
    return list(likely.split(lengths)), list(apart.nan_to_num(nan=FAR, posinf=FAR).split(lengths))


def spread(values: Tensor, name: str) -> Row:
    """Return mean, median, 95th percentile and maximum as `<name>_mean`, `_p50`, `_p95` and `_max`."""
    at = values.quantile(torch.tensor([0.5, 0.95, 1.0])).tolist()
    return {f"{name}_mean": float(values.mean()), **{f"{name}_{n}": v for n, v in zip(SPREAD, at, strict=True)}}


@torch.no_grad()
def kl_of_states(model: PreTrainedModel, hidden: Tensor, others: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log q(id) and KL(p || q) [n], nats, on the CPU, of next tokens: p after `hidden` [n, d], q after `others`.

    The base's head serves both: no adapter changes it.
    """
    found = []
    for part in parts(model, hidden):
        log_p, log_q = (head(model, states[part].to(model.device)).log_softmax(-1) for states in (hidden, others))
        found.append(torch.stack([log_q.gather(-1, ids[part, None])[:, 0], kl_both(log_p, log_q)[1]]).cpu())
    likely, apart = torch.cat(found, dim=1)
    return likely, apart
