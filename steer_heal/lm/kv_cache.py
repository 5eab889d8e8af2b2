"""Caches that write the keys and values of new tokens in place.

Separate from decode.py because importing transformers takes seconds, which a run that generates nothing need not spend.
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
    """Return the model's own kind of cache, with room for `room` tokens allocated up front in its plain layers."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def fixed(model: PreTrainedModel, room: int) -> Cache | None:
    """Return a cache that shows each block all its room at every step, so that shapes never change.

    Returns None for a model with other kinds of cache layers. The mask must hide positions that are not yet written or
    have left a block's window.
    """
    made: dict[type, Callable[[], CacheLayerMixin]] = {
        DynamicLayer: lambda: StaticLayer(room),
        DynamicSlidingWindowLayer: lambda: WindowedLayer(room),
        DummyLayer: DummyLayer,  # for a block that reads another block's cache
    }
    kinds = [type(layer) for layer in DynamicCache(config=model.config).layers]
    return Cache(layers=[made[kind]() for kind in kinds]) if kinds and all(kind in made for kind in kinds) else None


class WindowedLayer(StaticLayer):
    """The cache of a sliding-window block, keeping every position; transformers' own shifts the keys instead."""

    is_sliding = True


class RoomyLayer(DynamicLayer):
    """Keys and values of one block in buffers with room for all future tokens: a step writes only its own."""

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
        if not self.is_initialized:  # of a block that keeps nothing
            return
        self.buffers = [buffer.index_select(0, beam_idx) for buffer in self.buffers]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values
