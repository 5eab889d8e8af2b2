"""Decode a batch token by token; each row has its own steering coefficient and leaves the batch once it has ended.

Differs from transformers' `generate` in that keys and values are written in place instead of being copied in full at
every step, and that rows that have ended leave the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from loguru import logger
from torch import Tensor
from torch.nn.functional import pad

from steer_heal.artifacts import SteeringVector
from steer_heal.lm.base import Base, body, head
from steer_heal.lm.cuda_graph import recorded
from steer_heal.lm.hooks import steered

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

CROWDED = 0.75  # drop ended rows only once at most this share is active: dropping copies the cache
CROWDED_GRAPH = 0.5  # the same for steps that are graphs, which each batch size needs recorded anew

Choose = Callable[[Tensor, Tensor, int], Tensor]  # logits [b, v] float32, rows [b], step -> each row's next id [b]
Keep = Callable[[Tensor, Tensor, int], None]  # states [b, d], rows [b], step


class _Forward:
    """The states that predict the next tokens, computed from the tokens that the model has not seen yet."""

    crowded = CROWDED

    def __init__(self, model: PreTrainedModel, room: int) -> None:
        from steer_heal.lm.kv_cache import roomy

        takes = inspect.signature(body(model).forward).parameters
        self.model, self.takes_positions = model, "position_ids" in takes
        self.keeps = next((name for name in ("past_key_values", "cache_params") if name in takes), None)
        self.cache: Cache = roomy(model, room)
        self.fed = 0

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return states [b, d] after ids [b, s]; mask [b, s] is 0 at padding, which is on the left."""
        new = ids[:, self.fed :]
        given: dict[str, Any] = {"input_ids": new, "attention_mask": mask}
        if self.keeps == "cache_params" and self.fed:  # Mamba has no past positions to mask
            del given["attention_mask"]
        if self.takes_positions:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, self.fed : ids.shape[1]]
        if self.keeps is not None:
            given |= {self.keeps: self.cache, "use_cache": True}
            self.fed = ids.shape[1]
        states: Tensor = body(self.model)(**given).last_hidden_state
        return states[:, -1].contiguous()  # on a strided slice the head would copy its weight per row

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.cache.reorder_cache(rows)


class _Replayed(_Forward):
    """The same, with each step after the first replayed from a graph: its shapes and tensor addresses never change."""

    crowded = CROWDED_GRAPH

    def __init__(self, model: PreTrainedModel, room: int, cache: Cache) -> None:
        super().__init__(model, room)
        self.cache, self.room = cache, room
        self.step: Callable[[], Tensor] | None = None

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        from transformers.cache_utils import StaticLayer

        if self.step is None:
            self.mask = pad(mask, (0, self.room - mask.shape[1]), value=1)  # causality hides future positions
        if not self.fed:
            return super().__call__(ids, self.mask)
        if self.step is None:
            self.new, self.positions = ids[:, -1:].clone(), mask.sum(1, keepdim=True) - 1
            lengths = [layer.cumulative_length for layer in self.cache.layers if isinstance(layer, StaticLayer)]
            self.step = recorded(self._step, [self.positions, *lengths])
        self.new.copy_(ids[:, -1:])
        return self.step()

    def _step(self) -> Tensor:
        given: dict[str, Any] = {"input_ids": self.new, "attention_mask": self.mask, "past_key_values": self.cache}
        if self.takes_positions:
            given["position_ids"] = self.positions
        states: Tensor = body(self.model)(**given, use_cache=True).last_hidden_state
        self.positions.add_(1)
        return states[:, -1].contiguous()

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.step = None


class _Whole:
    """The same without a cache, for a model that has none or misuses it: every step runs all tokens again.

    Padding moves to the right, where a causal model needs no mask.
    """

    crowded = 1.0  # dropping rows costs nothing

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1, keepdim=True)
        places = torch.arange(ids.shape[1], device=ids.device) + ids.shape[1] - lengths
        turned = ids.gather(1, places.clamp(max=ids.shape[1] - 1))
        states: Tensor = body(self.model)(input_ids=turned, use_cache=False).last_hidden_state
        return states[torch.arange(len(ids), device=ids.device), lengths[:, 0] - 1]

    def keep(self, rows: Tensor) -> None:
        """Nothing is kept between steps."""


