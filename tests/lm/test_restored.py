"""Whatever fails between a change of the shared model and its undoing, the model is as it was, and that is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from helpers.families import GROUPED, SIZE, V, built, family
from helpers.toys import (
    adapter,
    assert_alike,
    assert_untouched,
    healed,
    hooks_of,
    logits_of,
    lora,
    preset,
    regulariser,
    rows,
    snapshot,
)  # fmt: skip
from torch import nn
from transformers import PreTrainedModel

from steer_heal.artifacts import Adapter, SteeringVector
from steer_heal.lm import fused_lora
from steer_heal.lm.base import Base, body, restored, seal
from steer_heal.lm.hooks import steered
from steer_heal.lm.student import Student
from steer_heal.lora import config_record, factors, live_adapter
from steer_heal.model import load


class Broken(RuntimeError):
    """What a test makes fail, as memory running out does."""


def failing(*_: Any, **__: Any) -> None:
    raise Broken


def after(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that works some times, and then fails."""
    done: list[int] = []

    def call(*args: Any, **named: Any) -> Any:
        done.append(1)
        if len(done) > calls:
            raise Broken
        return real(*args, **named)

    return call


@pytest.fixture
def base() -> Base:
    """A base of its own, which a test may damage."""
    load.cache_clear()
    return load(preset().model)


def half_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.lora.Linear, "__init__", after(5, peft.tuners.lora.Linear.__init__))


def half_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_lora, "partial", after(5, fused_lora.partial))


@pytest.mark.parametrize("what", [half_wrapped, half_fused])
def test_an_adapter_that_fails_half_way_is_gone(
    base: Base, monkeypatch: pytest.MonkeyPatch, what: Callable[[pytest.MonkeyPatch], None]
) -> None:
    before, sealed = snapshot(base.model), seal(base.model)
    with monkeypatch.context() as patch:
        what(patch)
        with pytest.raises(Broken), live_adapter(lora(), base.model, 0):
            pass
    assert_untouched(base.model, before)
    assert seal(base.model) == sealed
    base.check_pristine()


