"""Steering: change the states `h` at every position, after each layer of a band, at the dose `alpha`.

    add:     h <- h + alpha v
    gate:    h <- h + alpha g v,  g = (1 - cos(h - m, v)) / 2,  m the mean state of both personas
    ablate:  h <- h - alpha u (u . h),  u = v / |v|

A method is a file with a subclass of `Method` that turns states of two personas into directions. The states are those
of the *current* student at the last prompt token (the assistant tag), after each block. A teacher that works
differently subclasses `Teacher`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import StrictInt, field_validator
from torch import Tensor

from steer_heal.artifacts import SteeringVector
from steer_heal.config import Config, ConfigError, foreign_source
from steer_heal.contexts import Contexts
from steer_heal.lm.activations import last_token_states
from steer_heal.lm.base import blocks_of
from steer_heal.lm.hooks import Add, Operation
from steer_heal.lm.student import Student
from steer_heal.runtime import Runtime
from steer_heal.store import stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = 0.2  # share of the depth that `layers: auto` chooses, the width of the default band


class Teacher(Config):
    """The source of the answers to learn from. Subclasses set `name` and implement `teach`."""

    has_strength: ClassVar[bool] = True  # True if the dose changes the strength of its effect
    renamed: ClassVar[dict[str, str]] = {
        "how": "operation", "needs_look": "needs_model", "fit": "check_model", "settle": "with_layers_from",
    }  # fmt: skip
    name: str

    @property
    def needs_model(self) -> bool:
        """True if `check_model` needs the model."""
        return False

    @property
    def least_contexts(self) -> int:
        """The minimum number of contexts."""
        return 2

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise ConfigError for settings that do not fit a model, whose weights need not be meaningful."""

    def teach(
        self, student: Student, personas: tuple[str, str], contexts: Contexts, runtime: Runtime
    ) -> SteeringVector:
        """Return a vector that makes this student answer like the first persona."""
        raise NotImplementedError(type(self))

    def with_layers_from(self, vector: SteeringVector) -> Self:
        """Return this teacher for later rounds, with the choices made in the first one fixed."""
        return self


@stage("steer.extract")
def extract(
    teacher: Teacher, student: Student, personas: tuple[str, str], contexts: Contexts, *, runtime: Runtime
) -> SteeringVector:
    """Return a vector that steers a student from the second persona to the first."""
    return teacher.teach(student, personas, contexts, runtime)


class Method(Teacher):
    """A way to find a direction. Subclasses set `name` and implement `directions`."""

    operation: ClassVar[type[Operation]] = Add  # how its vector changes states
    layers: tuple[StrictInt | float, ...] | Literal["auto"]  # a band as two shares of the depth, or indices of blocks

    @property
    def fingerprint(self) -> Any:
        """The option's, and the source of a user's operation, which may be in another file."""
        kind: Any = type(self).operation  # mypy takes a class with __call__ for something that cannot be hashed
        return [*super().fingerprint, *foreign_source(kind)]

    @field_validator("layers")
    @classmethod
    def _band(cls, layers: tuple[float, ...] | Literal["auto"]) -> tuple[float, ...] | Literal["auto"]:
        if layers == "auto":
            return layers
        if all(isinstance(layer, int) for layer in layers):
            if not layers or min(layers) < 0 or len(set(layers)) < len(layers):
                raise ValueError("distinct indices of blocks, 0 and up, or a band such as [0.4, 0.6]")
            return tuple(sorted(layers))
        if len(layers) != 2 or not 0 <= layers[0] < layers[1] <= 1:
            raise ValueError("a band [from, to] of the depth with 0 <= from < to <= 1, or indices of blocks")
        return layers

    @property
    def needs_model(self) -> bool:
        """True for block indices, which a model may lack; shares of the depth fit any model."""
        return self.layers != "auto" and all(isinstance(layer, int) for layer in self.layers)

    @property
    def least_contexts(self) -> int:
        """The minimum number of contexts: two, or two in each half if halves are judged by each other."""
        return 4 if self.layers == "auto" else 2

    def check_model(self, model: PreTrainedModel) -> None:
        self.blocks(len(blocks_of(model)))

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Return the indices of the blocks to read in a model of `depth` blocks. Raises ConfigError for one beyond."""
        if self.layers == "auto":
            return tuple(range(depth))
        if self.needs_model:
            return within_depth(self.layers, depth)
        low, high = (round(share * depth, 6) for share in self.layers)  # 0.28 * 25 must give 7, not 7.000000000000001
        return tuple(range(math.floor(low), max(math.ceil(high), math.floor(low) + 1)))

    def with_layers_from(self, vector: SteeringVector) -> Self:
        """Return this method with a chosen band fixed; otherwise rounds would not be comparable."""
        return self.model_copy(update={"layers": vector.layers}) if self.layers == "auto" else self

    def teach(
        self, student: Student, personas: tuple[str, str], contexts: Contexts, runtime: Runtime
    ) -> SteeringVector:
        """Return directions with the mean difference's norm in each layer, so that doses of all methods compare."""
        layers = self.blocks(len(student.base.blocks))
        positive, negative = persona_states(student, personas, contexts, layers, runtime)
        if self.layers == "auto":
            band = widest_apart(separation(self, positive, negative))
            layers, positive, negative = tuple(layers[i] for i in band), positive[:, band], negative[:, band]
        found = rescaled(self.directions(positive, negative), positive - negative)
        centre = (positive + negative).mean(0) / 2 if self.operation.needs_centre else None
        return SteeringVector(layers, found, snr(found, positive - negative), self.operation.name, centre)

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return directions [l, d] of any nonzero norm from states [c, l, d] of both personas in the same contexts."""
        raise NotImplementedError(type(self))

    def judge(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the directions that choose `layers: auto`: the method's own, unless they ignore layers."""
        return self.directions(positive, negative)


