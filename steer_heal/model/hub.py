"""Load any causal language model with a chat template, by Hub id or local folder. Code from the Hub is never run."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from loguru import logger
from pydantic import BeforeValidator, Field, FilePath, field_validator
from safetensors import SafetensorError, safe_open

from steer_heal.config import ConfigError
from steer_heal.config.files import decoded
from steer_heal.lm.chat import Chat, Variable, without_date
from steer_heal.model import SMALL, WEIGHTS, ModelConfig, check_no_adapter, checksums, configuration, maker
from steer_heal.system.paths import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def _given_variables(value: Any) -> Any:
    """Turn a mapping into pairs, which can be hashed, without the variables that are left to the template."""
    if not isinstance(value, dict | tuple | None):
        raise ValueError("variables, each as model.template.NAME=VALUE")
    return tuple((k, v) for k, v in sorted(value.items()) if v is not None) if isinstance(value, dict) else value or ()


class Hub(ModelConfig, key="steer_heal.model.hub.Hub"):
    """A model from the Hugging Face Hub or from a folder."""

    name: Literal["hub"]
    id: str = Field(min_length=1)  # owner/name on the Hub, or a folder
    revision: str | None  # branch, tag or commit on the Hub
    chat_template: FilePath | None  # a Jinja file, for a tokenizer that has none or to replace its own
    template: Annotated[tuple[tuple[str, Variable], ...], BeforeValidator(_given_variables)]  # of the chat template
    # nf4: linear layers of the blocks in 4 bits (Dettmers et al. 2023, arXiv:2305.14314), computing in `dtype`
    quantization: Literal["nf4"] | None

    @field_validator("id", mode="before")
    @classmethod
    def _home_folder(cls, given: Any) -> Any:
        return expanded(given) if isinstance(given, str) else given

    def key_fields(self) -> dict[str, Any]:
        """Return the fields, omitting what is null: a field that is not used must not change the keys of results."""
        return {k: v for k, v in super().key_fields().items() if k not in ("quantization", "template") or v}

    def template_variables(self) -> dict[str, Variable]:
        return dict(self.template)

    def torch_device(self) -> torch.device:
        """Resolve the device. Also raises ConfigError for one on which quantising a few numbers fails."""
        device = super().torch_device()
        if self.quantization is not None:
            self._check_library()
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a missing kernel that is not used
            try:
                import bitsandbytes

                bitsandbytes.functional.quantize_4bit(torch.ones(64, device=device), quant_type=self.quantization)
            except (ImportError, OSError, RuntimeError, AttributeError) as error:
                raise ConfigError(
                    f"{self._quantized}: bitsandbytes cannot quantise on {device.type}; leave it null, or use another "
                    f"model.device: {textwrap.shorten(str(error), 200)}"
                ) from error
        return device

    def prepare(self) -> None:
        """Fetch and check small files first, so that unusable models are rejected before gigabytes are downloaded."""
        if self.quantization is not None:
            self._check_library()
        folder = self._folder(SMALL)
        self._check(folder)
        if folder != Path(self.id):
            folder = self._folder(SMALL + WEIGHTS)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise ConfigError(f"{self._given}: there are no *.safetensors in it; pickled weights are not read")
        for path in weights:
            try:
                with safe_open(path, "pt"):  # opening checks the length given in the header
                    pass
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{self._given}: {path.name} is incomplete or damaged: {error}") from error
        try:
            checksums(folder)
        except OSError as error:
            raise self._unusable(error) from error

    def identity(self) -> str:
        digest = hashlib.sha256(repr(sorted(checksums(self._local()).items())).encode())
        if self.chat_template is not None:
            digest.update(self.chat_template.read_bytes())
        if self.quantization is not None:
            digest.update(f"\0{self._quantized}".encode())
        if self.template:
            digest.update(f"\0{self.template}".encode())
        return digest.hexdigest()

    def source(self) -> tuple[str, str | None]:
        """Return id and commit on the Hub; of a folder its path, unless it is a snapshot in the Hub's cache.

        A folder's `_name_or_path` may name the model that its weights were trained from, so it is not read.
        """
        try:
            folder = self._local()
        except ConfigError:  # deleted from the cache since the run began
            return self.id, self.revision
        if found := re.search(r"/models--([^/]+)/snapshots/([^/]+)$", str(folder.resolve())):
            return found[1].replace("--", "/", 1), found[2]
        return (str(folder.resolve()), None) if folder == Path(self.id) else (self.id, self.revision)

    def skeleton(self) -> PreTrainedModel:
        """Return the model without weights. Raises ConfigError if the files lack some; warns if they hold others."""
        return _skeleton(self, self.identity())

    def conversations(self) -> Chat:
        return _conversations(self, self.identity())

    def fetch(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load weights and tokenizer; with quantization, weights are quantised one by one on their device."""
        from transformers import BitsAndBytesConfig

        folder, quantized = self._local(), dict[str, Any]()
        if self.quantization is not None:
            settings = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type=self.quantization, bnb_4bit_compute_dtype=self.torch_dtype()
            )
            quantized = {"quantization_config": settings, "device_map": self.torch_device()}
        try:
            tokenizer = self._tokenizer(folder)
            config = configuration(folder, self.attn_implementation)
            model, report = maker(config).from_pretrained(
                folder, config=config, dtype=self.torch_dtype(), use_safetensors=True, output_loading_info=True,
                **LOCAL, **quantized,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise self._unusable(error) from error
        self._check_weights(report)
        _keep_unpacked(model)
        return model, tokenizer

    def _check_weights(self, report: Mapping[str, Collection[str]]) -> None:
        """Raise ConfigError for weights that the files lack, given transformers' report of loading."""
        if missing := sorted(report["missing_keys"]):  # transformers would initialise them at random
            raise ConfigError(f"{self._given} lacks {len(missing)} of its weights, such as {missing[0]}")

    def _tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **LOCAL)
        if self.chat_template is not None:
            shown = f"model.chat_template={str(self.chat_template)!r}"
            tokenizer.chat_template = decoded(self.chat_template.read_bytes(), shown)
        if tokenizer.chat_template is not None:
            tokenizer.chat_template = without_date(tokenizer.chat_template)
        return tokenizer

    @property
    def _given(self) -> str:
        return f"model.id={self.id!r}"

    @property
    def _quantized(self) -> str:
        return f"model.quantization={self.quantization!r}"

    def _check_library(self) -> None:
        """Raise ConfigError if bitsandbytes is not installed, or too old for transformers."""
        from transformers.utils import is_bitsandbytes_available

        if not is_bitsandbytes_available():
            raise ConfigError(f"{self._quantized} needs bitsandbytes: pip install 'steer_heal[nf4]', or leave it null")

    def _unusable(self, error: Exception) -> ConfigError:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        reason = textwrap.shorten(f"{kind}{error}", 300)
        return ConfigError(f"{self._given} is not a causal language model that can be loaded: {reason}")

    def _check(self, folder: Path) -> None:
        """Raise ConfigError unless the folder holds a causal language model with a chat template."""
        check_no_adapter(folder, self._given)
        try:
            config = configuration(folder, self.attn_implementation)
            tokenizer = self._tokenizer(folder)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, StrictDataclassError) as error:
            raise self._unusable(error) from error
        try:
            maker(config)
        except ConfigError as error:
            raise ConfigError(f"{self._given} is a {config.model_type}, not a causal language model") from error
        if self.quantization is not None and hasattr(config, "quantization_config"):
            raise ConfigError(f"{self._quantized}: {self._given} is quantised already; leave it null")
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"{self._given}: its tokenizer has no chat template; give one with model.chat_template=FILE.jinja"
            )
        try:
            Chat(tokenizer, self.template_variables())
        except ConfigError as error:
            raise ConfigError(f"{self._given}: {error}") from error

    def _local(self) -> Path:
        """Return the folder that `prepare` has filled."""
        return self._folder(SMALL + WEIGHTS, local_files_only=True)

    def _folder(self, patterns: list[str], local_files_only: bool = False) -> Path:
        """Return the folder given, or the Hub's snapshot with all files matching the patterns. Raises ConfigError."""
        if Path(self.id).is_dir():
            return Path(self.id)
        if self.id.startswith(("/", ".", "~")) or Path(self.id).exists() or self.id.count("/") > 1:
            raise ConfigError(f"{self._given}: there is no such folder")
        try:
            return Path(
                snapshot_download(
                    self.id, revision=self.revision, allow_patterns=patterns, local_files_only=local_files_only
                )
            )
        except GatedRepoError as error:
            raise ConfigError(f"{self._given} is gated: accept its terms on the Hub and log in first") from error
        except RevisionNotFoundError as error:
            raise ConfigError(f"model.revision={self.revision!r}: {self._given} has no such revision") from error
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise ConfigError(f"{self._given} is neither a folder nor a model on the Hub") from error
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = textwrap.shorten(str(error.__cause__ or error), 120)
            raise ConfigError(f"{self._given}: not in the cache, and not available from the Hub: {reason}") from error


