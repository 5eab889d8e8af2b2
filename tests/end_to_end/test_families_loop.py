"""A complete round with tiny models of many families, each from a folder with a model and a tokenizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from families.subject import experiment
from helpers.families import BLOCKS, family, taller
from helpers.toys import assert_untouched, hooks_of, snapshot
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel

from steer_heal.lm.base import Base
from steer_heal.loop import run
from steer_heal.model import load
from steer_heal.model.tiny import TEMPLATE, tiny_tokenizer
from steer_heal.result import Result
from steer_heal.store import Store
from steer_heal.tracker.jsonl import JsonlConfig


def one_round(folder: Path, *overrides: str) -> tuple[Base, Result]:
    """A round of the model in a folder, whose weights must be what they were; every figure must be finite."""
    exp = experiment(str(folder / "model"), *overrides)
    base = load(exp.model)
    before = snapshot(base.model)
    with JsonlConfig(name="jsonl").open(folder, config={}, group=None, run_name="families") as tracker:
        result = run(exp, Store(folder / "store"), tracker)
    assert_untouched(base.model, before)
    assert not hooks_of(base.model), f"hooks were left: {hooks_of(base.model)}"
    assert len(result.rounds) == 1, f"{len(result.rounds)} rounds: {result.stopped}"
    odd = {key: value for key, value in result.rows[0].items() if not math.isfinite(value)}
    assert not odd, f"figures that are not finite: {odd}"
    return base, result


def gemmas() -> Any:
    """A tokenizer that opens whatever it encodes, as its chat template does too; the template knows no system role."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TEMPLATE
    )
    return tokenizer


def put_down(name: str, folder: Path) -> PreTrainedModel:
    """The family's model and a tokenizer, for Gemma with its peculiarities, in a folder."""
    model, tokenizer = taller(name), gemmas() if name.startswith("gemma") else tiny_tokenizer()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model


@pytest.mark.parametrize("name", BLOCKS)
def test_a_whole_round(name: str, tmp_path: Path) -> None:
    """Reference: the saved weights, the family's path, and what a heal does to a model: something."""
    saved = snapshot(put_down(name, tmp_path))
    base, result = one_round(tmp_path)
    assert_untouched(base.model, saved)
    place, adapted = BLOCKS[name].rpartition(".")[0], result.rounds[0].adapter.modules()
    outside = [module for module in adapted if not module.startswith(f"{place}.")]
    assert adapted, f"{name}: nothing is adapted"
    assert not outside, f"{name}: adapted outside {place}: {outside[:3]}"
    row = result.rows[0]
    assert row["heal_state_change"] > 1e-3, f"{name}: healing changed states by {row['heal_state_change']} only"
    assert row["heal_fold_error"] < 1e-4, f"{name}: folded, the adapter is off by {row['heal_fold_error']}"
    assert row["vector_norm"] > 0, f"{name}: personas do not differ"
    if base.tokenizer.bos_token is not None:
        for answer in result.rounds[0].models["healed"].answers.rows:
            opening = [i for i, token in enumerate(answer.prompt_ids) if token == base.tokenizer.bos_token_id]
            assert opening == [0], f"{name}: {base.tokenizer.bos_token} at {opening} of a prompt"


def test_named_options_fit_a_wrapper_by_its_text_blocks(tmp_path: Path) -> None:
    """Reference: paths; the tower has layers of that name as well, and none is to be touched."""
    put_down("gemma3_wrapped", tmp_path)
    towers = [n for n, _ in family("gemma3_wrapped").named_modules() if "tower" in n and n.endswith("q_proj")]
    assert towers, "this test needs a tower with a q_proj"
    _, result = one_round(tmp_path, "lora.target_modules=[q_proj]", "steer.layers=[3]", "lora.first=0.5")
    expected = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in (2, 3)]
    assert sorted(result.rounds[0].adapter.modules()) == expected


def test_blocks_that_share_keys_with_lower_ones_do_not_rest(tmp_path: Path) -> None:
    """Reference: Gemma4's blocks 2 and 3 read the keys of blocks 0 and 1, without which they cannot run."""
    put_down("gemma4_wrapped", tmp_path)
    _, result = one_round(tmp_path, "lora.first=0.5")
    blocks = {module.split("layers.")[1].split(".")[0] for module in result.rounds[0].adapter.modules()}
    assert blocks == {"2", "3"}
