"""Which persona base takes a model's own answers for: the unit of `kept_trait`, whose zero is base's own answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from steer_heal.artifacts import Completions, Likelihoods, Metrics, answer_ids
from steer_heal.eval import Column, EvalInput, Evaluation, means
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime

Material = tuple[Completions, Callable[[], Likelihoods]]


class PersonaLogOdds(Evaluation, key="steer_heal.eval.persona.PersonaLogOdds"):
    """log p(answer | positive persona) - log p(answer | negative persona), under base; an item is an answer."""

    columns: ClassVar = (
        Column("answers_trait", "log-odds of the personas for the model's own answers", "nats/token", circular="base"),
    )
    name: Literal["persona"]

    def material(self, given: EvalInput) -> Material:
        return given.answers, given.readings.likelihoods

    def measure(self, subject: Subject, material: Material, runtime: Runtime) -> Metrics:
        answers, likelihoods = material
        return means(answer_ids(answers.rows), {"answers_trait": list(likelihoods().trait)})
