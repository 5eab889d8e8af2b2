"""Any causal language model with a chat template, by Hub id or local folder. Code from the Hub is never run."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loguru import logger
from pydantic import Field, FilePath
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from steer_heal.config import ConfigError
from steer_heal.model import ModelConfig
from steer_heal.model.smollm2_135m import sha256

FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]  # no pickled weights, no code


class Hub(ModelConfig):
    """A model from the Hugging Face Hub or from a folder."""

    name: Literal["hub"]
    id: str = Field(min_length=1)  # owner/name on the Hub, or a folder
    revision: str | None  # branch, tag or commit on the Hub
    chat_template: FilePath | None  # a Jinja file, for a tokenizer that has none or to replace its own

    def fetch(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        folder = Path(self.id) if Path(self.id).is_dir() else self._download()
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            AutoConfig.from_pretrained(folder, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=self.torch_dtype(), attn_implementation=self.attn_implementation,
                use_safetensors=True, output_loading_info=True, **options,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = textwrap.shorten(str(error), 300)
            raise ConfigError(f"model.id={self.id!r} is not a causal language model that loads: {reason}") from error
        if lacking := sorted(report["missing_keys"]):  # transformers makes them up at random
            raise ConfigError(f"model.id={self.id!r} lacks {len(lacking)} of its weights, such as {lacking[0]}")
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template.read_text(encoding="utf-8")
        return model, tokenizer

    def _download(self) -> Path:
        try:
            folder = Path(snapshot_download(self.id, revision=self.revision, allow_patterns=FILES))
        except GatedRepoError as error:
            raise ConfigError(f"model.id={self.id!r} is gated: accept its terms on the Hub and log in first") from error
        except RevisionNotFoundError as error:
            raise ConfigError(f"model.revision={self.revision!r}: model.id={self.id!r} has no such revision") from error
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise ConfigError(f"model.id={self.id!r} is neither a folder nor a model on the Hub") from error
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = textwrap.shorten(str(error), 200)
            raise ConfigError(
                f"model.id={self.id!r}: not in the cache, and not to be had from the Hub: {reason}"
            ) from error
        check_snapshot(folder)
        return folder


def check_snapshot(folder: Path) -> None:
    """Compare weights with the SHA-256 that the Hub gave: its cache names each large file by it. Raises ConfigError."""
    for path in sorted(folder.glob("*.safetensors")):
        expected = path.resolve().name
        if not re.fullmatch("[0-9a-f]{64}", expected):
            logger.warning("{}: the Hub gave no SHA-256 for it; not checked", path.name)
        elif (found := sha256(path)) != expected:
            raise ConfigError(f"model.id: {path.resolve()} has SHA-256 {found}; delete that file and run again")
