"""States at the assistant tag, the last token of a prompt, where a model is about to answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steer_heal.config import ConfigError
from steer_heal.lm.batch import Enough, by_length, shared_length, shared_prefix
from steer_heal.model import Base
from steer_heal.runtime import Runtime
from steer_heal.system.terminal import bar


@torch.no_grad()
def tag_states(base: Base, prompts: Sequence[tuple[int, ...]], layers: Sequence[int], runtime: Runtime) -> Tensor:
    """States [c, l, d] after the given blocks at the last token of each prompt, float32 on the CPU.

    Raises ConfigError for a block that text alone does not run through.
    What the prompts of a batch begin with is run once for all, and blocks above the last of `layers` do not run.
    What is kept is 4 l d bytes a prompt; all else is that of one batch.
    """
    found = torch.empty(len(prompts), len(layers), base.model.config.get_text_config().hidden_size)
    with bar("extract", len(prompts)) as advance:
        for group in by_length(prompts, runtime.score_batch):
            found[torch.tensor(group)] = _of_batch(base, [prompts[i] for i in group], layers)
            advance(len(group))
    return found


def _of_batch(base: Base, prompts: Sequence[tuple[int, ...]], layers: Sequence[int]) -> Tensor:
    """`tag_states` of prompts that run side by side."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[*prompt, *[base.pad_id] * (width - len(prompt))] for prompt in prompts], device=base.device)
    prefix, top = shared_length(prompts), max(layers)
    rows, last = torch.arange(len(prompts)), None  # where the last tokens are, once it is not the prefix that runs
    seen: dict[int, Tensor] = {}  # by block: hooks run in the model's order, whatever the order of `layers`

    def look(_module: nn.Module, _inputs: Any, output: Any, *, layer: int) -> None:
        if last is not None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            seen[layer] = hidden[rows, last].float().cpu()
        if layer == top:
            raise Enough

    hooks = [base.blocks[layer].register_forward_hook(partial(look, layer=layer)) for layer in layers]
    try:
        cache = shared_prefix(base.model, ids, prefix)
        begin = 0 if cache is None else prefix
        last = torch.tensor([len(prompt) - 1 - begin for prompt in prompts])
        with suppress(Enough):
            if cache is None:
                base.model.base_model(input_ids=ids, use_cache=False)
            else:
                base.model.base_model(input_ids=ids[:, prefix:], past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    if idle := sorted(set(layers) - seen.keys()):
        raise ConfigError(f"steer.layers: blocks {idle} of {type(base.model).__name__} do not run on text alone")
    return torch.stack([seen[layer] for layer in layers], dim=1)
