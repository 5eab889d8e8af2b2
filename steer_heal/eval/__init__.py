"""Evaluations of a model: each is a file with a subclass of `Evaluation`."""

from __future__ import annotations

from typing import Any

from steer_heal.artifacts import Completions, Metrics
from steer_heal.config import Config
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime
from steer_heal.store import stage
from steer_heal.trait import Trait


class Evaluation(Config):
    """Subclasses set `name` and implement both methods."""

    name: str

    def material(self, trait: Trait, answers: Completions) -> Any:
        """Select what `measure` uses of the trait and of the subject's answers to the held-out prompts.

        It is part of the key: a result depends on it, on the option and on the subject, and on nothing else.
        """
        raise NotImplementedError(type(self))

    def measure(self, subject: Subject, material: Any, runtime: Runtime) -> dict[str, float]:
        """Figures by name."""
        raise NotImplementedError(type(self))


@stage("eval.evaluate")
def evaluate(evaluation: Evaluation, subject: Subject, material: Any, *, runtime: Runtime) -> Metrics:
    """One evaluation of one subject."""
    return Metrics(values=evaluation.measure(subject, material, runtime))
