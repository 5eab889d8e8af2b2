"""What became of a model: each evaluation is a file with a subclass of `Evaluation`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from steer_heal.artifacts import Completions, Metrics, SteeringVector
from steer_heal.config import Config
from steer_heal.runtime import Runtime
from steer_heal.steer import steered
from steer_heal.student import Student
from steer_heal.trait import Trait


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a student, perhaps steered at one dose, and its answers to the held-out prompts."""

    student: Student
    answers: Completions
    vector: SteeringVector | None = None
    dose: float = 0.0

    @contextmanager
    def view(self) -> Iterator[PreTrainedModel]:
        """The model as it is evaluated."""
        with self.student.view() as model, steered(self.student.base, self.vector, self.dose):
            yield model


class Evaluation(Config):
    """Subclasses set `name` and implement `measure`."""

    name: str

    def measure(self, subject: Subject, trait: Trait, runtime: Runtime) -> dict[str, float]:
        """Figures by name."""
        raise NotImplementedError(type(self))


def evaluate(evaluation: Evaluation, subject: Subject, trait: Trait, *, runtime: Runtime) -> Metrics:
    """One evaluation of one subject."""
    return Metrics(values=evaluation.measure(subject, trait, runtime))
