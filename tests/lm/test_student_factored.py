"""The factored path of a view, for weights that cannot be summed, against the dense view and PEFT's own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.toys import (
    adapter,
    assert_alike,
    assert_untouched,
    healed,
    hooks_of,
    logits_of,
    lora,
    regulariser,
    snapshot,
)
from test_student import IDS, peft_model, saved, view_logits
from test_student import bf16 as bf16
from test_student import gpt2 as gpt2
from test_student import two_rounds as two_rounds
from torch import nn

from steer_heal.artifacts import Adapter
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.lora import live_adapter

Force = Callable[..., None]


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Force:
    """A function that has all modules take the factored path, or those for which `which` holds."""

    def forced(which: Callable[[nn.Module], bool] = lambda _: True) -> None:
        monkeypatch.setattr("steer_heal.lm.student.summable", lambda module: not which(module))

    return forced


@pytest.mark.parametrize("c", [1.0, 0.4, -0.5])
def test_factored_is_dense(two_rounds: Student, force: Force, c: float) -> None:
    """Reference: the dense view of the same student; also where only some modules are factored."""
    student, before = two_rounds.gated(c), snapshot(two_rounds.base.model)
    dense = view_logits(student, *IDS)
    assert (dense - logits_of(student.base.model, *IDS)).abs().max() > 0.1, "the adapters change nothing"
    for which in (lambda _: True, lambda module: module.out_features == module.in_features):
        force(which)
        torch.testing.assert_close(view_logits(student, *IDS), dense, atol=1e-5, rtol=0)
    assert_untouched(student.base.model, before)


def test_factored_is_pefts_stacked_forward_and_its_concatenation(
    two_rounds: Student, force: Force, tmp_path: Path
) -> None:
    """Reference: PEFT with both checkpoints active at once, and add_weighted_adapter(combination_type='cat')."""
    wrapped = peft_model(two_rounds.base, saved(two_rounds, tmp_path))
    wrapped.add_weighted_adapter(["round0", "round1"], [1.0, 1.0], "both", combination_type="cat")
    force()
    for active in (["round0", "round1"], ["both"]):
        wrapped.base_model.set_adapter(active)
        torch.testing.assert_close(view_logits(two_rounds, *IDS), logits_of(wrapped, *IDS), atol=1e-5, rtol=0)


def test_a_transposed_layer_is_factored_the_same_way(gpt2: Base, force: Force) -> None:
    """Reference: the dense view of GPT-2, whose weights are [in, out]."""
    student = Student(gpt2).learn(adapter(gpt2, 1, size=0.5))
    dense = view_logits(student, *IDS)
    force()
    torch.testing.assert_close(view_logits(student, *IDS), dense, atol=1e-5, rtol=0)


def test_bfloat16_stays_bfloat16(bf16: Base, force: Force) -> None:
    """Reference: the dense view, up to the rounding of one sum of weights instead of two of outputs."""
    student = Student(bf16).learn(adapter(bf16, 1)).learn(adapter(bf16, 2))
    dense, plain = view_logits(student, *IDS), logits_of(bf16.model, *IDS)
    force()
    factored = view_logits(student, *IDS)
    assert factored.dtype == torch.bfloat16
    off = float((factored - dense).float().norm() / (dense - plain).float().norm())
    assert off < 0.05, f"off by {off} of what the adapters do"


def test_no_weight_changes_and_no_hook_stays(two_rounds: Student, force: Force) -> None:
    """Reference: weights and hooks before; also when an exception passes, or a factor that does not fit."""
    model, before, hooks = two_rounds.base.model, snapshot(two_rounds.base.model), hooks_of(two_rounds.base.model)
    force()
    with pytest.raises(KeyError, match="inside"), two_rounds.view():
        assert_untouched(model, before)
        assert sum(hooks_of(model).values()) == sum(hooks.values()) + 4 * 7, "not one hook a linear layer"
        raise KeyError("inside")
    broken = adapter(two_rounds.base, 4)
    broken.factors[f"{broken.modules()[-1]}.lora_B.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError), two_rounds.learn(broken).view():
        pass
    with two_rounds.gated(0).view():
        assert hooks_of(model) == hooks, "nothing is to be added"
    assert hooks_of(model) == hooks
    assert_untouched(model, before)


def test_gradients_pass_beneath_a_live_adapter(two_rounds: Student, force: Force) -> None:
    """Reference: gradients of the live adapter and of the input embeddings over the dense view."""

    def gradients() -> list[torch.Tensor]:
        with two_rounds.view() as model, live_adapter(lora(), model, seed=5) as wrapped:
            parameters = [p for p in wrapped.parameters() if p.requires_grad]
            embedded = model.get_input_embeddings()(torch.tensor([IDS])).requires_grad_()
            logits = wrapped(inputs_embeds=embedded).logits
            return list(torch.autograd.grad(logits.logsumexp(-1).sum(), [*parameters, embedded]))

    dense, before = gradients(), hooks_of(two_rounds.base.model)  # transformers may have left some to record with
    force()
    assert float(dense[-1].norm()) > 0
    for one, other in zip(gradients(), dense, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * float(other.abs().max() + 1), rtol=0)
    assert hooks_of(two_rounds.base.model) == before


def test_a_heal_over_factors_is_the_heal_over_the_sum(two_rounds: Student, force: Force) -> None:
    """Reference: the same heal on the dense view."""

    def round_three() -> Adapter:
        return healed(two_rounds, regulariser("kl_rev"))

    dense = round_three()
    force()
    factored = round_three()
    assert_alike(dense, factored, "dense and factored")
    assert factored.summary["fold_error"] < 1e-4
