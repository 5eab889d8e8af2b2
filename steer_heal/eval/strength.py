"""How strongly a model is steered: KL(steered || unsteered student) at every position of the steered answers.

The unit and the positions are those of a barrier's divergence.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from steer_heal.artifacts import Completions, Metrics, answer_ids
from steer_heal.eval import Column, EvalInput, Evaluation, Who
from steer_heal.lm.kl import spread, steering_divergences
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime


class Strength(Evaluation, key="steer_heal.eval.strength.Strength"):
    """Mean, median, 95th percentile and maximum over all positions; an item is an answer, with its own mean."""

    columns: ClassVar = tuple(
        Column(f"kl_{name}", f"KL(steered || unsteered) per position, {about}", "nats")
        for name, about in (("mean", "mean"), ("p50", "median"), ("p95", "95th percentile"), ("max", "maximum"))
    )
    models: ClassVar[tuple[Who, ...]] = ("steered",)
    name: Literal["strength"]

    def material(self, given: EvalInput) -> Completions:
        return given.answers

    def measure(self, subject: Subject, material: Completions, runtime: Runtime) -> Metrics:
        found = steering_divergences(subject, material, runtime)
        items = {i: {"kl_mean": float(d.mean())} for i, d in zip(answer_ids(material.rows), found, strict=True)}
        return Metrics(spread(torch.cat(found), "kl"), items)