@functools.lru_cache(maxsize=2)
def _skeleton(config: Hub, _identity: str) -> PreTrainedModel:
    """Build a model on the meta device as transformers loads it, so that lacking weights are found without reading any.

    Raises ConfigError.
    """
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # of what is lacking and left over we tell ourselves
    folder = config._local()
    try:
        settings = configuration(folder, "eager")
        model, report = maker(settings).from_pretrained(
            folder,
            config=settings,
            device_map="meta",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **LOCAL,
        )
    except Exception as error:  # somebody else's code, tried for the first time: it may raise anything
        raise config._unusable(error) from error
    for name, *shapes in sorted(report["mismatched_keys"]):
        given, wanted = (list(shape) for shape in shapes)
        raise ConfigError(
            f"{config._given}: {name} is {given}, and {wanted} by its config.json: they do not belong together"
        )
    config._check_weights(report)
    if unused := sorted(report["unexpected_keys"]):
        logger.warning(
            "{}: {} of its weights have no place in the model of its config.json, such as {}; they are not used",
            config._given, len(unused), unused[0],
        )  # fmt: skip
    built: PreTrainedModel = model.eval().requires_grad_(False)
    return built


@functools.lru_cache(maxsize=2)
def _conversations(config: Hub, _identity: str) -> Chat:
    return Chat(config._tokenizer(config._local()), config.template_variables())


def _keep_unpacked(model: PreTrainedModel) -> None:
    """Stop 4-bit layers on a CPU from repacking their weights when they first run without gradients.

    bitsandbytes does this irreversibly where the CPU multiplies bfloat16 (AVX512): the scales are rounded once more,
    and the gradient with respect to a packed layer's input is silently lost.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
