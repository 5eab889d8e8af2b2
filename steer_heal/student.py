"""The student: the pristine base plus what the rounds so far have learned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from steer_heal.artifacts import Adapter
from steer_heal.model import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Student:
    """Base and history. Every use of the model goes through `view`, whose cost does not depend on the history."""

    base: Base
    history: tuple[Adapter, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of the base and of what every round learned. Raises TypeError for an adapter that the store does not know."""
        if not all(adapter.key for adapter in self.history):
            raise TypeError("a student with an unpublished Adapter has no fingerprint")
        return " ".join([self.base.fingerprint, *(adapter.key for adapter in self.history)])

    def pristine(self) -> Student:
        """The base alone."""
        return Student(self.base)

    def learn(self, adapter: Adapter) -> Student:
        """This student with one more round learned."""
        return Student(self.base, (*self.history, adapter))

    @contextmanager
    def view(self) -> Iterator[PreTrainedModel]:
        """The model with weights `W0 + sum of deltas`, summed in float32 and rounded once.

        Tensors are swapped in and the original ones are swapped back, so that leaving restores every bit.
        """
        from transformers.pytorch_utils import Conv1D

        originals: dict[nn.Parameter, Tensor] = {}
        try:
            for module, delta in self._deltas():
                weight = module.weight
                assert isinstance(weight, nn.Parameter)
                originals[weight] = weight.data
                oriented = delta.T if isinstance(module, Conv1D) else delta
                weight.data = (weight.data.float() + oriented).to(weight.dtype)
            yield self.base.model
        finally:
            for weight, data in originals.items():
                weight.data = data

    def _deltas(self) -> Iterator[tuple[nn.Module, Tensor]]:
        holders: dict[str, list[Adapter]] = defaultdict(list)
        for adapter in self.history:
            for name in adapter.modules():
                holders[name].append(adapter)
        for name, adapters in holders.items():
            delta = adapters[0].delta(name, self.base.device)
            for adapter in adapters[1:]:
                delta += adapter.delta(name, self.base.device)
            yield self.base.model.get_submodule(name), delta
