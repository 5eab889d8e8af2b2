"""Where weights come from. One file an option; each gives a `Base`: pristine model, tokenizer, fingerprint."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from steer_heal.config import Config, ConfigError

DTypeName = Literal["float32", "bfloat16"]  # float16 would need its gradients scaled


class ModelConfig(Config):
    """Fields that every model option has."""

    name: str
    dtype: DTypeName  # of the weights; adapters are always float32
    device: Literal["auto", "cpu", "cuda", "mps"]
    attn_implementation: Literal["sdpa", "eager"]
    note: str  # what a reader of results must know about the weights

    def meaning(self) -> dict[str, Any]:
        return {field: value for field, value in super().meaning().items() if field != "note"}

    def fetch(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Weights in `dtype` on the CPU, and the tokenizer. Raises ConfigError when there is nothing to load."""
        raise NotImplementedError(type(self))

    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    def torch_device(self) -> torch.device:
        """The device that `auto` finds. Raises ConfigError for one that this machine lacks."""
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if self.device == "auto":
            return torch.device(next(kind for kind, here in available.items() if here))
        if not available[self.device]:
            here = ", ".join(kind for kind, found in available.items() if found)
            raise ConfigError(f"model.device={self.device!r}: this machine has only {here}")
        return torch.device(self.device)


@dataclass(frozen=True)
class Base:
    """The pristine model. Nothing changes its weights for longer than a view or a heal lasts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str  # of weights, dtype, tokenizer, device type and attention implementation

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @functools.cached_property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks: found as the first list of modules of the configured depth, whatever its name."""
        depth = self.model.config.get_text_config().num_hidden_layers
        found = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if not found:
            raise ConfigError(f"model: no list of {depth} decoder blocks found in {type(self.model).__name__}")
        return found[0]

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a turn."""
        generation = self.model.generation_config
        ids: Any = generation.eos_token_id if generation is not None else None
        listed = ids if isinstance(ids, list) else [ids]
        return frozenset(i for i in [*listed, self.tokenizer.eos_token_id] if i is not None)

    @property
    def pad_id(self) -> int:
        """Any id does for padding: positions are masked by length, never by id."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.end_ids))


@functools.lru_cache(maxsize=1)
def load(config: ModelConfig) -> Base:
    """The base that an option describes; cells of one process share it. Raises ConfigError."""
    device = config.torch_device()
    disable_progress_bar()  # what takes long has one of ours
    set_verbosity_error()  # and what must be known is raised
    model, tokenizer = config.fetch()
    if tokenizer.chat_template is None:
        raise ConfigError(f"model={config.name}: the tokenizer has no chat template; give one as model.chat_template")
    model.eval().requires_grad_(False)
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    model.generation_config = GenerationConfig(eos_token_id=ends)  # without penalties that came with the model
    digest = hashlib.sha256(_tokenizer_state(tokenizer) + _settings(model))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(f"{device.type} {config.attn_implementation}".encode())
    model.to(device)  # type: ignore[arg-type]
    check_head(model)
    return Base(model, tokenizer, digest.hexdigest())


def _settings(model: PreTrainedModel) -> bytes:
    """What beside the weights decides what a model computes and where its answers end."""
    where_from = ("_name_or_path", "transformers_version", "architectures", "dtype")
    settings = {name: value for name, value in model.config.to_diff_dict().items() if name not in where_from}
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return json.dumps([settings, ends], sort_keys=True, default=str).encode()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return f"{vocabulary}{tokenizer.chat_template}".encode()


def chat_ids(tokenizer: PreTrainedTokenizerBase, system: str, user: str) -> tuple[int, ...]:
    """Ids of a conversation up to and including the assistant tag.

    The system message is always explicit; where the template knows no system role, be it that it raises or that it
    leaves the message out, the user's turn opens with it. Raises ConfigError for a template that renders neither.
    """
    from jinja2 import TemplateError

    apart = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    folded = [{"role": "user", "content": f"{system}\n\n{user}"}]
    reason = "it drops the system message"
    for messages in (apart, folded):
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            reason = str(error)
        else:
            if text.count(system.strip()) > user.count(system.strip()):
                return text_ids(tokenizer, text)
    raise ConfigError(f"the chat template of the tokenizer is of no use: {reason}")


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of plain text, without special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def head(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits [n, v] in float32 of post-final-norm states [n, d], scaled and soft-capped as the model does it."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(states).float()
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise ConfigError unless `head` gives the model's own logits: nll and KL would be of another model."""
    ids = torch.arange(8, device=model.device)[None]
    own: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    off = float((head(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state) - own).norm())
    if not off <= 0.02 * float(own.norm()):
        raise ConfigError(f"model: {type(model).__name__} does to its logits what steer_heal.model.head does not know")
