"""The dense view of a student against PEFT's own forward and merge, and that leaving it restores every bit."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers.compose import composed
from helpers.toys import adapter, assert_untouched, by_hand, logits_of, neighbours, snapshot
from torch import Tensor

from steer_heal.artifacts import Adapter
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.model import load

IDS = tuple(range(20, 60))


@pytest.fixture(scope="module")
def two_rounds(tiny: Base) -> Student:
    """Adapters of two sizes and scalings, both large enough to matter."""
    return Student(tiny).learn(adapter(tiny, 1, r=3)).learn(adapter(tiny, 2, r=5, alpha=7.5))


@pytest.fixture(scope="module")
def bf16() -> Base:
    """The tiny model in bfloat16."""
    return load(composed("experiment=tiny", "model.dtype=bfloat16").model)


@pytest.fixture(scope="module")
def gpt2() -> Base:
    """A random GPT-2, whose linear layers are transposed (Conv1D)."""
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=0, bos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    return Base("gpt2", lambda: (model, None))  # type: ignore[arg-type]


def saved(student: Student, folder: Path) -> list[Path]:
    """A PEFT checkpoint for each round."""
    folders = [folder / f"round{k}" for k in range(len(student.history))]
    for learned, place in zip(student.history, folders, strict=True):
        place.mkdir()
        learned.save(place)
    return folders


def peft_model(base: Base, folders: list[Path]) -> Any:
    """All checkpoints on a fresh copy of the base, by PEFT alone."""
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), folders[0], adapter_name="round0")
    for k, place in enumerate(folders[1:], start=1):
        wrapped.load_adapter(place, adapter_name=f"round{k}")
    return wrapped.eval()


def view_logits(student: Student, *ids: int) -> Tensor:
    with student.view() as model:
        return logits_of(model, *ids)


def test_view_is_pefts_stacked_forward(two_rounds: Student, tmp_path: Path) -> None:
    """Reference: PEFT with both saved checkpoints loaded and active at once."""
    wrapped = peft_model(two_rounds.base, saved(two_rounds, tmp_path))
    wrapped.base_model.set_adapter(["round0", "round1"])
    torch.testing.assert_close(view_logits(two_rounds, *IDS), logits_of(wrapped, *IDS), atol=1e-5, rtol=0)
    wrapped.base_model.set_adapter(["round0"])
    off = (view_logits(two_rounds, *IDS) - logits_of(wrapped, *IDS)).abs().max()
    assert off > 0.1, f"the second adapter moves logits by {off} only, so this test would not miss it"


def test_view_is_pefts_concatenation(two_rounds: Student, tmp_path: Path) -> None:
    """Reference: PEFT's add_weighted_adapter(combination_type='cat')."""
    wrapped = peft_model(two_rounds.base, saved(two_rounds, tmp_path))
    wrapped.add_weighted_adapter(["round0", "round1"], [1.0, 1.0], "both", combination_type="cat")
    wrapped.set_adapter("both")
    torch.testing.assert_close(view_logits(two_rounds, *IDS), logits_of(wrapped, *IDS), atol=1e-5, rtol=0)


def test_view_is_pefts_merge(two_rounds: Student, tmp_path: Path) -> None:
    """Reference: PEFT's merge_and_unload, logits and weights."""
    wrapped = peft_model(two_rounds.base, saved(two_rounds, tmp_path))
    merged = wrapped.merge_and_unload(adapter_names=["round0", "round1"])
    with two_rounds.view() as model:
        torch.testing.assert_close(logits_of(model, *IDS), logits_of(merged, *IDS), atol=1e-5, rtol=0)
        for name, weight in merged.state_dict().items():
            torch.testing.assert_close(
                model.state_dict()[name], weight, atol=1e-6, rtol=1e-5, msg=lambda m: f"{name}: {m}"
            )


def test_delta_is_pefts_delta_weight(two_rounds: Student, tmp_path: Path) -> None:
    """Reference: PEFT's get_delta_weight of each module."""
    wrapped = peft_model(two_rounds.base, saved(two_rounds, tmp_path))
    for k, learned in enumerate(two_rounds.history):
        assert len(learned.modules()) == 4 * 7, f"{len(learned.modules())} adapted modules, not 7 a block"
        for name in learned.modules():
            theirs = wrapped.base_model.model.get_submodule(name).get_delta_weight(f"round{k}")
            torch.testing.assert_close(
                learned.delta(name), theirs, atol=1e-6, rtol=1e-5, msg=lambda m: f"{name} of round {k}: {m}"
            )