def test_a_failed_heal_changes_no_later_one(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the same heal where nothing failed before it."""
    size = lora(targets=("q_proj", "o_proj"))
    expected = healed(Student(base), regulariser("nll"), size=size)
    with monkeypatch.context() as patch:
        half_wrapped(patch)
        with pytest.raises(Broken):
            healed(Student(base), regulariser("nll"))
    found = healed(Student(base), regulariser("nll"), size=size)
    assert found.modules() == expected.modules()
    assert_alike(found, expected, "after a failure")


def test_a_view_that_fails_half_way_is_gone(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    student, before = Student(base).learn(adapter(base, 1)), snapshot(base.model)
    with monkeypatch.context() as patch:
        patch.setattr(Student, "_folded", after(5, Student._folded))
        with pytest.raises(Broken), student.view():
            pass
    assert_untouched(base.model, before)
    base.check_pristine()


def test_steering_that_fails_half_way_is_gone(base: Base) -> None:
    """The second of its blocks is one that the model lacks."""
    vector = SteeringVector((1, 99), torch.ones(2, 32), (1.0, 1.0))
    with pytest.raises(IndexError), steered(base, vector, 1.0):
        pass
    assert not hooks_of(base.model), "a hook stayed"


def test_restored_gives_back_modules_weights_hooks_and_attributes(base: Base) -> None:
    before, sealed, plain = snapshot(base.model), seal(base.model), logits_of(base.model, 1, 2, 3)
    with pytest.raises(Broken), restored(base.model):
        block: Any = base.blocks[1]
        block.mlp = nn.Identity()
        block.self_attn.q_proj.weight = nn.Parameter(torch.zeros(32, 32))
        block.forward = failing
        block.register_forward_hook(failing)
        base.model.marked = True  # type: ignore[assignment]
        failing()
    assert_untouched(base.model, before)
    assert seal(base.model) == sealed
    assert not hasattr(base.model, "marked")
    assert torch.equal(logits_of(base.model, 1, 2, 3), plain)


def test_a_hook_of_somebody_else_can_still_be_removed(base: Base) -> None:
    """Its handle holds the very mapping that hooks are in."""
    handle = base.blocks[0].register_forward_hook(lambda *_: None)
    with restored(base.model):
        pass
    assert hooks_of(base.model) == {"model.layers.0": 1}
    handle.remove()
    assert not hooks_of(base.model)


def written(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").add_(1e-3)


def replaced(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.1.mlp").up_proj = nn.Linear(32, 64, bias=False)


@pytest.mark.parametrize("change", [written, replaced])
def test_a_base_that_was_changed_is_noticed_and_loaded_again(
    base: Base, change: Callable[[PreTrainedModel], None]
) -> None:
    """A weight written to in a view is beyond what can be put back: no later result may stand on it."""
    plain = logits_of(base.model, 1, 2, 3)
    if change is written:
        with pytest.raises(RuntimeError, match=r"base model was changed.*layers\.1\.mlp\.up_proj"):  # noqa: SIM117
            with Student(base).view() as model:
                change(model)
    else:
        change(base.model)
        with pytest.raises(RuntimeError, match=r"base model was changed.*layers\.1"):
            healed(Student(base), regulariser("nll"))
    assert torch.equal(logits_of(base.model, 1, 2, 3), plain), "the changed model is still in use"
    healed(Student(base), regulariser("nll"))


# Families whose layers are odd

ZAMBA = {
    **GROUPED, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 4,
    "n_mamba_heads": 4, "mamba_ngroups": 1,
}  # fmt: skip
BAMBA = {
    **GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4,
    "mamba_n_groups": 1, "mamba_expand": 2,
}  # fmt: skip
LLAMA4 = {**GROUPED, "head_dim": 4, "intermediate_size_mlp": 24, "num_local_experts": 4}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "layers that share one weight": ("Zamba2Config", ZAMBA),
    "blocks that return a tuple": ("BambaConfig", BAMBA),
    "a router that returns a tuple": ("Llama4TextConfig", LLAMA4),
}


def odd(what: str) -> Base:
    kind, fields = ODD[what]
    model = built(kind, **fields)
    return Base(what, lambda: (model, load(preset().model).tokenizer))


@pytest.mark.parametrize("what", ODD)
def test_what_is_learned_is_pefts_forward_and_leaves_no_trace(what: str) -> None:
    """Reference: the states under the live adapter by PEFT's own forward, with the same factors."""
    base = odd(what)
    ids, before = torch.randint(5, V, (2, 9)), snapshot(base.model)
    plain = body(base.model)(input_ids=ids, use_cache=False).last_hidden_state
    with live_adapter(lora(2), base.model, 0) as live, torch.no_grad():
        for i, p in enumerate(p for p in live.parameters() if p.requires_grad):
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        made, record = factors(live), config_record(live)
    theirs = peft.get_peft_model(copy.deepcopy(base.model), peft.LoraConfig(**_settings(record)))
    with torch.no_grad():
        missing = theirs.load_state_dict(
            {f"base_model.model.{k.replace('.weight', '.default.weight')}": v for k, v in made.items()}, strict=False
        )
        assert not missing.unexpected_keys
        expected = body(theirs.base_model.model)(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[union-attr,arg-type]
        student = Student(base).learn(Adapter(record, made, (), {}, key="made-up"))
        for _ in range(3):
            with student.view() as model:
                found = body(model)(input_ids=ids, use_cache=False).last_hidden_state
            assert_untouched(base.model, before)
        again = body(base.model)(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(again, plain), "base drifts with every view"
    assert not torch.allclose(found, plain, atol=1e-3), "the adapter changes nothing"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("r", "lora_alpha", "target_modules", "task_type")}


@pytest.mark.parametrize("what", ODD)
def test_blocks_below_the_first_adapted_one_are_skipped(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the heal with all of the blocks at work."""
    student, reg, size, made = Student(odd(what)), regulariser("nll"), lora(2, first=0.5), rows(6, vocab=V)
    skipped = healed(student, reg, size=size, made=made, held=made)
    with monkeypatch.context() as patch:
        patch.setattr("steer_heal.heal.freeze", lambda *_: None)
        assert_alike(skipped, healed(student, reg, size=size, made=made, held=made), what)
    least = len(student.base.blocks) // 2
    assert all(int(name.split("layers.")[1].split(".")[0]) >= least for name in skipped.modules())


def test_a_layer_at_two_places_gets_no_adapter() -> None:
    """An adapter would stand at one of them in training, and what it learned at both afterwards."""
    model = copy.deepcopy(family("llama"))
    first, second = model.model.layers
    second.mlp.up_proj = first.mlp.up_proj
    with live_adapter(lora(2), model, 0) as live:
        names = {name.rpartition(".lora_A")[0] for name in factors(live)}
    assert not any(name.endswith("mlp.up_proj") for name in names)
    assert any(name.endswith("mlp.down_proj") for name in names)
    assert SIZE["num_hidden_layers"] == 2
