"""One short loop on the bundled real model: it shows the effect that the project is about."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.compose import composed

from steer_heal.loop import run
from steer_heal.model import load
from steer_heal.result import Result
from steer_heal.store import Store
from steer_heal.tracker.jsonl import JsonlConfig

pytestmark = [pytest.mark.slow(150), pytest.mark.long]

SHORT = (
    "reg=nll", "tracker=jsonl", "generate=nucleus", "dose.alpha=[0.6,0.8]", "generate.max_new_tokens=40",
    "generate.n_prompts=16", "heal.n_keep=24", "heal.min_train=16", "heal.epochs=5",
)  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder: Path = tmp_path_factory.mktemp("bundled")
    exp = composed(*SHORT)
    few = {"probes": exp.trait.probes[:24], "held_out": exp.trait.held_out[:8]}
    damage = exp.eval["damage"]
    texts = damage.model_copy(update={"texts": damage.texts[:4]})  # type: ignore[attr-defined]
    exp = exp.model_copy(update={"trait": exp.trait.model_copy(update=few), "eval": exp.eval | {"damage": texts}})
    with JsonlConfig(name="jsonl").open(folder, config={}, group=None, run_name="short") as tracker:
        return run(exp, Store(folder / "store"), tracker)


def test_the_bundled_model_knows_english() -> None:
    """A conversion bug, such as permuted heads, leaves a model that runs but outputs nonsense."""
    base = load(composed().model)
    text = "The capital of France is Paris, and the capital of Italy is Rome."
    ids = torch.tensor([base.chat.text(text)])
    with torch.no_grad():
        logits = base.model(ids).logits[0, :-1].float()
    assert torch.nn.functional.cross_entropy(logits, ids[0, 1:]) < 3
    assert sum(parameter.numel() for parameter in base.model.parameters()) == 134_515_008
    assert (len(base.blocks), base.model.dtype) == (30, composed().model.torch_dtype())
    spoken = base.tokenizer.decode(base.chat.prompt("Be kind.", "Hello"))
    assert spoken.count("<|im_start|>system") == 1, "its template would add a system message of its own"
    assert "Be kind." in spoken
    assert spoken.endswith("<|im_start|>assistant\n")


def test_steering_moves_the_trait_up_and_breaks_text(result: Result) -> None:
    row = result.rows[0]
    assert row["steered/trait"] > row["base/trait"] + 0.3
    assert row["steered/damage"] > 0.2, "neutral text must have suffered, or there is nothing to heal"


def test_healing_keeps_half_of_the_move_at_less_than_half_of_the_damage(result: Result) -> None:
    row = result.rows[0]
    steered, healed = (row[f"{who}/trait"] - row["base/trait"] for who in ("steered", "healed"))
    assert healed >= 0.5 * steered, f"healed {healed:+.2f}, steered {steered:+.2f} nats/token over base"
    assert row["healed/damage"] < 0.5 * row["steered/damage"]


def test_healing_learned_what_the_steered_model_says_on_new_prompts(result: Result) -> None:
    values = [step["val_nll"] for step in result.rounds[0].adapter.curve if "val_nll" in step]
    assert values[-1] < values[0] - 0.1


def test_the_adapter_starts_as_no_change_and_folds_into_the_dense_view(result: Result) -> None:
    """In bfloat16 rounding is all that may differ, at the start and after folding: little beside what was learned."""
    adapter = result.rounds[0].adapter
    assert adapter.curve[0]["kl_rev"] < 0.02
    assert adapter.summary["fold_error"] < 0.15, "relative to the change"
    assert abs(adapter.summary["fold_projection"] - 1) < 0.03
    assert all(math.isfinite(step["gnorm"]) for step in adapter.curve)


def test_completions_are_text_and_end_as_the_model_ended_them(result: Result) -> None:
    for who, model in result.rounds[0].models.items():
        rows = model.answers.rows
        assert len(rows) == 8
        assert all(row.text and "<|im_" not in row.text for row in rows), f"special tokens in the text of {who}"
        assert all(len(row.ids) == 40 or row.ended for row in rows)
