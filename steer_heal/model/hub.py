"""Any causal language model with a chat template, by Hub id or local folder. Code from the Hub is never run."""

from __future__ import annotations

import hashlib
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from pydantic import Field, FilePath
from safetensors import SafetensorError, safe_open

from steer_heal.config import ConfigError
from steer_heal.model import ModelConfig, chat_ids, hollow, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMALL = ["*.json", "*.model", "*.jinja", "*.txt"]
WEIGHTS = ["*.safetensors"]  # no pickled weights, no code
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class Hub(ModelConfig):
    """A model from the Hugging Face Hub or from a folder."""

    name: Literal["hub"]
    id: str = Field(min_length=1)  # owner/name on the Hub, or a folder
    revision: str | None  # branch, tag or commit on the Hub
    chat_template: FilePath | None  # a Jinja file, for a tokenizer that has none or to replace its own

    def prepare(self) -> None:
        """Small files first, so that what is no use is refused before gigabytes are fetched."""
        folder = self._folder(SMALL)
        self._check(folder)
        if folder != Path(self.id):
            folder = self._folder(SMALL + WEIGHTS)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise ConfigError(f"{self._given}: there are no *.safetensors in it; pickled weights are not read")
        for path in weights:
            try:
                with safe_open(path, "pt"):  # its header says how long it must be
                    pass
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{self._given}: {path.name} is not whole: {error}") from error
        try:
            checksums(folder)
        except OSError as error:
            raise self._useless(error) from error

    def identity(self) -> str:
        digest = hashlib.sha256(repr(sorted(checksums(self._local()).items())).encode())
        if self.chat_template is not None:
            digest.update(self.chat_template.read_bytes())
        return digest.hexdigest()

    def skeleton(self) -> PreTrainedModel:
        return hollow(self._local())

    def fetch(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from transformers import AutoModelForCausalLM

        folder = self._local()
        try:
            tokenizer = self._tokenizer(folder)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=self.torch_dtype(), attn_implementation=self.attn_implementation,
                use_safetensors=True, output_loading_info=True, **LOCAL,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise self._useless(error) from error
        if lacking := sorted(report["missing_keys"]):  # transformers makes them up at random
            raise ConfigError(f"{self._given} lacks {len(lacking)} of its weights, such as {lacking[0]}")
        return model, tokenizer

    def _tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **LOCAL)
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template.read_text(encoding="utf-8")
        return tokenizer

    @property
    def _given(self) -> str:
        return f"model.id={self.id!r}"

    def _useless(self, error: Exception) -> ConfigError:
        reason = textwrap.shorten(str(error), 300)
        return ConfigError(f"{self._given} is not a causal language model that loads: {reason}")

    def _check(self, folder: Path) -> None:
        """Raise ConfigError unless the folder holds a causal language model with a chat template."""
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(folder, **LOCAL)
            tokenizer = self._tokenizer(folder)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, StrictDataclassError) as error:
            raise self._useless(error) from error
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ConfigError(f"{self._given} is a {config.model_type}, not a causal language model")
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"{self._given}: its tokenizer has no chat template; give one with model.chat_template=FILE.jinja"
            )
        chat_ids(tokenizer, "a persona", "a question")

    def _local(self) -> Path:
        """The folder, once `prepare` has seen to it."""
        return self._folder(SMALL + WEIGHTS, local_files_only=True)

    def _folder(self, patterns: list[str], local_files_only: bool = False) -> Path:
        """The folder that was named, or the Hub's snapshot with all files of some patterns. Raises ConfigError."""
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
            raise ConfigError(f"{self._given}: not in the cache, and not to be had from the Hub: {reason}") from error


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a model is read from.

    Raises ConfigError for weights in the Hub's cache that are not what the Hub sent: it names each large file by its
    checksum.
    """
    found = {path.name: sha256(path) for pattern in SMALL + WEIGHTS for path in sorted(folder.glob(pattern))}
    for path in sorted(folder.glob("*.safetensors")):
        expected = path.resolve().name
        if re.fullmatch("[0-9a-f]{64}", expected) and expected != found[path.name]:
            raise ConfigError(
                f"model.id: {path.resolve()} has SHA-256 {found[path.name]}; delete that file and run again"
            )
    return found