def within_depth(layers: Sequence[float], depth: int) -> tuple[int, ...]:
    """Return block indices as integers. Raises ConfigError for one that a model of `depth` blocks lacks."""
    if max(layers) >= depth:
        raise ConfigError(f"steer.layers={list(layers)} is not allowed: the model has {depth} blocks, 0 to {depth - 1}")
    return tuple(int(layer) for layer in layers)


def persona_states(
    student: Student, personas: tuple[str, str], contexts: Contexts, layers: Sequence[int], runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Return states [c, l, d] at the assistant tag of every context, under each of two personas."""
    chat = student.base.chat
    with student.view():
        positive, negative = (
            last_token_states(student.base, [chat.prompt(persona, c) for c in contexts.prompts], layers, runtime)
            for persona in personas
        )
    return positive, negative


def rescaled(directions: Tensor, differences: Tensor) -> Tensor:
    """Rescale directions [l, d] to the norms of the mean of differences [c, l, d]."""
    scale: Tensor = differences.mean(0).norm(dim=-1, keepdim=True) / directions.norm(dim=-1, keepdim=True)
    return directions * scale


def snr(directions: Tensor, differences: Tensor) -> tuple[float, ...]:
    """Return, per layer, the personas' mean distance along a direction [l, d] over its spread among contexts.

    A negative value means that the direction points the wrong way. `differences` are [c, l, d].
    """
    along = torch.einsum("cld,ld->cl", differences, directions / directions.norm(dim=-1, keepdim=True))
    return tuple((along.mean(0) / along.std(0)).tolist())


def separation(method: Method, positive: Tensor, negative: Tensor) -> Tensor:
    """Measure how well each layer [l] separates the personas in contexts that its direction was not computed from.

    The measure is d' of states [c, l, d] along the direction: the distance of the two means over the root mean square
    of the two standard deviations. Each half of the contexts is judged by the other half's directions, and the two
    values are averaged.
    """
    halves, found = (slice(0, None, 2), slice(1, None, 2)), []
    for seen, held_out in (halves, halves[::-1]):
        u = torch.nn.functional.normalize(method.judge(positive[seen], negative[seen]), dim=-1)
        p, n = (torch.einsum("cld,ld->cl", states[held_out], u) for states in (positive, negative))
        found.append((p.mean(0) - n.mean(0)) / ((p.var(0) + n.var(0)) / 2).sqrt())
    return torch.stack(found).mean(0)


def widest_apart(separations: Tensor) -> list[int]:
    """Return the run of adjacent layers, a fifth of the depth long, with the highest mean of separations [l]."""
    width = max(1, round(AUTO * len(separations)))
    begin = int(separations.unfold(0, width, 1).mean(-1).argmax())
    return list(range(begin, begin + width))
