"""Keys and values of earlier tokens, kept where they are.

Apart from decode.py because importing transformers takes seconds, which a run that generates nothing is spared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def roomy(model: PreTrainedModel, room: int) -> DynamicCache:
    """A model's own kind of cache, whose plain blocks have room for so many tokens from the start."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def fixed(model: PreTrainedModel, room: int) -> Cache | None:
    """A cache that shows a block all its room at every step, so that no shape changes; None where a block needs more.

    What is not yet written, or has left a block's window, is left to the mask.
    """
    made: dict[type, Callable[[], CacheLayerMixin]] = {
        DynamicLayer: lambda: StaticLayer(room),
        DynamicSlidingWindowLayer: lambda: WindowedLayer(room),
        DummyLayer: DummyLayer,  # of a block that looks at what another keeps
    }
    kinds = [type(layer) for layer in DynamicCache(config=model.config).layers]
    return Cache(layers=[made[kind]() for kind in kinds]) if kinds and all(kind in made for kind in kinds) else None


class WindowedLayer(StaticLayer):
    """A block that looks back over a window only, and keeps everything; transformers' own turns the keys around."""

    is_sliding = True


class RoomyLayer(DynamicLayer):
    """Keys and values of one block in buffers with room for all tokens to come: a step writes only its own."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [
                new.new_empty(*new.shape[:2], self.room, new.shape[3]) for new in (key_states, value_states)
            ]
        begin, self.length = self.length, self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin : self.length] = new
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.buffers = [buffer.index_select(0, beam_idx) for buffer in self.buffers]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values
