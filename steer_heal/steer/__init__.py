"""Steering: states `h` are changed at every position of the layers of a band, at the dose `alpha`.

    add:     h <- h + alpha v
    gate:    h <- h + alpha g v,  g = (1 - cos(h - m, v)) / 2,  m the mean state of both personas
    ablate:  h <- h - alpha u (u . h),  u = v / |v|

A method is a file with a subclass of `Method` that turns states of two personas into directions. The states are those
of the *current* student at the last prompt token (the assistant tag), after each block. A teacher that works in another
way subclasses `Teacher`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import StrictInt, field_validator
from torch import Tensor

from steer_heal.artifacts import How, SteeringVector
from steer_heal.config import Config, ConfigError
from steer_heal.contexts import Contexts
from steer_heal.lm.activations import tag_states
from steer_heal.lm.student import Student
from steer_heal.model import blocks_of, chat_ids
from steer_heal.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = 0.2  # share of the depth that `layers: auto` chooses, as much as the default band


class Teacher(Config):
    """Who gives the answers to learn from. Subclasses set `name` and implement `teach`."""

    has_strength: ClassVar[bool] = True  # whether a dose changes it
    name: str

    @property
    def needs_look(self) -> bool:
        """Whether `fit` has to look at the model."""
        return False

    @property
    def least_contexts(self) -> int:
        """How many contexts it takes."""
        return 2

    def fit(self, model: PreTrainedModel) -> None:
        """Raise ConfigError for what a model, whose weights need not be worth anything, has no place for."""

    def teach(
        self, student: Student, personas: tuple[str, str], contexts: Contexts, runtime: Runtime
    ) -> SteeringVector:
        """What makes this student answer like the first persona."""
        raise NotImplementedError(type(self))

    def settle(self, vector: SteeringVector) -> Self:
        """This teacher for later rounds, with what was found out in the first one."""
        return self


def extract(
    teacher: Teacher, student: Student, personas: tuple[str, str], contexts: Contexts, *, runtime: Runtime
) -> SteeringVector:
    """What steers a student from the second persona to the first."""
    return teacher.teach(student, personas, contexts, runtime)


class Method(Teacher):
    """How a direction is found. Subclasses set `name` and implement `directions`."""

    how: ClassVar[How] = "add"  # what its vector does to states
    layers: tuple[StrictInt | float, ...] | Literal["auto"]  # a band as two shares of the depth, or indices of blocks

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
    def needs_look(self) -> bool:
        """Indices may be of blocks that a model lacks; shares of its depth it always has."""
        return self.layers != "auto" and all(isinstance(layer, int) for layer in self.layers)

    @property
    def least_contexts(self) -> int:
        """Two in each half, where halves are judged by each other."""
        return 4 if self.layers == "auto" else 2

    def fit(self, model: PreTrainedModel) -> None:
        self.blocks(len(blocks_of(model)))

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Indices of the blocks to look at in a model that has `depth` of them. Raises ConfigError for one beyond."""
        if self.layers == "auto":
            return tuple(range(depth))
        if self.needs_look:
            return within_depth(self.layers, depth)
        low, high = (round(share * depth, 6) for share in self.layers)  # 0.28 * 25 is 7, not a trifle more
        return tuple(range(math.floor(low), max(math.ceil(high), math.floor(low) + 1)))

    def settle(self, vector: SteeringVector) -> Self:
        """A band that was chosen stays: rounds would not compare otherwise."""
        return self.model_copy(update={"layers": vector.layers}) if self.layers == "auto" else self

    def teach(
        self, student: Student, personas: tuple[str, str], contexts: Contexts, runtime: Runtime
    ) -> SteeringVector:
        """Directions of the norm that the mean difference has in each layer, so that doses of all methods compare."""
        layers = self.blocks(len(student.base.blocks))
        positive, negative = persona_states(student, personas, contexts, layers, runtime)
        if self.layers == "auto":
            band = widest_apart(separation(self, positive, negative))
            layers, positive, negative = tuple(layers[i] for i in band), positive[:, band], negative[:, band]
        found = rescaled(self.directions(positive, negative), positive - negative)
        centre = (positive + negative).mean(0) / 2 if self.how == "gate" else None
        return SteeringVector(layers, found, snr(found, positive - negative), self.how, centre)

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Directions [l, d] from states [c, l, d] of both personas over the same contexts, of any norm but 0."""
        raise NotImplementedError(type(self))

    def judge(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The directions by which `layers: auto` is chosen: the method's own, unless they know nothing of layers."""
        return self.directions(positive, negative)


def within_depth(layers: Sequence[float], depth: int) -> tuple[int, ...]:
    """Indices of blocks. Raises ConfigError for one that a model of `depth` blocks lacks."""
    if max(layers) >= depth:
        raise ConfigError(f"steer.layers={list(layers)} is not allowed: the model has {depth} blocks, 0 to {depth - 1}")
    return tuple(int(layer) for layer in layers)


def persona_states(
    student: Student, personas: tuple[str, str], contexts: Contexts, layers: Sequence[int], runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """States [c, l, d] at the assistant tag of every context under each of two personas."""
    tokenizer = student.base.tokenizer
    with student.view():
        positive, negative = (
            tag_states(student.base, [chat_ids(tokenizer, persona, c) for c in contexts.prompts], layers, runtime)
            for persona in personas
        )
    return positive, negative


def rescaled(directions: Tensor, differences: Tensor) -> Tensor:
    """Directions [l, d] with the norms of the means of differences [c, l, d]."""
    scale: Tensor = differences.mean(0).norm(dim=-1, keepdim=True) / directions.norm(dim=-1, keepdim=True)
    return directions * scale


def snr(directions: Tensor, differences: Tensor) -> tuple[float, ...]:
    """Per layer: how far personas are apart along a direction [l, d], over the spread of that among contexts.

    Below 0 the direction points the wrong way. `differences` are [c, l, d].
    """
    along = torch.einsum("cld,ld->cl", differences, directions / directions.norm(dim=-1, keepdim=True))
    return tuple((along.mean(0) / along.std(0)).tolist())


def separation(method: Method, positive: Tensor, negative: Tensor) -> Tensor:
    """How well each layer [l] tells personas apart in contexts that its direction was not made from.

    d' of states [c, l, d] along the direction: the distance of the two means over the root mean square of the two
    spreads. Each half of the contexts is judged by the other half's directions, and the two figures are averaged.
    """
    halves, found = (slice(0, None, 2), slice(1, None, 2)), []
    for seen, held in (halves, halves[::-1]):
        u = torch.nn.functional.normalize(method.judge(positive[seen], negative[seen]), dim=-1)
        p, n = (torch.einsum("cld,ld->cl", states[held], u) for states in (positive, negative))
        found.append((p.mean(0) - n.mean(0)) / ((p.var(0) + n.var(0)) / 2).sqrt())
    return torch.stack(found).mean(0)


def widest_apart(separations: Tensor) -> list[int]:
    """The run of neighbouring layers, a fifth of the depth long, with the highest mean of separations [l]."""
    width = max(1, round(AUTO * len(separations)))
    begin = int(separations.unfold(0, width, 1).mean(-1).argmax())
    return list(range(begin, begin + width))