_sound: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def _is_sound(model: PreTrainedModel) -> bool:
    """Return True if decoding with the model's cache gives what the model gives without; tried once a model."""
    if model not in _sound:
        _sound[model] = _tried(model)
        if not _sound[model]:
            logger.warning("{} is decoded without a cache, which is slow: it has none that works", type(model).__name__)
    return _sound[model]


@torch.no_grad()
def _tried(model: PreTrainedModel) -> bool:
    """Decode two rows of different length, of which one leaves, both ways."""
    ids = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 1]], device=model.device)
    mask, both = (torch.arange(8, device=model.device) >= torch.tensor([[3], [0]], device=model.device)).long(), [0, 1]
    steps = [(both, 6), (both, 7), ([0], 8)]
    forward, whole = _Forward(model, 8), _Whole(model)
    if forward.keeps is None:
        return False
    for rows, end in steps:
        expected = whole(ids[rows, :end], mask[rows, :end])
        try:
            if rows != both:
                forward.keep(torch.tensor(rows, device=model.device))
            found = forward(ids[rows, :end], mask[rows, :end])
        except torch.OutOfMemoryError:
            raise
        except (
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            RuntimeError,
        ):  # a cache of another kind
            return False
        allowed = 1e-3 if model.dtype == torch.float32 else 0.1
        if not float((found - expected).norm()) <= allowed * float(expected.norm()):
            return False
    return True


def _forward(model: PreTrainedModel, room: int, graphs: bool) -> _Forward | _Whole:
    """Return a model's forward pass, replayed from graphs if `graphs` is set, on a GPU, and if the model allows it."""
    if not _is_sound(model):
        return _Whole(model)
    if graphs and model.device.type == "cuda" and model._can_compile_fullgraph:
        from steer_heal.lm.kv_cache import fixed

        if (cache := fixed(model, room)) is not None:
            return _Replayed(model, room, cache)
    return _Forward(model, room)


@torch.no_grad()
def decode(
    base: Base, prompts: Sequence[Sequence[int]], vector: SteeringVector | None, doses: Tensor, choose: Choose,
    max_new_tokens: int, advance: Callable[[int], None], graphs: bool = True, keep: Keep | None = None,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Return the ids that follow each prompt, up to and including the first end of turn; row i is steered at doses[i].

    `doses` are [b]. With `graphs`, steps are replayed from a CUDA graph where possible. `keep` is told the states that
    predict each step's ids.
    """
    width, device = max(len(prompt) for prompt in prompts), base.device
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[base.pad_id] * n + list(p) for n, p in zip(padding, prompts, strict=True)], device=device)
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=device)
    generated = torch.full((len(prompts), max_new_tokens), base.pad_id, device=device)
    ends, rows = torch.tensor(sorted(base.end_ids), device=device), torch.arange(len(prompts), device=device)
    active, forward = torch.ones_like(rows, dtype=torch.bool), _forward(base.model, width + max_new_tokens, graphs)
    with ExitStack() as steering:
        steering.enter_context(steered(base, vector, doses))
        for step in range(max_new_tokens):
            states = forward(ids, mask)
            if keep is not None:
                keep(states, rows, step)
            new = choose(head(base.model, states), rows, step)
            generated[rows, step] = new
            advance(1)
            active &= ~torch.isin(new, ends)
            left = int(active.sum())
            if not left:
                break
            ids, mask = torch.cat([ids, new[:, None]], dim=1), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            if left <= forward.crowded * len(rows):
                kept = active.nonzero()[:, 0]
                ids, mask, rows, active = ids[kept], mask[kept], rows[kept], active[kept]
                forward.keep(kept)
                steering.close()
                steering.enter_context(steered(base, vector, doses[rows]))
    return [_until_end(row, base.end_ids) for row in generated.tolist()]


def _until_end(ids: list[int], end_ids: frozenset[int]) -> tuple[int, ...]:
    """Return the ids up to and including the first end of turn."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids) - 1)
    return tuple(ids[: end + 1])
