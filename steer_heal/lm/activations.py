"""Collect states at the last token of a prompt (the assistant tag), where the model is about to answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steer_heal.config import ConfigError
from steer_heal.lm.base import Base, body
from steer_heal.lm.batch import StopForward, by_length, shared_length, shared_prefix
from steer_heal.runtime import Runtime
from steer_heal.system.terminal import bar


@torch.no_grad()
def last_token_states(
    base: Base, prompts: Sequence[tuple[int, ...]], layers: Sequence[int], runtime: Runtime
) -> Tensor:
    """Return states [c, l, d] after the given blocks at the last token of each prompt, float32 on the CPU.

    Raises ConfigError for a block that text alone does not run through.
    The prefix that the prompts of a batch share runs only once, and blocks above the highest of `layers` do not run.
    The result takes 4 l d bytes per prompt; everything else in memory belongs to one batch.
    """
    found = torch.empty(len(prompts), len(layers), base.model.config.get_text_config().hidden_size)
    with bar("extract", len(prompts)) as advance:
        for group in by_length(prompts, runtime.score_batch):
            found[torch.tensor(group)] = _of_batch(base, [prompts[i] for i in group], layers)
            advance(len(group))
    return found


def _of_batch(base: Base, prompts: Sequence[tuple[int, ...]], layers: Sequence[int]) -> Tensor:
    """Return `last_token_states` of prompts that run as one batch."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[*prompt, *[base.pad_id] * (width - len(prompt))] for prompt in prompts], device=base.device)
    prefix, top = shared_length(prompts), max(layers)
    rows, last = torch.arange(len(prompts)), None  # positions of the last tokens; None while the prefix runs
    seen: dict[int, Tensor] = {}  # by block: hooks run in the model's order, not in that of `layers`

    def look(_module: nn.Module, _inputs: Any, output: Any, *, layer: int) -> None:
        if last is not None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            seen[layer] = hidden[rows, last].float().cpu()
        if layer == top:
            raise StopForward

    hooks = [base.blocks[layer].register_forward_hook(partial(look, layer=layer)) for layer in layers]
    try:
        cache = shared_prefix(base.model, ids, prefix)
        begin = 0 if cache is None else prefix
        last = torch.tensor([len(prompt) - 1 - begin for prompt in prompts])
        with suppress(StopForward):
            if cache is None:
                body(base.model)(input_ids=ids, use_cache=False)
            else:
                body(base.model)(input_ids=ids[:, prefix:], past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := sorted(set(layers) - seen.keys()):
        raise ConfigError(f"steer.layers: blocks {missing} of {type(base.model).__name__} do not run on text alone")
    return torch.stack([seen[layer] for layer in layers], dim=1)
