"""KL between two models on text that one of them generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer_heal.artifacts import Completions, Metrics, Row, States
from steer_heal.lm.base import head
from steer_heal.lm.batch import Pair
from steer_heal.lm.divergence import kl_rev
from steer_heal.lm.score import parts
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
    return Metrics(spread(torch.cat(divergences(subject, own, unsteered)), "kl"))


def divergences(subject: Subject, own: States, others: States) -> list[Tensor]:
    """Return KL(subject || other) [c], nats, at every token of each answer, from the states of both there."""
    base, lengths = subject.student.base, [len(part) for part in own.states]
    found = kl_of_states(base.model, torch.cat(own.states), torch.cat(others.states))
    return list(found.nan_to_num(nan=FAR, posinf=FAR).split(lengths))


def spread(values: Tensor, name: str) -> Row:
    """Return mean, median, 95th percentile and maximum as `<name>_mean`, `_p50`, `_p95` and `_max`."""
    at = values.quantile(torch.tensor([0.5, 0.95, 1.0])).tolist()
    return {f"{name}_mean": float(values.mean()), **{f"{name}_{n}": v for n, v in zip(SPREAD, at, strict=True)}}


@torch.no_grad()
def kl_of_states(model: PreTrainedModel, hidden: Tensor, others: Tensor) -> Tensor:
    """Return KL(p || q) [n], nats, on the CPU, of the next tokens p after states `hidden` [n, d] and q after `others`.

    The base's head serves both: no adapter changes it.
    """
    found = []
    for part in parts(model, hidden):
        here, there = (head(model, states[part].to(model.device)) for states in (hidden, others))
        found.append(kl_rev(here, there).cpu())
    return torch.cat(found)
