"""The student: the pristine base plus what the rounds so far have learned."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steer_heal.artifacts import Adapter
from steer_heal.model import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Student:
    """Base, history and gate. Every use of the model goes through `view`.

    Raises ValueError for a gate that is not finite.
    """

    base: Base
    history: tuple[Adapter, ...] = ()
    gate: float = 1.0  # scales all that was learned: 0 is the base, 1 the student

    def __post_init__(self) -> None:
        if not math.isfinite(self.gate):
            raise ValueError(f"gate={self.gate!r}: must be a finite number")

    @property
    def fingerprint(self) -> str:
        """Of the base, of what every round learned, and of the gate where there is one.

        Raises TypeError for an adapter that the store does not know.
        """
        if not all(adapter.key for adapter in self.history):
            raise TypeError("a student with an unpublished Adapter has no fingerprint")
        gate = [f"gate={self.gate + 0.0!r}"] if self.history and self.gate != 1 else []  # + 0.0: 2 is 2.0, -0.0 is 0.0
        return " ".join([self.base.fingerprint, *(adapter.key for adapter in self.history), *gate])

    def pristine(self) -> Student:
        """The base alone."""
        return Student(self.base)

    def learn(self, adapter: Adapter) -> Student:
        """This student with one more round learned. Raises ValueError for a gated one, of which no round is defined."""
        if self.gate != 1:
            raise ValueError(f"a student with gate={self.gate!r} cannot learn a round; only one with gate=1 can")
        return Student(self.base, (*self.history, adapter))

    def gated(self, c: float) -> Student:
        """This student with all that it learned scaled by `c`. Raises ValueError for a `c` that is not finite."""
        return replace(self, gate=c)

    @contextmanager
    def view(self) -> Iterator[PreTrainedModel]:
        """The model with weights `W0 + gate * sum of deltas`, summed in float32 and rounded once.

        Tensors are swapped in and the original ones are swapped back, so that leaving restores every bit. The cost
        does not depend on the history.

        Where a weight cannot be summed (see `summable`) a hook adds what was learned to the module's output instead,
        also beneath a live adapter. That cost grows with the history: at a rank of 112 in all, a forward and backward
        pass of a 135M body took a fifth longer than in the dense view (PEFT's stacked adapters: 1,613 ms for 1,124).
        """
        from transformers.pytorch_utils import Conv1D

        originals: dict[nn.Parameter, Tensor] = {}
        hooks = []
        try:
            for name, adapters in self._learned().items():
                module = self.base.model.get_submodule(name)
                if not summable(module):
                    a, b = _factors(name, adapters, self.base.device)
                    dtype = self.base.model.dtype
                    hooks.append(module.register_forward_hook(_adding(a.to(dtype), (self.gate * b).to(dtype))))
                    continue
                weight, delta = module.weight, _delta(name, adapters, self.base.device)
                assert isinstance(weight, nn.Parameter)
                originals[weight] = weight.data
                oriented = delta.T if isinstance(module, Conv1D) else delta
                weight.data = torch.add(weight.data.float(), oriented, alpha=self.gate).to(weight.dtype)
            yield self.base.model
        finally:
            for hook in hooks:
                hook.remove()
            for weight, data in originals.items():
                weight.data = data

    def _learned(self) -> dict[str, list[Adapter]]:
        """The adapters of every module that a view changes, by its name."""
        holders: dict[str, list[Adapter]] = defaultdict(list)
        if self.gate != 0:  # adding 0 would turn a weight of -0.0 into 0.0
            for adapter in self.history:
                for name in adapter.modules():
                    holders[name].append(adapter)
        return holders


def summable(module: nn.Module) -> bool:
    """Whether a linear module multiplies by its weight as it stands, so that a change of the weight can be added to it.

    That of a quantised layer is packed, and a subclass may do anything with its own.
    """
    from transformers.pytorch_utils import Conv1D

    if type(module) not in (nn.Linear, Conv1D):
        return False
    return type(module.weight) is nn.Parameter and module.weight.is_floating_point()


def _delta(name: str, adapters: Sequence[Adapter], device: torch.device) -> Tensor:
    """The sum of what adapters learned for one module, float32 [out, in]."""
    delta = adapters[0].delta(name, device)
    for adapter in adapters[1:]:
        delta += adapter.delta(name, device)
    return delta


def _factors(name: str, adapters: Sequence[Adapter], device: torch.device) -> tuple[Tensor, Tensor]:
    """A [r, in] and scaled B [out, r] of one module, float32; r is the sum of the adapters' ranks, and B A `_delta`."""
    pairs = [adapter.pair(name, device) for adapter in adapters]
    scaled = [adapter.scaling * b for adapter, (_, b) in zip(adapters, pairs, strict=True)]
    return torch.cat([a for a, _ in pairs]), torch.cat(scaled, dim=1)


def _adding(a: Tensor, b: Tensor) -> Any:
    """A forward hook that adds `(x A^T) B^T` [..., out] to the output for x [..., in]."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low = nn.functional.linear(inputs[0].to(a.dtype), a)  # [..., r]
        return output + nn.functional.linear(low, b).to(output.dtype)

    return hook
