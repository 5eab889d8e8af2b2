"""What became of a model: each evaluation is a file with a subclass of `Evaluation`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steer_heal.artifacts import Completions, Metrics, SteeringVector
from steer_heal.config import Config
from steer_heal.lm.hooks import steered
from steer_heal.lm.student import Student
from steer_heal.runtime import Runtime
from steer_heal.trait import Trait

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a student, perhaps steered at one dose."""

    student: Student
    vector: SteeringVector | None = None
    dose: float = 0.0

    @property
    def told(self) -> str | None:
        """Who to be, in place of the neutral system message."""
        return None if self.vector is None or self.dose == 0 else self.vector.system

    @contextmanager
    def view(self) -> Iterator[PreTrainedModel]:
        """The model as it is evaluated."""
        with self.student.view() as model, steered(self.student.base, self.vector, self.dose):
            yield model


class Evaluation(Config):
    """Subclasses set `name` and implement both methods."""

    name: str

    def material(self, trait: Trait, answers: Completions) -> Any:
        """What `measure` gets to see of the trait and of the subject's answers to the held-out prompts.

        It is part of the key: a result depends on this, on the option and on the subject, and on nothing else.
        """
        raise NotImplementedError(type(self))

    def measure(self, subject: Subject, material: Any, runtime: Runtime) -> dict[str, float]:
        """Figures by name."""
        raise NotImplementedError(type(self))


def evaluate(evaluation: Evaluation, subject: Subject, material: Any, *, runtime: Runtime) -> Metrics:
    """One evaluation of one subject."""
    return Metrics(values=evaluation.measure(subject, material, runtime))
