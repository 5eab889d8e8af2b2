"""A steering vector at work: what it does to a model's states, as long as a context lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steer_heal.artifacts import SteeringVector
from steer_heal.model import Base

Change = Callable[[Tensor], Tensor]  # states [b, s, d] -> states


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
