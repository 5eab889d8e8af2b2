"""Any model, from a folder or the Hub: it loads as saved, or is rejected in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.compose import composed
from helpers.folders import edit_json, from_folder
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from steer_heal.config import ConfigError
from steer_heal.generate import generate
from steer_heal.lm.base import Base, blocks_of
from steer_heal.lm.student import Student
from steer_heal.model import checksums, hollow, sha256
from steer_heal.model.tiny import TEMPLATE

SYSTEM, USER = "You are a loving assistant.", "How are you?"


def refused(folder: Path | str, *overrides: str) -> str:
    """The one line with which a model is rejected."""
    with pytest.raises(ConfigError) as error:
        _ = from_folder(folder, *overrides).model
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_folder_loads_as_what_was_saved(tiny: Base, saved: Path) -> None:
    base = from_folder(saved)
    ids = torch.tensor([tiny.chat.prompt(SYSTEM, USER)])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, tiny.model(ids).logits)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert (base.end_ids, base.pad_id, len(base.blocks)) == (tiny.end_ids, tiny.pad_id, 4)


def test_answers_are_drawn_as_configured_whatever_came_with_the_model(tiny: Base, saved: Path) -> None:
    """A model's own generation_config may hold penalties, which transformers applies unless told otherwise."""
    edit_json(saved / "generation_config.json", repetition_penalty=3.0, suppress_tokens=[5, 6], do_sample=True)
    exp = composed("experiment=tiny")

    def answers(base: Base) -> list[tuple[int, ...]]:
        prompts = ["How are you?", "What is it?", "Tell me about it."]
        drawn = generate(exp.generate, Student(base), SYSTEM, prompts, None, [0.0], 0, runtime=exp.runtime)
        return [row.ids for row in drawn.rows]

    assert answers(from_folder(saved)) == answers(tiny)


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_a_folder_does_not_choose_its_attention(saved: Path, asked: str) -> None:
    """transformers lets config.json choose, also a kernel that is not installed; a fingerprint would not know."""
    edit_json(saved / "config.json", _attn_implementation="flash_attention_2")
    base = from_folder(saved, f"model.attn_implementation={asked}")
    assert base.model.config._attn_implementation == asked
    assert len(blocks_of(hollow(saved))) == 4


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def one_lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def one_misshapen(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def own_code(folder: Path) -> None:
    (folder / "theirs.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w')\n")
    names = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}
    edit_json(folder / "config.json", model_type="theirs", auto_map=names)


def no_text_model(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="clip")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_weights, "no *.safetensors"),
        (pickled, "pickled weights are not read"),
        (truncated, "model.safetensors is incomplete or damaged"),
        (one_lacking, "lacks 1 of its weights, such as model.layers.1.mlp.up_proj.weight"),
        (one_misshapen, "not a causal language model"),
        (own_code, "custom code"),
        (no_text_model, "not a causal language model"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_what_does_not_load_is_refused(saved: Path, spoil: Callable[[Path], None], said: str) -> None:
    """transformers fills in lacking weights at random, and pickled ones can run code."""
    spoil(saved)
    message = refused(saved)
    assert message.startswith("model.id=")
    assert said in message
    assert not (saved / "it-ran").exists(), "code of a model's folder ran"


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "not a causal language model" in refused(tmp_path)


def test_a_tokenizer_without_a_chat_template_needs_one(saved: Path, tmp_path: Path) -> None:
    (saved / "chat_template.jinja").unlink()
    assert "model.chat_template" in refused(saved)
    given = tmp_path / "given.jinja"
    given.write_text(TEMPLATE)
    base = from_folder(saved, f"model.chat_template={given}")
    assert base.chat.prompt(SYSTEM, USER)
    assert "model.chat_template=" in refused(saved, f"model.chat_template={tmp_path / 'none.jinja'}")


def test_an_unknown_id_without_a_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not available from the Hub" in refused("nobody/no-such-model")
    assert "neither a folder nor" in refused("not an id")


def test_a_flipped_bit_in_the_hub_cache_is_found(saved: Path, tmp_path: Path, warnings: list[str]) -> None:
    """The Hub's cache: snapshots/<commit>/<file> points at blobs/<SHA-256>."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    content = (saved / "model.safetensors").read_bytes()
    blob = blobs / sha256(saved / "model.safetensors")
    blob.write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(blob)
    checksums(snapshot)
    assert warnings == []
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError) as error:
        checksums(snapshot)
    assert str(blob) in str(error.value), "deleting the link alone would bring the same file back"
