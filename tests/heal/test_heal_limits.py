"""Healing: its errors, its failures, and that it leaves the model unchanged."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers.toys import (
    RUNTIME,
    adapter,
    assert_alike,
    assert_untouched,
    healed,
    hooks_of,
    lora,
    off,
    preset,
    regulariser,
    rows,
    snapshot,
)

from steer_heal.artifacts import Completions, Row
from steer_heal.config import ConfigError
from steer_heal.heal import HealError
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.model import load

MADE = rows(8)
NONE = Completions(rows=())


def failing(row: Row) -> None:
    if row["step"] == 1:
        raise KeyError("the log is full")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_left_as_it_was(dtype: str) -> None:
    """Reference: a copy of the state dict, modules and hooks, after a heal and after one that raises."""
    base = load(preset(f"model.dtype={dtype}").model)
    student = Student(base).learn(adapter(base, 1))
    before, hooks = snapshot(base.model), hooks_of(base.model)
    found = healed(student, regulariser("kl_rev"))
    assert_untouched(base.model, before)
    assert {factor.dtype for factor in found.factors.values()} == {torch.float32}, "the adapter is not float32"
    assert all(math.isfinite(value) for row in found.curve for value in row.values()), found.curve
    with pytest.raises(KeyError, match="the log is full"):
        healed(student, regulariser("kl_rev"), log=failing)
    assert_untouched(base.model, before)
    assert hooks_of(base.model) == hooks, "hooks were left behind"
    trainable = [name for name, p in base.model.named_parameters() if p.requires_grad or p.grad is not None]
    assert not trainable, f"{trainable} can still be trained"


def test_sequences_without_a_target_are_skipped_and_counted(tiny: Base) -> None:
    """Reference: the same heal on what is left after cutting by hand."""
    short = tuple(dataclasses.replace(row, prompt_ids=(5, 6), ids=(7, 8, 9, 10)) for row in MADE.rows[:3])
    long = tuple(
        dataclasses.replace(row, prompt_ids=tuple(range(5, 5 + n)))
        for row, n in zip(MADE.rows[:2], (4, 5), strict=True)
    )
    made = Completions(rows=(*long, *short))
    found = healed(Student(tiny), regulariser("nll"), made=made, held=NONE, max_len=4, steps=2)
    cut = Completions(rows=tuple(dataclasses.replace(row, ids=(7, 8)) for row in short))
    by_hand_cut = healed(Student(tiny), regulariser("nll"), made=cut, held=NONE, steps=2)
    assert (found.summary["n_train"], found.summary["n_too_long"]) == (3, 2), found.summary
    assert_alike(found, by_hand_cut, "cut to max_len")


def test_all_too_long_is_refused_with_the_numbers(tiny: Base) -> None:
    """Reference: the message names how many there were, and max_len; nothing was trained."""
    long = Completions(rows=tuple(dataclasses.replace(row, prompt_ids=(5,) * 6) for row in MADE.rows))
    before = snapshot(tiny.model)
    with pytest.raises(HealError, match=r"none of 8 completions fits heal.max_len=6"):
        healed(Student(tiny), regulariser("nll"), made=long, max_len=6)
    assert_untouched(tiny.model, before)


@pytest.mark.parametrize("kind", ["nll", "kl_rev"])
def test_a_loss_that_is_not_finite_stops_the_heal(tiny: Base, kind: str) -> None:
    """Reference: weights of 1e30 after a step at that rate; the message names step, completions and a way out."""
    before = snapshot(tiny.model)
    pattern = r"step 1: loss .*(nan|inf).*completions \[\d(, \d){3}\].*lower heal\.lr \(now 1e\+30\)"
    with pytest.raises(HealError, match=pattern):
        healed(Student(tiny), regulariser(kind), lr=1e30, warmup=0.0)
    assert_untouched(tiny.model, before)


def test_a_reference_that_is_not_finite_stops_the_heal(tiny: Base, second_round: Student) -> None:
    """Reference: one NaN in the weights of base, of which the student before knows nothing."""
    model = copy.deepcopy(tiny.model)
    student = Student(Base(tiny.fingerprint, lambda: (model, tiny.tokenizer)))
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(HealError, match="step 0: loss nan"):
        healed(student, regulariser("kl_fwd"))


def test_a_heal_leaves_the_global_generator_alone(tiny: Base) -> None:
    """Reference: the numbers that torch draws next, without a heal in between."""
    torch.manual_seed(5)
    expected: Any = torch.rand(3)
    torch.manual_seed(5)
    healed(Student(tiny), regulariser("nll"), steps=1)
    assert torch.equal(torch.rand(3), expected), "a heal draws from or reseeds the global generator"


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("q_proj", "lm_head"), ("nonsense",), ("norm",)])
def test_modules_that_cannot_be_adapted_are_refused(tiny: Base, targets: tuple[str, ...]) -> None:
    """Reference: the head is taken as frozen and embeddings have no such factors, so either would be lost silently."""
    before = snapshot(tiny.model)
    with pytest.raises(ConfigError, match=rf"lora\.target_modules=.*{targets[-1]}.*is not allowed"):
        healed(Student(tiny), regulariser("nll"), size=lora(targets=targets))
    assert_untouched(tiny.model, before)


def test_named_modules_are_adapted_and_no_others(tiny: Base) -> None:
    """Reference: PEFT's names; the view takes them up, as the error of folding says."""
    found = healed(Student(tiny), regulariser("nll"), size=lora(targets=("q_proj", "down_proj")))
    kinds = sorted({name.rpartition(".")[2] for name in found.modules()})
    assert kinds == ["down_proj", "q_proj"], f"{kinds} were adapted"
    assert len(found.modules()) == 2 * 4, f"{len(found.modules())} modules were adapted in four blocks"
    assert off(found) < 1e-5, f"the view differs from the adapter by {off(found)} of the states"


@pytest.mark.parametrize("shape", [{}, {"checkpoint_blocks": True}], ids=["plain", "checkpointed"])
def test_blocks_below_the_first_adapted_one_run_once(
    second_round: Student, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
) -> None:
    """Reference: the same heal with all blocks run every step; and how often the lowest block runs."""
    size, reg, how = lora(first=0.5), regulariser("kl_rev", 1.0, 0.02), RUNTIME.model_copy(update=shape)
    ran: list[int] = []
    attention: Any = second_round.base.blocks[0].self_attn
    hook = attention.register_forward_hook(lambda *_: ran.append(1))
    rested, once = healed(second_round, reg, size=size, how=how, epochs=3, held=rows(0)), len(ran)
    monkeypatch.setattr("steer_heal.heal.freeze", lambda *_: None)
    assert_alike(rested, healed(second_round, reg, size=size, how=how, epochs=3, held=rows(0)), "rested")
    hook.remove()
    assert len(ran) - once >= once + 6, f"the lowest block ran {once} times where it rests, else {len(ran) - once}"
    adapted = {int(name.split(".")[2]) for name in rested.modules()}
    assert adapted == {2, 3}, f"of four blocks {sorted(adapted)} were adapted"
    left = [i for i, block in enumerate(second_round.base.blocks) if "forward" in vars(block)]
    assert not left, f"blocks {left} are left with a forward of their own"
