"""Where weights come from. One file an option; each gives a `Base`: pristine model, tokenizer, fingerprint."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from steer_heal.config import Config, ConfigError, foreign_source

if TYPE_CHECKING:  # transformers takes seconds to import, and a run that finds everything in the store needs no model
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHARED = 1  # raised when code that all stages use gives other results: batch.py, head.py, and what is below
DTypeName = Literal["float32", "bfloat16"]  # float16 would need its gradients scaled


class ModelConfig(Config):
    """Fields that every model option has."""

    name: str
    dtype: DTypeName  # of the weights; adapters are always float32
    device: Literal["auto", "cpu", "cuda", "mps"]
    attn_implementation: Literal["sdpa", "eager"]  # sdpa where there is one
    note: str  # what a reader of results must know about the weights

    def meaning(self) -> dict[str, Any]:
        return {field: value for field, value in super().meaning().items() if field != "note"}

    def prepare(self) -> None:
        """See to it that all files are on this machine and of the right kind; no weights are loaded.

        Raises ConfigError when they cannot be had or used.
        """

    def identity(self) -> str:
        """What the files hold, or the weights if there are none, as SHA-256."""
        raise NotImplementedError(type(self))

    def skeleton(self) -> PreTrainedModel:
        """The model's modules, without weights that are worth anything."""
        raise NotImplementedError(type(self))

    def weights_bytes(self) -> int:
        """What the weights take in memory."""
        numbers: int = sum(p.numel() for p in self.skeleton().parameters())
        return numbers * self.torch_dtype().itemsize

    def fetch(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Weights in `dtype` on the CPU, and the tokenizer. Raises ConfigError when there is nothing to load."""
        raise NotImplementedError(type(self))

    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    def torch_device(self) -> torch.device:
        """The device that `auto` finds. Raises ConfigError for one that this machine lacks or that lacks `dtype`."""
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        here = [kind for kind, found in available.items() if found]
        device = here[0] if self.device == "auto" else self.device
        if device not in here:
            raise ConfigError(f"model.device={device!r}: this machine has only {', '.join(here)}")
        if self.dtype == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported(False):
            name = torch.cuda.get_device_name()
            raise ConfigError(f"model.dtype='bfloat16': {name} cannot compute in it; use float32, or model.device=cpu")
        return torch.device(device)


class Base:
    """The pristine model, loaded when it is first used. Nothing changes its weights for longer than a view lasts."""

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
        """The decoder blocks. Raises ConfigError where there are none to be found."""
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
        """Any id does for padding: positions are masked by length, never by id."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.end_ids))


@functools.lru_cache(maxsize=1)
def load(config: ModelConfig) -> Base:
    """The base that an option describes; cells of one process share it. Raises ConfigError."""
    device = config.torch_device()
    config.prepare()
    identity = config.identity()
    own = json.dumps(config.fingerprint) if foreign_source(type(config)) else ""  # a user's may load in its own way
    decisive = f"{SHARED} {identity} {config.dtype} {device.type} {config.attn_implementation} {own}"
    return Base(hashlib.sha256(decisive.encode()).hexdigest(), functools.partial(_ready, config, device, identity))


def _ready(config: ModelConfig, device: torch.device, identity: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Weights on their device, ready for use, and the tokenizer. Raises ConfigError for other files than at first."""
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # what takes long has one of ours
    set_verbosity_error()  # and what must be known is raised
    model, tokenizer = config.fetch()
    if config.identity() != identity:
        raise ConfigError(f"model={config.name}: its files changed while the run was going; run again")
    if tokenizer.chat_template is None:
        raise ConfigError(f"model={config.name}: its tokenizer has no chat template")
    tokenizer.chat_template = dateless(tokenizer.chat_template)
    model.eval().requires_grad_(False)
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    model.generation_config = GenerationConfig(eos_token_id=ends)  # without penalties that came with the model
    model.to(device)  # type: ignore[arg-type]
    check_blocks(model)
    check_head(model)
    return model, tokenizer


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """What text runs through: of a multimodal model its language model, without the towers beside it."""
    return model.get_decoder()


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks: the first list of modules of the configured depth that text runs through, whatever its name.

    Raises ConfigError.
    """
    depth = model.config.get_text_config().num_hidden_layers
    found = [m for m in text_part(model).modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found:
        raise ConfigError(f"model: no list of {depth} decoder blocks found in {type(model).__name__}")
    return found[0]


def configuration(folder: Path, attention: Literal["sdpa", "eager"]) -> PreTrainedConfig:
    """The configuration of a model in a folder; with sdpa, those of its parts that have none write attention out.

    (Asked for by name, sdpa would be refused where one part has none, such as a tower for sound.)
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = None if attention == "sdpa" else attention  # also where the file names another
    return config


def maker(config: PreTrainedConfig) -> Any:
    """What of transformers makes a causal language model of a configuration, alone or in a multimodal one.

    Raises ConfigError where none does.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    for kind in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        if type(config) in kind._model_mapping and not config.is_encoder_decoder:
            return kind
    raise ConfigError(f"a {config.model_type} is not a causal language model")


def hollow(folder: Path) -> PreTrainedModel:
    """The modules of a model in a folder, on the meta device: structure without weights."""
    config = configuration(folder, "eager")
    with torch.device("meta"):
        model: PreTrainedModel = maker(config).from_config(config, trust_remote_code=False)
    return model


def dateless(template: Any) -> Any:
    """A chat template that prints today's date prints one that never changes: the same prompt must stay the same.

    Several templates by name are each made so.
    """
    if isinstance(template, dict):
        return {name: dateless(one) for name, one in template.items()}
    if "strftime_now" not in template:
        return template
    return "{%- macro strftime_now(form) %}01 Jan 2026{% endmacro -%}" + template


def sha256(path: Path) -> str:
    """Hex digest of a file; computed again only after it was written to."""
    stat = path.stat()
    return _sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if scale != 1:  # Cohere multiplies, Granite divides; to the others it would be a pass over [n, v] for nothing
        logits = logits * scale
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


@torch.no_grad()
def check_blocks(model: PreTrainedModel) -> None:
    """Raise ConfigError unless blocks pass on one state a token, which is what is steered, and none looks ahead.

    What looks ahead would see the padding on the right of a batch, which no mask hides.
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
