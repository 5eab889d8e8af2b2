"""Compute attention over short sequences on a CPU as whole matrix products, in a quarter of the fused kernel's time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT = 256  # tokens; beyond this, keeping the weights [b, h, s, s] for the backward pass costs more than is saved


@contextmanager
def short_sequences(model: PreTrainedModel) -> Iterator[None]:
    """Make a model on a CPU use `attend` instead of torch's fused kernel where sequences are short.

    The result is the same within rounding (docs/heal.md has timings). Other devices and implementations are unaffected.

    `attend` takes the place of sdpa under its own name: some families decide by the name how they attend, and under
    another would leave out the mask of the positions that they select (DeepSeek-V3.2).
    """
    if model.device.type != "cpu" or model.config.get_text_config()._attn_implementation != "sdpa":
        yield
        return
    from transformers import AttentionInterface

    own = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", attend)  # for all instances: some families keep one of their own
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", own)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute softmax(scaling q k' + mask) v for transformers: q [b, h, s, d], k and v [b, g, t, d] with g | h.

    `attention_mask` [b or 1, 1, s, t] is boolean, true at positions to attend to, or additive; None is causal. Returns
    [b, s, h, d]. Any other option a family passes is left to torch's fused kernel, which rejects unknown ones.
    """
    b, h, s, d = query.shape
    g, t = key.shape[1], key.shape[2]
    if t > SHORT or not _plain(module, attention_mask, s, t, options):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found, None
    scaling = d**-0.5 if options.get("scaling") is None else options["scaling"]
    if attention_mask is None:
        attention_mask = torch.ones(s, t, dtype=torch.bool, device=query.device).tril(t - s)
    if attention_mask.dtype == torch.bool:
        attention_mask = query.new_zeros(attention_mask.shape).masked_fill_(~attention_mask, float("-inf"))
    # stack the h / g query heads of each key head along s, so that keys and values need no copy
    mask = attention_mask.expand(b, h // g, s, t).reshape(b, 1, h // g * s, t).expand(b, g, -1, t).reshape(b * g, -1, t)
    queries, keys = query.reshape(b * g, h // g * s, d), key.reshape(b * g, t, d)
    weights = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scaling).softmax(-1)
    out = torch.bmm(weights, value.reshape(b * g, t, value.shape[-1]))
    return out.view(b, h, s, -1).transpose(1, 2).contiguous(), None  # some families view it, the others copy it anyway


def _plain(module: torch.nn.Module, mask: Tensor | None, s: int, t: int, options: dict[str, Any]) -> bool:
    """Return True if only causal attention, or one mask for all heads, is requested."""
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return False
    if options.get("dropout") or options.get("position_bias") is not None or options.get("softcap") is not None:
        return False
    # without a mask, more keys than queries means a preallocated cache that is not yet full
    return s in (1, t) if mask is None else mask.shape[1] == 1
