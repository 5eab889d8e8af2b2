"""Weights, ids and lengths that are odd in one way: right results, or one line before anything starts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.compose import composed
from helpers.folders import edit_json, from_folder
from helpers.odd_models import cell, refused, retokenized
from helpers.toys import lora
from safetensors.torch import load_file, save_file
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
)

from steer_heal.config import ConfigError
from steer_heal.lm.base import Base
from steer_heal.lora import live_adapter
from steer_heal.model.tiny import TEMPLATE, tiny_tokenizer

# Weights and files


def wrapped(base: Base) -> peft.PeftModel:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(from_copy(base), config)  # type: ignore[return-value]


def from_copy(base: Base) -> Any:
    return copy.deepcopy(base.model)


def test_an_adapter_beside_the_weights_is_refused(tiny: Base, saved: Path) -> None:
    """transformers would put it on top of the weights without a word."""
    wrapped(tiny).save_pretrained(saved)
    assert "an adapter lies beside the weights" in refused(saved)


def test_an_adapter_alone_says_what_it_is(tiny: Base, tmp_path: Path) -> None:
    wrapped(tiny).save_pretrained(tmp_path / "adapter")
    tiny.tokenizer.save_pretrained(tmp_path / "adapter")
    assert "is an adapter" in (line := refused(tmp_path / "adapter"))
    assert "merge_and_unload" in line


def test_weights_without_a_place_are_told_and_no_reason_to_refuse(saved: Path, warnings: list[str]) -> None:
    """The tiny model has four blocks; towers and further heads of others are legitimate."""
    edit_json(saved / "config.json", num_hidden_layers=3)
    cell(saved).prepare()
    (line,) = (line for line in warnings if "no place" in line)
    assert "9 of its weights have no place in the model of its config.json, such as model.layers.3." in line


def test_biases_that_the_configuration_has_no_place_for(saved: Path, warnings: list[str]) -> None:
    held = load_file(saved / "model.safetensors")
    held |= {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(32) for i in range(4)}
    save_file(held, saved / "model.safetensors", metadata={"format": "pt"})
    cell(saved).prepare()
    assert any("4 of its weights have no place" in line for line in warnings)


def test_a_lacking_weight_is_found_before_the_start(saved: Path) -> None:
    held = load_file(saved / "model.safetensors")
    held.pop("model.layers.1.mlp.up_proj.weight")
    save_file(held, saved / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of its weights, such as model.layers.1.mlp.up_proj.weight" in refused(saved)


def test_a_lacking_shard_is_found_before_the_start(tiny: Base, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    tiny.model.save_pretrained(saved, max_shard_size="30KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    assert len(shards) > 2
    cell(saved).prepare()
    shards[1].unlink()
    line = refused(saved)
    assert str(saved) in line
    assert shards[1].name in line or "lacks" in line


def test_a_weight_that_is_no_number_is_named(saved: Path) -> None:
    held = load_file(saved / "model.safetensors")
    held["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(held, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is not finite"):
        _ = from_folder(saved).model


# Ids and lengths


def test_a_pad_id_exists(saved: Path) -> None:
    """A pad token that was added for padding has no row among the model's embeddings."""
    folder = retokenized(saved, lambda t: t.add_special_tokens({"pad_token": "[PAD]"}))
    cell(folder).prepare()
    beyond = from_folder(folder)
    assert beyond.tokenizer.pad_token_id == 400, "this test needs a pad token beyond the vocabulary"
    assert 0 <= beyond.pad_id < 400


def test_without_eos_the_template_says_where_a_turn_ends(saved: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        edit_json(saved / name, eos_token_id=None, pad_token_id=None)

    def forget(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.eos_token = tokenizer.pad_token = None

    retokenized(saved, forget)
    cell(saved).prepare()
    base = from_folder(saved)
    assert base.end_ids == {base.tokenizer.convert_tokens_to_ids("<|end|>")}
    assert 0 <= base.pad_id < 400


@pytest.mark.parametrize("id", [-1, 400])
def test_an_eos_that_the_model_cannot_say_is_refused(saved: Path, id: int) -> None:
    for name in ("config.json", "generation_config.json"):
        edit_json(saved / name, eos_token_id=id)
    assert f"eos_token_id={id} of its config.json" in refused(saved)


def test_a_token_of_the_template_beyond_the_vocabulary_is_refused(saved: Path) -> None:
    def tagged(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        tokenizer.chat_template = TEMPLATE.replace("<|assistant|>", "<|im_start|>assistant")

    line = refused(retokenized(saved, tagged))
    assert "holds token 400 (<|im_start|>)" in line
    assert "among the model's 400" in line


def gpt2(folder: Path, positions: int) -> Path:
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=32, n_layer=4, n_head=4, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_texts_longer_than_learned_positions_are_refused(tmp_path: Path) -> None:
    line = refused(gpt2(tmp_path / "short", 96))
    assert "tokens, and the model has positions for 96; shorten it" in line
    cell(gpt2(tmp_path / "long", 1024)).prepare()


def test_room_for_answers_counts(tmp_path: Path) -> None:
    """Prompts alone fit; with the answers they do not."""
    folder = gpt2(tmp_path / "gpt2", 420)
    cell(folder).prepare()
    assert "or lower generate.max_new_tokens" in refused(folder, "generate.max_new_tokens=400")


def test_texts_longer_than_rotary_positions_are_told(saved: Path, warnings: list[str]) -> None:
    edit_json(saved / "config.json", max_position_embeddings=97)
    cell(saved).prepare()
    assert any("has positions for 97" in line for line in warnings)


def test_what_is_checked_before_the_start_is_what_is_done(saved: Path) -> None:
    """The skeleton on which an adapter is tried has the layers that the heal adapts."""
    config = composed("model=hub", f"model.id={saved}", "model.dtype=float32").model
    size, skeleton = lora(first=0.5), config.skeleton()
    size.check_fits(skeleton)
    assert all(parameter.is_meta for parameter in skeleton.parameters()), "weights were loaded"
    with live_adapter(size, from_folder(saved).model, 0) as live:
        adapted = sorted(live.peft_config["default"].target_modules)  # type: ignore[arg-type]
    assert adapted == sorted(size.peft_config(skeleton).target_modules)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.q_proj.weight", "model.embed_tokens.weight"])
def test_a_value_that_few_tokens_meet_is_found(saved: Path, name: str) -> None:
    held = load_file(saved / "model.safetensors")
    held[name][-1, -1] = float("inf")
    save_file(held, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{name} is not finite"):
        _ = from_folder(saved).model


def test_a_weight_of_another_shape_is_named_with_both(saved: Path) -> None:
    edit_json(saved / "config.json", intermediate_size=48)
    line = refused(saved)
    assert "model.layers.0.mlp.down_proj.weight is [32, 64], and [32, 48] by its config.json" in line


def test_tables_of_positions_that_are_no_embeddings_count(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    plain = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    ctrl = CTRLConfig(vocab_size=400, n_positions=96, n_embd=32, n_layer=4, n_head=4, dff=32, **plain)
    mpt = MptConfig(vocab_size=400, d_model=32, n_layers=4, n_heads=4, max_seq_len=96, **plain)
    for made in (CTRLLMHeadModel(ctrl), MptForCausalLM(mpt)):
        folder = tmp_path / type(made).__name__
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert "positions for 96" in refused(folder), folder.name
