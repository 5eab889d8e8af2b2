"""Blocks below the lowest adapter: skipped where the rest needs only their states, and run where it needs more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.families import SIZE, built, family, ids
from torch import nn
from transformers import PreTrainedModel

from steer_heal.lm.base import blocks_of
from steer_heal.lm.batch import Pair, collate, states
from steer_heal.lm.frozen_blocks import freeze, skip_blocks

PAIRS = [Pair(ids(5, i), ids(3 + i, 30 + i)) for i in range(3)]
GROUP = [2, 0]
BAMBA = {
    **SIZE, "num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8,
    "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4,
}  # fmt: skip


def ran(model: PreTrainedModel) -> tuple[list[int], list[Any]]:
    """The blocks whose first norm ran, as hooks see it, and the hooks."""
    seen: list[int] = []
    norms = [next(m for m in block.modules() if "norm" in type(m).__name__.lower()) for block in blocks_of(model)]
    return seen, [norm.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, norm in enumerate(norms)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "own_sdpa", "bamba"])
def test_skipped_blocks_change_nothing(name: str) -> None:
    """Reference: all blocks run; Bamba's pass on a tuple, Llama's the states alone."""
    model = built("BambaConfig", **BAMBA) if name == "bamba" else family(name)
    frozen = freeze(model, PAIRS, 1, 0, 2)
    assert frozen is not None, f"{name}: its blocks cannot be skipped"
    batch = collate([PAIRS[i] for i in GROUP], 0, torch.device("cpu"))
    with torch.no_grad():
        expected = states(model, batch)
        seen, hooks = ran(model)
        with skip_blocks(model, frozen, GROUP):
            found = states(model, batch)
    for hook in hooks:
        hook.remove()
    assert set(seen) == {1}, f"{name}: blocks {set(seen)} ran"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")


class _Shares(nn.Module):
    """A block that hands something to a later one beside its states."""

    def __init__(self, block: nn.Module, shelf: dict[str, Any], gives: bool) -> None:
        super().__init__()
        self.block, self.shelf, self.gives = block, shelf, gives

    def forward(self, hidden: Any, *given: Any, **named: Any) -> Any:
        if self.gives:
            self.shelf["first"] = hidden.sum(-1, keepdim=True)
        found = self.block(hidden, *given, **named)
        return found if self.gives else found + self.shelf.pop("first")


def test_blocks_that_hand_on_more_are_run() -> None:
    """Reference: there is none; what the second block misses is an error that must not reach the user."""
    model, shelf = built("LlamaConfig", **SIZE, num_key_value_heads=2), dict[str, Any]()
    blocks = blocks_of(model)
    for i, block in enumerate(list(blocks)):
        blocks[i] = _Shares(block, shelf, gives=not i)
    assert freeze(model, PAIRS, 1, 0, 2) is None
    assert all("forward" not in vars(block) for block in blocks), "a block was left skipped"
