"""No vector: the teacher is the student with the persona as its system message, the baseline for every vector.

    teacher(y | x) = student(y | positive persona, x),   and what is learned is   student(y | neutral, x)

Its answers are learned under the neutral system message, which is context distillation (Askell et al. 2021,
arXiv:2112.00861). It has no strength to choose: each dose is one more answer to a prompt.
Raw text has no system message and so is unaffected, which makes half of its steered damage 0: compare healed models.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from steer_heal.artifacts import SteeringVector
from steer_heal.contexts import Contexts
from steer_heal.lm.student import Student
from steer_heal.runtime import Runtime
from steer_heal.steer import Teacher


class Prompt(Teacher, key="steer_heal.steer.prompt.Prompt"):
    """The student, given a persona as its system message."""

    has_strength: ClassVar[bool] = False
    name: Literal["prompt"]

    def teach(
        self, student: Student, personas: tuple[str, str], contexts: Contexts, runtime: Runtime
    ) -> SteeringVector:
        return SteeringVector((), torch.empty(0, 0), (), system=personas[0])
