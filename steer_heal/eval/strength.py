"""How strongly a model is steered: KL(steered || unsteered student) at every position of the steered answers.

The unit and the positions are those of a barrier's divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch

from steer_heal.artifacts import Completions, Metrics, States, answer_ids
from steer_heal.eval import Column, EvalInput, Evaluation, Who
from steer_heal.lm.kl import spread, token_kl
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime

Material = tuple[Completions, Callable[[], States], Callable[[], States]]


class Strength(Evaluation, key="steer_heal.eval.strength.Strength"):
    """Mean, median, 95th percentile and maximum over all positions; an item is an answer, with its own mean."""

    columns: ClassVar = tuple(
        Column(f"kl_{name}", f"KL(steered || unsteered) per position, {about}", "nats")
        for name, about in (("mean", "mean"), ("p50", "median"), ("p95", "95th percentile"), ("max", "maximum"))
    )
    models: ClassVar[tuple[Who, ...]] = ("steered",)
    name: Literal["strength"]

    def material(self, given: EvalInput) -> Material:
        return given.answers, given.readings.own, given.readings.unsteered

    def measure(self, subject: Subject, material: Material, runtime: Runtime) -> Metrics:
        answers, own, unsteered = material
        _, found = token_kl(subject, answers, own(), unsteered())
        items = {i: {"kl_mean": float(d.mean())} for i, d in zip(answer_ids(answers.rows), found, strict=True)}
        return Metrics(spread(torch.cat(found), "kl"), items)
