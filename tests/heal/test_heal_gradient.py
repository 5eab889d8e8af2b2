"""The gradient of a heal's steps against an obvious implementation: PEFT, one sequence at a time, full logits."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence
from typing import Any

import peft
import pytest
import torch
from helpers.toys import by_hand, healed, lora, preset, regulariser, rows, runtime
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import PreTrainedModel

from steer_heal.artifacts import Adapter
from steer_heal.lm.base import Base
from steer_heal.lm.divergence import Aggregator
from steer_heal.lm.student import Student

MADE = rows(6, seed=2)
SIZE = lora(2)
LAM = 1.5


class Recorder(torch.optim.AdamW):
    """AdamW that notes the parameters and the gradients that each step was given."""

    steps: typing.ClassVar[list[tuple[list[Tensor], list[Tensor]]]] = []

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.steps.append(([p.detach().clone() for p in parameters], [p.grad.clone() for p in parameters]))
        return super().step(closure)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Tensor], list[Tensor]]]:
    monkeypatch.setattr(Recorder, "steps", [])
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    return Recorder.steps


def aggregated(values: Tensor, how: str) -> Tensor:
    return {
        "mean": lambda: values.mean(),
        "rmse": lambda: (values.square().mean() + 1e-30).sqrt(),
        "p95": lambda: values.quantile(0.95),
        "max": lambda: values.max(),
    }[how]()


def divergences(model: Any, reference: Any, kind: str, how: str) -> tuple[Tensor, Tensor]:
    """nll [b] and divergence [b] of every sequence of MADE."""
    nll, d = [], []
    for row in MADE.rows:
        ids, start = torch.tensor([row.prompt_ids + row.ids]), len(row.prompt_ids) - 1
        logits = model(input_ids=ids).logits[0, start:-1]
        with torch.no_grad():
            fixed = reference(input_ids=ids).logits[0, start:-1]
        q, p = Categorical(logits=logits), Categorical(logits=fixed)
        nll.append(-q.log_prob(torch.tensor(row.ids)).mean())
        d.append(aggregated(kl_divergence(p, q) if kind == "kl_fwd" else kl_divergence(q, p), how))
    return torch.stack(nll), torch.stack(d)


def obvious(
    student: Student, parameters: Sequence[Tensor], reference: PreTrainedModel, kind: str, how: str, tau: float
) -> tuple[float, float, list[Tensor], float]:
    """Loss, gradient norm, clipped gradient, and norm of the barrier's gradient over that of nll's."""
    wrapped = peft.get_peft_model(by_hand(student), SIZE.peft_config())
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    for parameter, value in zip(trainable, parameters, strict=True):
        parameter.data = value.clone()
    nll, d = divergences(wrapped, reference, kind, how)
    barrier = (LAM * (d - tau).clamp(min=0)).mean() if kind.startswith("kl") else 0 * d.mean()
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(part, trainable, retain_graph=True)]).norm()
        for part in (barrier, nll.mean())
    ]
    loss = nll.mean() + barrier
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    gradients = [typing.cast(Tensor, p.grad) for p in trainable]
    return float(loss.detach()), float(norm), gradients, float(norms[0] / norms[1])


def sizes(tensors: Iterable[Tensor]) -> list[float]:
    return sorted(float(tensor.detach().norm()) for tensor in tensors)


def compare(
    found: Adapter, steps: list[Any], student: Student, reference: PreTrainedModel, kind: str, how: str, tau: float
) -> None:
    assert len(steps) == len(found.curve) == 3, f"{len(steps)} steps"
    for k, (parameters, gradients) in enumerate(steps):
        row = found.curve[k]
        loss, norm, expected, ratio = obvious(student, parameters, reference, kind, how, tau)
        assert row["loss"] == pytest.approx(loss, rel=1e-4), f"step {k}: loss {row['loss']}, obviously {loss}"
        assert row["gnorm"] == pytest.approx(norm, rel=1e-3), f"step {k}: gnorm {row['gnorm']}, obviously {norm}"
        if "grad_ratio" in row:
            assert row["grad_ratio"] == pytest.approx(ratio, rel=1e-2, abs=1e-4), f"step {k}: grad_ratio"
        size = max(g.abs().max().item() for g in expected)
        for i, (ours, theirs) in enumerate(zip(gradients, expected, strict=True)):
            torch.testing.assert_close(
                ours, theirs, atol=2e-4 * size, rtol=2e-3, msg=lambda m: f"step {k}, parameter {i}: {m}"
            )


@pytest.mark.parametrize("how", typing.get_args(Aggregator))
@pytest.mark.parametrize("kind", ["kl_fwd", "kl_rev"])
def test_steps_in_a_second_round(kind: str, how: Aggregator, second_round: Student, steps: list[Any]) -> None:
    """Reference: PEFT and autograd in float32; half of the sequences are over tau, in micro-batches of two and one."""
    base = second_round.base.model
    with torch.no_grad():
        tau = float(divergences(by_hand(second_round), base, kind, how)[1].median()) * 1.001
    found = healed(
        second_round, regulariser(kind, LAM, tau), made=MADE, size=SIZE, how=runtime(micro_batch=2, head_chunk=5),
        agg=how, batch_size=6, steps=3, measure_every=2, lr=1e-3,
    )  # fmt: skip
    assert found.curve[0]["barrier_on"] == pytest.approx(0.5), "this test needs sequences on both sides of tau"
    assert "kl_fwd" not in found.curve[1], "this test needs a step without measurement"
    assert found.curve[0]["grad_ratio"] > 0.01, "the barrier has no part in the gradient"
    compare(found, steps, second_round, base, kind, how, tau)


@pytest.mark.parametrize("kind", ["kl_fwd", "kl_rev", "nll"])
def test_steps_against_the_student_before(kind: str, second_round: Student, steps: list[Any]) -> None:
    """Reference: PEFT and autograd in float32, with the copy of the student before this round as reference."""
    found = healed(
        second_round, regulariser(kind, LAM, 0.0), made=MADE, size=SIZE, how=runtime(micro_batch=4),
        reference=second_round, batch_size=6, steps=3, measure_every=2,
    )  # fmt: skip
    if kind != "nll":
        assert found.curve[2]["kl"] > 1e-4, "this test needs a student that has moved"
    compare(found, steps, second_round, by_hand(second_round), kind, "mean", 0.0)


def test_the_optimiser_is_adamw_without_decay_at_the_schedules_rate(tiny: Base, steps: list[Any]) -> None:
    """Reference: torch.optim.AdamW fed with the same gradients; weights before each step are those after the last."""
    found = healed(Student(tiny), regulariser("nll"), made=MADE, batch_size=3, steps=4)
    parameters = [torch.nn.Parameter(p.clone()) for p in steps[0][0]]
    optimiser = torch.optim.Adam(parameters, lr=1.0)  # AdamW without decay is Adam
    for k, (before, gradients) in enumerate(steps):
        for i, (ours, theirs) in enumerate(zip(before, parameters, strict=True)):
            torch.testing.assert_close(ours, theirs.detach(), msg=lambda m: f"before step {k}, parameter {i}: {m}")
        optimiser.param_groups[0]["lr"] = found.curve[k]["lr"]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
    learned = sorted(float(f.norm()) for f in found.factors.values())
    assert learned == pytest.approx(sorted(float(p.detach().norm()) for p in parameters)), (
        "the adapter is not the last step's"
    )


def test_weight_decay_shrinks_before_each_step(tiny: Base, steps: list[Any]) -> None:
    """Reference: torch.optim.AdamW's own weight_decay with decay=step, fed with the same gradients."""
    decay = preset("reg=wd", "lam=30", "decay=step").reg
    start = healed(Student(tiny), decay, made=MADE, batch_size=3, steps=4, seed=5)
    rates = [row["lr"] for row in start.curve]
    before = [p / (1 - rates[0] * 30) for p in steps[0][0]]
    parameters = [torch.nn.Parameter(p.clone()) for p in before]
    optimiser = Recorder.__mro__[1](parameters, lr=1.0, weight_decay=30.0)  # type: ignore[call-arg]
    for rate, (_, gradients) in zip(rates, steps, strict=True):
        optimiser.param_groups[0]["lr"] = rate  # type: ignore[attr-defined]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()  # type: ignore[attr-defined]
    learned = sorted(float(f.norm()) for f in start.factors.values())
    assert learned == pytest.approx(sorted(float(p.detach().norm()) for p in parameters), rel=1e-4), (
        "not AdamW's trajectory"
    )
    left = torch.tensor([1 - rate * 30 for rate in rates]).prod()
    assert start.summary["shrink"] == pytest.approx(1 - float(left), rel=1e-5), "the total shrink is misreported"
