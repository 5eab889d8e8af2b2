"""No field of an option is forgotten: each has a row in the table of reruns, or is part of what keys are made of."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers.readers import TABLE
from helpers.replay import two_rounds
from hydra.utils import get_class
from omegaconf import OmegaConf

from steer_heal.config import Config
from steer_heal.eval.damage import SoundText
from steer_heal.experiment import Experiment
from steer_heal.main import CONF
from steer_heal.model import ModelConfig
from steer_heal.trait import Probe


def fixed(kind: type[Config], field: str) -> bool:
    """True if a field admits one value only, as an option's name does."""
    annotation = kind.model_fields[field].annotation
    return typing.get_origin(annotation) is Literal and len(typing.get_args(annotation)) == 1


def fields(exp: Experiment) -> Iterator[tuple[str, type[Config], str]]:
    """Path, class and name of every field that can be changed, of the experiment and of all its options."""

    def below(option: Config, path: str) -> Iterator[tuple[str, type[Config], str]]:
        for name in type(option).model_fields:
            value, here = getattr(option, name), f"{path}{name}"
            members = value if isinstance(value, dict) else {}
            if isinstance(value, Config):
                yield from below(value, f"{here}.")
            elif not members and not fixed(type(option), name):
                yield here, type(option), name
            for member, inner in members.items():
                yield from below(inner, f"{here}.{member}.")

    return below(exp, "")


def covered() -> set[tuple[type[Config], str]]:
    """The fields that have a row, as class and name."""
    found = {(kind, name) for path, kind, name in fields(two_rounds()) if path == "model.device"}  # has its own test
    for under, rows in TABLE.items():
        paths = {override.partition("=")[0] for override in rows}
        exp = two_rounds(*([under] if under else []))
        found |= {(kind, name) for path, kind, name in fields(exp) if path in paths}
    return found


def test_every_field_has_a_row() -> None:
    """Reference: the classes of the options, those of the tiny experiment and all that conf/ has."""
    have = covered()
    missing = [path for path, kind, name in fields(two_rounds()) if (kind, name) not in have]
    assert not missing, f"the table has no row for {', '.join(missing)}"
    for file in sorted(CONF.glob("*/*.yaml")):
        target = OmegaConf.select(OmegaConf.load(file), "_target_")
        kind: Any = get_class(target) if target else None
        if kind is None or issubclass(kind, ModelConfig):  # presets are made of the others; models follow below
            continue
        missing = [name for name in kind.model_fields if (kind, name) not in have and not fixed(kind, name)]
        assert not missing, f"{file.relative_to(CONF)}: the table has no row under it for {', '.join(missing)}"


def other_values(folder: Path) -> dict[str, Any]:
    """Another value for every field of a model option."""
    (folder / "template.jinja").write_text("template")
    return {
        "name": "other", "note": "other", "dtype": "float32", "device": "cpu", "attn_implementation": "eager",
        "id": "owner/other", "revision": "other", "chat_template": folder / "template.jinja", "init_seed": 1,
        "quantization": "nf4", "template": (("enable_thinking", False),),
    }  # fmt: skip


@pytest.mark.parametrize("model", sorted(path.stem for path in CONF.glob("model/*.yaml")))
def test_every_field_of_a_model_but_name_and_note_is_part_of_it(model: str, tmp_path: Path) -> None:
    """Reference: the fields of the class. No weights are loaded."""
    given = ["model.dtype=bfloat16", "model.device=auto", *(["model.id=owner/name"] if model == "hub" else [])]
    option, others = two_rounds(f"model={model}", *given).model, other_values(tmp_path)
    missing = type(option).model_fields.keys() - others.keys()
    assert not missing, f"no other value for {sorted(missing)} of model={model}"
    for field in type(option).model_fields:
        other = option.model_copy(update={field: others[field]})
        same = other.fingerprint == option.fingerprint
        assert same == (field in ("name", "note")), f"model.{field} {'does not count' if same else 'counts'}"


@pytest.mark.parametrize("item", [Probe(prompt="p", trait="t", counter="c"), SoundText(request="r", text="text")])
def test_every_field_of_data_in_lists_counts(item: Config) -> None:
    """Reference: the fields of the class."""
    for field in type(item).model_fields:
        assert item.model_copy(update={field: "other"}).fingerprint != item.fingerprint, f"{field} does not count"
