"""Token after token: rows side by side, each with a steering coefficient of its own, and gone once it has ended.

What transformers' `generate` does, with what it lacks: keys and values are written in place instead of copied whole at
every step, and rows that have ended leave the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer_heal.artifacts import SteeringVector
from steer_heal.model import Base, head
from steer_heal.steering import steered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CROWDED = 0.75  # share of rows still going from which on the others stay: what is kept of each would have to be copied

Choose = Callable[[Tensor, Tensor, int], Tensor]  # logits [b, v] float32, rows [b], step -> each row's next id [b]


class _Forward:
    """The model's logits for what comes next, fed with what it has not seen yet."""

    def __init__(self, model: PreTrainedModel, room: int) -> None:
        from steer_heal.cache import roomy

        takes = inspect.signature(model.base_model.forward).parameters
        self.model, self.takes_positions = model, "position_ids" in takes
        self.keeps = next((name for name in ("past_key_values", "cache_params") if name in takes), None)
        self.cache, self.fed = roomy(model, room), 0

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [b, v], float32, after ids [b, s]; mask [b, s] is 0 at padding, which is on the left."""
        new = ids[:, self.fed :]
        given: dict[str, Any] = {"input_ids": new, "attention_mask": mask}
        if self.keeps == "cache_params" and self.fed:  # Mamba looks back on nothing that a mask could hide
            del given["attention_mask"]
        if self.takes_positions:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        if self.keeps is not None:
            given |= {self.keeps: self.cache, "use_cache": True}
            self.fed = ids.shape[1]
        states = self.model.base_model(**given).last_hidden_state
        return head(self.model, states[:, -1].contiguous())  # of a strided slice it would copy its weight for every row

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.cache.reorder_cache(rows)


@torch.no_grad()
def decode(
    base: Base, prompts: Sequence[Sequence[int]], vector: SteeringVector | None, doses: Tensor, choose: Choose,
    max_new_tokens: int, advance: Callable[[int], None],
) -> list[tuple[int, ...]]:  # fmt: skip
    """The ids that follow each prompt, up to and including the first end of turn; row i is steered at doses[i] [b]."""
    width, device = max(len(prompt) for prompt in prompts), base.device
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[base.pad_id] * n + list(p) for n, p in zip(padding, prompts, strict=True)], device=device)
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=device)
    said = torch.full((len(prompts), max_new_tokens), base.pad_id, device=device)
    ends, rows = torch.tensor(sorted(base.end_ids), device=device), torch.arange(len(prompts), device=device)
    going, forward = torch.ones_like(rows, dtype=torch.bool), _Forward(base.model, width + max_new_tokens)
    with ExitStack() as steering:
        steering.enter_context(steered(base, vector, doses))
        for step in range(max_new_tokens):
            new = choose(forward(ids, mask), rows, step)
            said[rows, step] = new
            advance(1)
            going &= ~torch.isin(new, ends)
            left = int(going.sum())
            if not left:
                break
            ids, mask = torch.cat([ids, new[:, None]], dim=1), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            if left <= CROWDED * len(rows):
                kept = going.nonzero()[:, 0]
                ids, mask, rows, going = ids[kept], mask[kept], rows[kept], going[kept]
                forward.keep(kept)
                steering.close()
                steering.enter_context(steered(base, vector, doses[rows]))
    return [_until_end(row, base.end_ids) for row in said.tolist()]


def _until_end(ids: list[int], end_ids: frozenset[int]) -> tuple[int, ...]:
    """The ids up to and including the first end of turn."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids) - 1)
    return tuple(ids[: end + 1])
