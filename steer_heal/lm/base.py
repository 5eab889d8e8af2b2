"""The pristine model that everything else runs on, and access to its structure: blocks, text part, logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steer_heal.config import ConfigError

if TYPE_CHECKING:  # transformers takes seconds to import, and a run that finds everything in the store needs no model
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Base:
    """The pristine model, loaded on first use. Its weights change only while a view is open."""

    def __init__(self, fingerprint: str, fetch: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> None:
        self.fingerprint = fingerprint  # of weights, dtype, tokenizer, device type and attention implementation
        self._fetch = fetch

    @functools.cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self._fetch()

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded[1]

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @functools.cached_property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks. Raises ConfigError if none are found."""
        return blocks_of(self.model)

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a turn."""
        generation = self.model.generation_config
        ids: Any = generation.eos_token_id if generation is not None else None
        listed = ids if isinstance(ids, list) else [ids]
        return frozenset(i for i in [*listed, self.tokenizer.eos_token_id] if i is not None)

    @property
    def pad_id(self) -> int:
        """The id used for padding. Any id will do: positions are masked by length, never by id."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.end_ids))


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part that text runs through: in a multimodal model, the language model without its other towers."""
    return model.get_decoder()


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder blocks: the first module list of the configured depth in the text part, whatever its name.

    Raises ConfigError if there is none.
    """
    depth = model.config.get_text_config().num_hidden_layers
    found = [m for m in text_part(model).modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found:
        raise ConfigError(f"model: no list of {depth} decoder blocks found in {type(model).__name__}")
    return found[0]


def head(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Compute logits [n, v] in float32 from post-final-norm states [n, d], scaled and soft-capped as the model does."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(states).float()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if scale != 1:  # Cohere multiplies, Granite divides; for others this would be a wasted pass over [n, v]
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise ConfigError unless `head` gives the model's own logits; nll and KL would be another model's."""
    ids = torch.arange(8, device=model.device)[None]
    own: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    off = float((head(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state) - own).norm())
    if not off <= 0.02 * float(own.norm()):
        kind = type(model).__name__
        raise ConfigError(f"model: {kind} computes its logits in a way that steer_heal.lm.base.head does not support")


@torch.no_grad()
def check_blocks(model: PreTrainedModel) -> None:
    """Raise ConfigError unless each block passes on one state per token (the one that is steered) and none looks ahead.

    A block that looks ahead would see the padding on the right of a batch, which no mask hides.
    """
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device)
    wanted, found = [*ids.shape, model.config.get_text_config().hidden_size], list[list[int]]()
    record = lambda _m, _i, out: found.append(list((out[0] if isinstance(out, tuple | list) else out).shape))  # noqa: E731
    hooks = [block.register_forward_hook(record) for block in blocks_of(model)]
    try:
        one, other = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :2].float()
    finally:
        for hook in hooks:
            hook.remove()
    kind = type(model).__name__
    if odd := next((shape for shape in found if shape != wanted), None):
        raise ConfigError(f"model: blocks of {kind} pass on {odd}, not states {wanted}; it cannot be steered")
    if not float((one - other).norm()) <= 0.02 * float(one.norm()):
        raise ConfigError(f"model: {kind} looks ahead; it is not a causal language model")