def test_weights_are_restored_to_the_bit(two_rounds: Student) -> None:
    """Reference: a copy of the state dict taken before."""
    model, before = two_rounds.base.model, snapshot(two_rounds.base.model)
    for _ in range(3):
        with two_rounds.view() as seen:
            changed = [name for name, w in before.items() if not torch.equal(w, seen.state_dict()[name])]
            assert len(changed) == 4 * 7, f"{len(changed)} weights differ inside the view, not 7 a block"
    assert_untouched(model, before)


def test_weights_are_restored_when_an_exception_passes(two_rounds: Student) -> None:
    """Reference: a copy of the state dict taken before."""
    before = snapshot(two_rounds.base.model)
    with pytest.raises(KeyError, match="inside"), two_rounds.view():
        raise KeyError("inside")
    assert_untouched(two_rounds.base.model, before)


def test_weights_are_restored_when_a_delta_does_not_fit(two_rounds: Student) -> None:
    """Reference: the state dict before entering a view that breaks half-way, at a factor of another shape."""
    before = snapshot(two_rounds.base.model)
    broken = adapter(two_rounds.base, 4)
    broken.factors[f"{broken.modules()[-1]}.lora_B.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError), two_rounds.learn(broken).view():
        pass
    assert_untouched(two_rounds.base.model, before)


@pytest.mark.parametrize("c", [1.0, 0.5])
def test_bfloat16_is_summed_in_float32_and_rounded_once(bf16: Base, c: float) -> None:
    """Reference: the neighbours of the float32 sum; two roundings could go beyond them.

    float32 sums in another order differ in the last of 24 bits, which a few numbers near a bfloat16 show.
    """
    student = Student(bf16).learn(adapter(bf16, 1)).learn(adapter(bf16, 2)).gated(c)
    before = snapshot(bf16.model)
    with student.view() as model:
        for name in student.history[0].modules():
            exact = before[f"{name}.weight"].float() + c * sum(learned.delta(name) for learned in student.history)
            seen = model.get_submodule(name).weight
            assert seen.dtype == torch.bfloat16, f"{name} became {seen.dtype}"
            inner, outer = neighbours(exact)
            near = (seen.float() == inner) | (seen.float() == outer)
            assert near.float().mean() > 0.999, f"{name}: {near.float().mean():.2%} are neighbours of the sum"
    assert_untouched(bf16.model, before)


def test_conv1d_is_turned_the_right_way(gpt2: Base, tmp_path: Path) -> None:
    """Reference: PEFT's own forward on GPT-2, whose weights are [in, out]."""
    student = Student(gpt2).learn(adapter(gpt2, 1, size=0.5)).learn(adapter(gpt2, 2, size=0.5))
    before = snapshot(gpt2.model)
    square = "transformer.h.0.attn.c_proj"  # a wrong orientation shows nowhere but in its values
    assert square in student.history[0].modules(), "the square projection is not adapted"
    wrapped = peft_model(gpt2, saved(student, tmp_path))
    wrapped.base_model.set_adapter(["round0", "round1"])
    theirs = logits_of(wrapped, *IDS)
    assert (theirs - logits_of(gpt2.model, *IDS)).abs().max() > 0.1, "the adapters change nothing"
    torch.testing.assert_close(view_logits(student, *IDS), theirs, atol=1e-5, rtol=0)
    assert_untouched(gpt2.model, before)


def test_learning_adds_and_pristine_forgets(two_rounds: Student) -> None:
    """Reference: logits of the base; a student is a value, so learning leaves the old one as it was."""
    base = two_rounds.base
    plain = logits_of(base.model, *IDS)
    assert torch.equal(view_logits(two_rounds.pristine(), *IDS), plain), "a pristine student is not the base"
    before = view_logits(two_rounds, *IDS)
    longer = two_rounds.learn(adapter(base, 3))
    assert torch.equal(view_logits(two_rounds, *IDS), before), "learning changed the student that learned"
    moved = (view_logits(longer, *IDS) - before).abs().max()
    assert moved > 0.1, f"a third adapter moves logits by {moved} only"
    torch.testing.assert_close(view_logits(longer, *IDS), logits_of(by_hand(longer), *IDS), atol=1e-5, rtol=0)


def test_fingerprints_tell_students_apart(tiny: Base) -> None:
    """Reference: the same history has the same fingerprint; base, other adapters and another order have others."""
    one, two = adapter(tiny, 1), adapter(tiny, 2)
    base = Student(tiny)
    students = [base, base.learn(one), base.learn(two), base.learn(one).learn(two), base.learn(two).learn(one)]
    prints = [student.fingerprint for student in students]
    assert len(set(prints)) == len(prints), "different students share a fingerprint"
    assert base.learn(one).fingerprint == prints[1], "the same student has two fingerprints"
    assert base.learn(one).pristine().fingerprint == base.fingerprint, "a pristine student does not count as base"


def test_an_adapter_without_a_key_gives_no_fingerprint(tiny: Base) -> None:
    """Reference: an unpublished adapter has no key, so that all of them would share a place in the store."""
    made = adapter(tiny, 1)
    unpublished = Adapter(config=made.config, factors=made.factors, curve=(), summary={})
    with pytest.raises(TypeError, match="unpublished"):
        _ = Student(tiny).learn(unpublished).fingerprint


@pytest.mark.parametrize("c", [0.75, -0.5, 2])
def test_a_gate_scales_what_was_learned(two_rounds: Student, tmp_path: Path, c: float) -> None:
    """Reference: PEFT's add_weighted_adapter, whose weights are c."""
    wrapped = peft_model(two_rounds.base, saved(two_rounds, tmp_path))
    wrapped.add_weighted_adapter(["round0", "round1"], [c, c], "both", combination_type="cat")
    wrapped.set_adapter("both")
    before = snapshot(two_rounds.base.model)
    torch.testing.assert_close(view_logits(two_rounds.gated(c), *IDS), logits_of(wrapped, *IDS), atol=2e-5, rtol=0)
    assert_untouched(two_rounds.base.model, before)


def bits(model: Any) -> dict[str, Tensor]:
    """Every weight of a float32 model as integers, which tell 0.0 from -0.0."""
    return {name: tensor.clone().view(torch.int32) for name, tensor in model.state_dict().items()}


def test_the_ends_of_the_gate_are_base_and_student_to_the_bit(two_rounds: Student) -> None:
    """Reference: the weights without a view, one of which is made -0.0, and those of the student without a gate."""
    model = two_rounds.base.model
    weight = model.get_submodule(two_rounds.history[0].modules()[0]).weight
    assert isinstance(weight, Tensor)
    kept = weight[0, 0].clone()
    weight.data[0, 0] = -0.0  # by another view of it, which torch does not count as a change: all tests share the model
    try:
        base = bits(model)
        with two_rounds.view() as seen:
            learned = bits(seen)
        for c, expected in ((0, base), (-0.0, base), (1, learned)):
            with two_rounds.gated(c).view() as seen:
                found = bits(seen)
            off = [name for name in expected if not torch.equal(expected[name], found[name])]
            assert not off, f"c={c} differs in {off[:3]}"
    finally:
        weight.data[0, 0] = kept


def test_a_gate_is_part_of_a_fingerprint_where_it_does_something(two_rounds: Student) -> None:
    """Reference: the fingerprint of the same student without a gate, and a spelling of each number."""
    plain, pristine = two_rounds.fingerprint, two_rounds.pristine()
    assert two_rounds.gated(1).fingerprint == plain
    assert two_rounds.gated(0.5).gated(1.0).fingerprint == plain, "gates multiply"
    assert pristine.gated(0.5).fingerprint == pristine.fingerprint, "there is nothing to scale"
    assert len({two_rounds.gated(c).fingerprint for c in (0, 0.5, 1, 2, -1)}) == 5
    assert two_rounds.gated(2).fingerprint == two_rounds.gated(2.0).fingerprint
    assert two_rounds.gated(0.0).fingerprint == two_rounds.gated(-0.0).fingerprint
    assert two_rounds.gated(0.5).pristine() == pristine


@pytest.mark.parametrize("c", [math.nan, math.inf, -math.inf])
def test_a_gate_is_finite(two_rounds: Student, c: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        two_rounds.gated(c)


def test_a_gated_student_cannot_learn(two_rounds: Student) -> None:
    with pytest.raises(ValueError, match=r"gate=0.5 cannot learn"):
        two_rounds.gated(0.5).learn(adapter(two_rounds.base, 3))
