"""Attention over short sequences on a CPU: whole matrix products, which cost a quarter of the fused kernel's time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer_heal.model import text_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "steer_heal_short"
SHORT = 256  # tokens; beyond, the weights [b, h, s, s] that are kept for the way back outgrow what they save


@contextmanager
def short_sequences(model: PreTrainedModel) -> Iterator[None]:
    """Let a model on a CPU that attends by torch's fused kernel do so by `attend` where sequences are short.

    The same attention within rounding (docs/heal.md has the times). Other devices and implementations are left alone.
    """
    config = model.config.get_text_config()
    own = config._attn_implementation
    # a family that does not ask the registry for its attention (Falcon) would read another name as something else
    if model.device.type != "cpu" or own != "sdpa" or not text_part(model)._can_set_attn_implementation():
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """softmax(scaling q k' + mask) v, as transformers asks for it: q [b, h, s, d], k and v [b, g, t, d] with g | h.

    `attention_mask` [b or 1, 1, s, t] is true where to look; None is causal. Returns [b, s, h, d]. Whatever else a
    family asks for is left to torch's fused kernel, which refuses what it does not know.
    """
    b, h, s, d = query.shape
    g, t = key.shape[1], key.shape[2]
    if t > SHORT or not _plain(module, attention_mask, s, t, how):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **how)
        return found, None
    scaling = d**-0.5 if how.get("scaling") is None else how["scaling"]
    if attention_mask is None:
        attention_mask = torch.ones(s, t, dtype=torch.bool, device=query.device).tril(t - s)
    if attention_mask.dtype == torch.bool:
        attention_mask = query.new_zeros(attention_mask.shape).masked_fill_(~attention_mask, float("-inf"))
    # the h / g query heads of a key head stand below one another, so that keys and values are read as they are
    mask = attention_mask.expand(b, h // g, s, t).reshape(b, 1, h // g * s, t).expand(b, g, -1, t).reshape(b * g, -1, t)
    queries, keys = query.reshape(b * g, h // g * s, d), key.reshape(b * g, t, d)
    weights = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scaling).softmax(-1)
    out = torch.bmm(weights, value.reshape(b * g, t, value.shape[-1]))
    return out.view(b, h, s, -1).transpose(1, 2).contiguous(), None  # some families view it, the others copy it anyway


def _plain(module: torch.nn.Module, mask: Tensor | None, s: int, t: int, how: dict[str, Any]) -> bool:
    """Whether no more is asked for than causal attention, or one mask for all heads."""
    asked = how.get("is_causal")
    if not (getattr(module, "is_causal", True) if asked is None else asked):
        return False
    if how.get("dropout") or how.get("position_bias") is not None or how.get("softcap") is not None:
        return False
    # without a mask, more keys than queries are those of a cache that is still to be filled
    return s in (1, t) if mask is None else mask.shape[1] == 1
