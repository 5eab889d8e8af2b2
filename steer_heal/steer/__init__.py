"""Steering: states `h` are changed at every position of the layers of a band, at the dose `alpha`.

    add:     h <- h + alpha v
    gate:    h <- h + alpha g v,  g = (1 - cos(h - m, v)) / 2,  m the mean state of both personas
    ablate:  h <- h - alpha u (u . h),  u = v / |v|

A method is a file with a subclass of `Method` that turns states of two personas into directions. The states are those
of the *current* student at the last prompt token (the assistant tag), after each block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import StrictInt, field_validator
from torch import Tensor, nn

from steer_heal.artifacts import How, SteeringVector
from steer_heal.batch import by_length
from steer_heal.config import Config, ConfigError
from steer_heal.contexts import Contexts
from steer_heal.model import Base, chat_ids
from steer_heal.progress import bar
from steer_heal.runtime import Runtime
from steer_heal.student import Student

Change = Callable[[Tensor], Tensor]  # states [b, s, d] -> states


class Method(Config):
    """How a direction is found. Subclasses set `name` and implement `directions`."""

    how: ClassVar[How] = "add"  # what its vector does to states
    name: str
    layers: tuple[StrictInt | float, ...]  # a band as two shares of the depth, or indices of blocks

    @field_validator("layers")
    @classmethod
    def _band(cls, layers: tuple[float, ...]) -> tuple[float, ...]:
        if all(isinstance(layer, int) for layer in layers):
            if not layers or min(layers) < 0 or len(set(layers)) < len(layers):
                raise ValueError("distinct indices of blocks, 0 and up, or a band such as [0.4, 0.6]")
        elif len(layers) != 2 or not 0 <= layers[0] < layers[1] <= 1:
            raise ValueError("a band [from, to] of the depth with 0 <= from < to <= 1, or indices of blocks")
        return layers

    @property
    def names_blocks(self) -> bool:
        """Whether `layers` are indices, which a model may lack, and not shares of its depth."""
        return all(isinstance(layer, int) for layer in self.layers)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Indices of the steered blocks of a model that has `depth` of them. Raises ConfigError for one beyond them."""
        if self.names_blocks:
            if max(self.layers) >= depth:
                raise ConfigError(
                    f"steer.layers={list(self.layers)} is not allowed: the model has {depth} blocks, 0 to {depth - 1}"
                )
            return tuple(int(layer) for layer in self.layers)
        low, high = (round(share * depth, 6) for share in self.layers)  # 0.28 * 25 is 7, not a trifle more
        return tuple(range(math.floor(low), max(math.ceil(high), math.floor(low) + 1)))

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Directions [l, d] from states [c, l, d] of both personas over the same contexts, of any norm but 0."""
        raise NotImplementedError(type(self))


def extract(
    method: Method, student: Student, personas: tuple[str, str], contexts: Contexts, *, runtime: Runtime
) -> SteeringVector:
    """The steering vector from the second persona to the first in a student.

    Each layer's direction has the norm of the mean difference there, so that doses of all methods compare.
    """
    layers = method.blocks(len(student.base.blocks))
    tokenizer = student.base.tokenizer
    with student.view():
        positive, negative = (
            tag_states(student.base, [chat_ids(tokenizer, persona, c) for c in contexts.prompts], layers, runtime)
            for persona in personas
        )
    differences = positive - negative  # [c, l, d]
    mean = differences.mean(0)
    along = torch.einsum("cld,ld->cl", differences, mean / mean.norm(dim=-1, keepdim=True))
    snr = mean.norm(dim=-1) / along.std(0)
    found = method.directions(positive, negative)
    scale = mean.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True)
    centre = (positive + negative).mean(0) / 2 if method.how == "gate" else None
    return SteeringVector(layers, found * scale, tuple(snr.tolist()), method.how, centre)


@torch.no_grad()
def tag_states(base: Base, prompts: Sequence[Sequence[int]], layers: Sequence[int], runtime: Runtime) -> Tensor:
    """States [c, l, d] after the given blocks at the last token of each prompt, float32 on the CPU."""
    found = torch.empty(len(prompts), len(layers), base.model.config.get_text_config().hidden_size)
    with bar("extract", len(prompts)) as advance:
        for group in by_length(prompts, runtime.score_batch):
            width = max(len(prompts[i]) for i in group)
            ids = torch.tensor([[*prompts[i], *[base.pad_id] * (width - len(prompts[i]))] for i in group])
            rows, last = torch.arange(len(group)), torch.tensor([len(prompts[i]) - 1 for i in group])
            seen: dict[int, Tensor] = {}  # by block: hooks run in the model's order, whatever the order of `layers`
            hooks = [
                base.blocks[layer].register_forward_hook(
                    lambda _m, _i, out, layer=layer: seen.update({layer: _hidden(out)[rows, last].float().cpu()})
                )
                for layer in layers
            ]
            try:
                base.model.base_model(input_ids=ids.to(base.device), use_cache=False)
            finally:
                for hook in hooks:
                    hook.remove()
            found[torch.tensor(group)] = torch.stack([seen[layer] for layer in layers], dim=1)
            advance(len(group))
    return found


@contextmanager
def steered(base: Base, vector: SteeringVector | None, dose: float | Tensor) -> Iterator[None]:
    """Steer after the vector's blocks; a dose for all rows, or one a row [b]. None steers nothing."""
    hooks = []
    if vector is not None:
        coefficient = torch.as_tensor(dose, dtype=torch.float32, device=base.device).reshape(-1, 1, 1)
        for i, layer in enumerate(vector.layers):
            direction = vector.directions[i].to(base.device)
            shift, unit = (coefficient * direction).to(base.model.dtype), direction / direction.norm()
            change: Change
            if vector.how == "add":
                change = partial(torch.add, other=shift)
            elif vector.how == "gate":
                assert vector.centre is not None
                change = partial(_gated, shift=shift, unit=unit, centre=vector.centre[i].to(base.device))
            else:
                change = partial(_ablated, coefficient=coefficient, unit=unit)
            hooks.append(base.blocks[layer].register_forward_hook(_changing(change)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gated(h: Tensor, shift: Tensor, unit: Tensor, centre: Tensor) -> Tensor:
    """h [b, s, d] and as much of the shift [b or 1, 1, d] as it points away from `unit` [d], seen from `centre` [d]."""
    away = h.float() - centre
    cosine = (away @ unit) / away.norm(dim=-1).clamp(min=1e-12)  # [b, s]
    changed: Tensor = h + ((1 - cosine) / 2)[..., None].to(h.dtype) * shift
    return changed


def _ablated(h: Tensor, coefficient: Tensor, unit: Tensor) -> Tensor:
    """h [b, s, d] without so much [b or 1, 1, 1] of what it has along `unit` [d]."""
    wide = h.float()
    return (wide - coefficient * (wide @ unit)[..., None] * unit).to(h.dtype)


def _changing(change: Change) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)((change(output[0]), *output[1:]))
        return change(output)

    return hook


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden
