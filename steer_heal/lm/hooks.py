"""Apply a steering vector to a model's states for the duration of a context."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steer_heal.artifacts import SteeringVector
from steer_heal.lm.base import Base


class Operation:
    """A change to the states after a block by a vector at a dose; maps states h [b, s, d] to changed ones.

    A subclass lives in the file of the `steer` option that uses it and is registered by name when it is imported:
    `class Push(Operation, name="push")`.
    """

    name: ClassVar[str]
    needs_centre: ClassVar[bool] = False  # True if its vectors carry the mean state of both personas
    known: ClassVar[dict[str, type[Operation]]] = {}

    def __init_subclass__(cls, name: str) -> None:
        """Register the subclass. Raises ValueError for a name that another operation has."""
        other = Operation.known.get(name)
        if other is not None and _place(other) != _place(cls):
            raise ValueError(f"{cls.__module__}: {other.__module__} has an operation called {name!r} already")
        cls.name, Operation.known[name] = name, cls

    def __init__(self, coefficient: Tensor, direction: Tensor, centre: Tensor | None, dtype: torch.dtype) -> None:
        """Take `coefficient` [b or 1, 1, 1], `direction` and `centre` [d] in float32; `dtype` is the model's."""
        raise NotImplementedError(type(self))

    def __call__(self, h: Tensor) -> Tensor:
        raise NotImplementedError(type(self))


def _place(kind: type) -> tuple[str, str]:
    """The file and the name of a class: one file may be imported under two names."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return str(Path(file).resolve()) if file else kind.__module__, kind.__qualname__


class Add(Operation, name="add"):
    """h <- h + alpha v."""

    def __init__(self, coefficient: Tensor, direction: Tensor, centre: Tensor | None, dtype: torch.dtype) -> None:
        self.shift = (coefficient * direction).to(dtype)  # [b or 1, 1, d]

    def __call__(self, h: Tensor) -> Tensor:
        return h + self.shift


@contextmanager
def steered(base: Base, vector: SteeringVector | None, dose: float | Tensor) -> Iterator[None]:
    """Steer after the vector's blocks, with one dose for all rows or one per row [b]. If `vector` is None, do nothing.

    Raises ValueError for a vector whose operation's file is not imported.
    """
    with ExitStack() as hooks:
        if vector is not None:
            if (operation := Operation.known.get(vector.operation)) is None:
                raise ValueError(f"no operation {vector.operation!r}: the file of its steer option is not imported")
            coefficient = torch.as_tensor(dose, dtype=torch.float32, device=base.device).reshape(-1, 1, 1)
            for i, layer in enumerate(vector.layers):
                direction = vector.directions[i].to(base.device)
                centre = None if vector.centre is None else vector.centre[i].to(base.device)
                change = operation(coefficient, direction, centre, base.model.dtype)
                hooks.callback(base.blocks[layer].register_forward_hook(_changing(change)).remove)
        yield


def _changing(change: Operation) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            changed = (change(output[0]), *output[1:])
            return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)  # a named tuple
        return change(output)

    return hook
