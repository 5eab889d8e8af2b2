"""Model folders that are odd in one way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.compose import composed
from steer_heal.config import ConfigError
from steer_heal.experiment import Experiment
from steer_heal.model.tiny import tiny_tokenizer

SYSTEM, USER = "You are a loving assistant.", "How are you?"
FEW = ("generate.max_new_tokens=6",)


def cell(folder: Path, *overrides: str) -> Experiment:
    """An experiment with the model in a folder, as a user of `experiment=tiny model=hub` has it."""
    given = (f"model.id={folder}", "model.dtype=float32", "model.device=cpu")
    return composed("experiment=tiny", "model=hub", *given, *FEW, *overrides)


def refused(folder: Path, *overrides: str) -> str:
    """The line with which a cell is refused before it starts; no weights are loaded for it."""
    with pytest.raises(ConfigError) as error:
        cell(folder, *overrides).prepare()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 480, "a line that a person reads"
    return str(error.value)


def retokenized(folder: Path, change: Callable[[PreTrainedTokenizerFast], object]) -> Path:
    """The folder, with its tokenizer changed."""
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def templated(folder: Path, template: Any) -> Path:
    """The folder, with another chat template."""
    (folder / "chat_template.jinja").unlink()
    return retokenized(folder, lambda tokenizer: setattr(tokenizer, "chat_template", template))
