"""Sources of weights. One file per option; each gives a `Base`: pristine model, tokenizer, fingerprint."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from loguru import logger

from steer_heal.config import Config, ConfigError, foreign_source
from steer_heal.lm import tree
from steer_heal.lm.base import Base, check_blocks, check_finite, check_head
from steer_heal.lm.chat import Chat, Variable, without_date

if TYPE_CHECKING:  # transformers takes seconds to import, and a run that finds everything in the store needs no model
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHARED = 2  # increment when shared code gives different results: lm/base.py, lm/batch.py, lm/chat.py, the code below
SMALL = ["*.json", "*.model", "*.jinja", "*.txt"]
WEIGHTS = ["*.safetensors"]  # no pickled weights, no code
DTypeName = Literal["auto", "float32", "bfloat16"]  # float16 would need gradient scaling


class ModelConfig(Config):
    """Fields that every model option has."""

    name: str
    dtype: DTypeName  # of the weights; adapters are always float32; auto: bfloat16 where the device computes in it
    device: Literal["auto", "cpu", "cuda", "mps"]
    attn_implementation: Literal["sdpa", "eager"]  # sdpa only where the model has it
    note: str  # what a reader of results must know about the weights

    def key_fields(self) -> dict[str, Any]:
        return {field: value for field, value in super().key_fields().items() if field != "note"}

    def prepare(self) -> None:
        """Make sure that all files are on this machine and of the right kind, without loading weights.

        Raises ConfigError if they cannot be obtained or used.
        """

    def identity(self) -> str:
        """Return a SHA-256 of the files' content, or of the weights if there are no files."""
        raise NotImplementedError(type(self))

    def skeleton(self) -> PreTrainedModel:
        """Return the model's modules; their weights need not be meaningful."""
        raise NotImplementedError(type(self))

    def conversations(self) -> Chat | None:
        """Return the tokenizer's conversations without loading weights; None for a model that is known to fit."""
        return None

    def template_variables(self) -> Mapping[str, Variable]:
        """Return variables for the chat template."""
        return {}

    def weights_bytes(self) -> int:
        """Return the memory that the weights take, in bytes."""
        numbers: int = sum(p.numel() for p in self.skeleton().parameters())
        return numbers * self.torch_dtype().itemsize

    def fetch(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the weights in `dtype` on the CPU, and the tokenizer. Raises ConfigError if there is nothing to load."""
        raise NotImplementedError(type(self))

    def source(self) -> tuple[str, str | None] | None:
        """Return where others load the weights from and at which revision, as an adapter's configuration names them.

        None leaves what PEFT has recorded.
        """
        return None

    def torch_dtype(self) -> torch.dtype:
        """Resolve the dtype. Raises ConfigError for a device that this machine lacks."""
        if self.dtype == "auto":
            return torch.bfloat16 if computes_in_bfloat16(self._kind()) else torch.float32
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    def about(self) -> str:
        """Return the note and the dtype, as a reader of results must know them."""
        dtype = str(self.torch_dtype()).removeprefix("torch.")
        return f"{self.note} ({dtype})" if self.note else dtype

    def torch_device(self) -> torch.device:
        """Resolve the device. Raises ConfigError for one that this machine lacks or that does not support `dtype`."""
        device = self._kind()
        if self.dtype == "bfloat16" and device == "cuda" and not computes_in_bfloat16(device):
            name = torch.cuda.get_device_name()
            raise ConfigError(f"model.dtype='bfloat16': {name} cannot compute in it; use float32, or model.device=cpu")
        return torch.device(device)

    def _kind(self) -> str:
        """Resolve the kind of device. Raises ConfigError for one that this machine lacks."""
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        here = [kind for kind, found in available.items() if found]
        device = here[0] if self.device == "auto" else self.device
        if device not in here:
            raise ConfigError(f"model.device={device!r}: this machine has only {', '.join(here)}")
        return device


def computes_in_bfloat16(device: str) -> bool:
    """Return True if a kind of device has fast products of bfloat16 matrices.

    On a CPU without AVX-512 (or ARM's bf16) they take eight times as long as those of float32 (docs/performance.md).
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(False))
    return device != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.lru_cache(maxsize=1)
def load(config: ModelConfig) -> Base:
    """Return the base that an option describes, shared by all cells of a process. Raises ConfigError."""
    device = config.torch_device()
    config.prepare()
    identity = config.identity()
    own = json.dumps(config.fingerprint) if foreign_source(type(config)) else ""  # a user's class may load differently
    dtype = str(config.torch_dtype()).removeprefix("torch.")
    if config.dtype == "auto" and dtype == "float32":
        logger.info("model.dtype=auto: float32, since this {} is slow in bfloat16", device.type.upper())
    decisive = f"{SHARED} {identity} {dtype} {device.type} {config.attn_implementation} {own}"
    fingerprint = hashlib.sha256(decisive.encode()).hexdigest()
    return Base(fingerprint, functools.partial(_ready, config, device, identity), config.template_variables())


def _ready(config: ModelConfig, device: torch.device, identity: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights onto their device, ready for use, and the tokenizer. Raises ConfigError if the files changed."""
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # slow steps show our own progress bar
    set_verbosity_error()  # problems that matter are raised as errors
    model, tokenizer = config.fetch()
    if config.identity() != identity:
        raise ConfigError(f"model={config.name}: its files changed during the run; run again")
    if tokenizer.chat_template is None:
        raise ConfigError(f"model={config.name}: its tokenizer has no chat template")
    tokenizer.chat_template = without_date(tokenizer.chat_template)
    model.eval().requires_grad_(False)
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    model.generation_config = GenerationConfig(eos_token_id=ends)  # drops penalties that came with the model
    model.to(device)  # type: ignore[arg-type]
    check_finite(model)
    try:
        check_blocks(model)
        check_head(model)
        tree.room(model, longest=1)  # tries whether it runs them, on the weights as they are
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # somebody else's code, tried for the first time: it may raise anything
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"model: {type(model).__name__} does not run on token ids alone: {type(error).__name__}: {reason:.200}"
        ) from error
    return model, tokenizer


def configuration(folder: Path, attention: Literal["sdpa", "eager"]) -> PreTrainedConfig:
    """Return the configuration of a model in a folder; with sdpa, parts that do not support it use eager attention.

    (Requesting sdpa by name would fail if any part, such as an audio tower, does not support it.)
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = None if attention == "sdpa" else attention  # overrides the file's own
    return config


def maker(config: PreTrainedConfig) -> Any:
    """Return the transformers auto class that makes a causal language model, plain or multimodal, of a configuration.

    Raises ConfigError if there is none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    for kind in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        if type(config) in kind._model_mapping and not config.is_encoder_decoder:
            return kind
    raise ConfigError(f"a {config.model_type} is not a causal language model")


def hollow(folder: Path) -> PreTrainedModel:
    """Build the modules of a model in a folder on the meta device: structure without weights."""
    config = configuration(folder, "eager")
    with torch.device("meta"):
        model: PreTrainedModel = maker(config).from_config(config, trust_remote_code=False)
    return model


def sha256(path: Path) -> str:
    """Return the hex digest of a file; cached until the file's size or modification time changes."""
    stat = path.stat()
    return _sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that a model is read from, by name.

    Raises ConfigError for weights in the Hub's cache that differ from what the Hub sent: the cache names each large
    file by its checksum.
    """
    found = {path.name: sha256(path) for pattern in SMALL + WEIGHTS for path in sorted(folder.glob(pattern))}
    for path in sorted(folder.glob("*.safetensors")):
        expected = path.resolve().name
        if re.fullmatch("[0-9a-f]{64}", expected) and expected != found[path.name]:
            raise ConfigError(
                f"model.id: {path.resolve()} has SHA-256 {found[path.name]}; delete that file and run again"
            )
    return found


def check_no_adapter(folder: Path, given: str) -> None:
    """Raise ConfigError for an adapter, alone or beside weights, on top of which transformers would put it.

    `given` is how the message names the model.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    if (folder / "config.json").is_file():
        raise ConfigError(
            f"{given}: an adapter lies beside the weights ({path.name}), and would be put on top of them; move the "
            "adapter's files away"
        )
    try:
        of = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, OSError):
        of = None
    raise ConfigError(
        f"{given} is an adapter{f' of {of}' if of else ''}, not a model: load its base with PEFT, "
        "PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(NEW), save the tokenizer there "
        "too, and give model.id=NEW"
    )
