"""`positions` over random sizes, heads and regularisers against float64 autograd on the full logits."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any, Literal, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chunked_nll import NO_IDS, full_logits
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, PhiConfig

from steer_heal.heal.chunked_nll import positions
from steer_heal.lm.divergence import Aggregator, aggregate, kl_fwd, kl_fwd_value_and_grad, kl_rev, kl_rev_value_and_grad
from steer_heal.reg import Barrier, Regulariser
from steer_heal.reg.kl_fwd import KlFwd
from steer_heal.reg.kl_rev import KlRev
from steer_heal.reg.nll import Nll
from steer_heal.reg.wd import Wd

LAM = 0.7


class Squared(Barrier):
    """A user's regulariser from scratch: mean squared difference of log-probabilities, under the reference."""

    name: Literal["squared"] = "squared"

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        log_q, log_p = student.log_softmax(-1), reference.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q).square()).sum(-1)


class Tempered(KlFwd):
    """A user's regulariser that changes the divergence of one with a closed-form gradient."""

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        return 0.5 * kl_fwd(student / 2, reference / 2) + 0.25 * kl_rev(student, reference)


class Beside:
    """A divergence by itself, to be mixed in."""

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        return 0.5 * (student.softmax(-1) - reference.softmax(-1)).square().sum(-1)


class Mixed(Beside, KlRev):
    """A user's regulariser whose divergence comes from a mixin beside the class with the closed form."""


class Closed(KlRev):
    """A user's regulariser that changes the divergence and defines its gradient."""

    asked: typing.ClassVar[int] = 0

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        return 3 * kl_fwd(student, reference)

    def value_and_grad(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        type(self).asked += 1
        return 3 * kl_fwd(log_q, log_p), 3 * (log_q.exp() - log_p.exp())


class After(Closed):
    """Changes the divergence of the one above again."""

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        return 2 * kl_rev(student, reference)


def trusted_kl(q: Tensor, p: Tensor, forward: bool) -> Tensor:
    student, reference = Categorical(logits=q), Categorical(logits=p)
    return kl_divergence(reference, student) if forward else kl_divergence(student, reference)


REGS: dict[str, tuple[Callable[[float], Regulariser], Callable[[Tensor, Tensor], Tensor] | None]] = {
    "kl_fwd": (lambda tau: KlFwd(name="kl_fwd", lam=LAM, tau=tau), lambda q, p: trusted_kl(q, p, True)),
    "kl_rev": (lambda tau: KlRev(name="kl_rev", lam=LAM, tau=tau), lambda q, p: trusted_kl(q, p, False)),
    "nll": (lambda tau: Nll(name="nll"), None),
    "wd": (lambda tau: Wd(name="wd", lam=LAM, decay="round"), None),
    "squared": (
        lambda tau: Squared(lam=LAM, tau=tau),
        lambda q, p: (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1)) ** 2).sum(-1),
    ),
    "tempered": (
        lambda tau: Tempered(name="kl_fwd", lam=LAM, tau=tau),
        lambda q, p: 0.5 * trusted_kl(q.log_softmax(-1) / 2, p / 2, True) + 0.25 * trusted_kl(q, p, False),
    ),
    "mixed": (
        lambda tau: Mixed(name="kl_rev", lam=LAM, tau=tau),
        lambda q, p: 0.5 * ((q.softmax(-1) - p.softmax(-1)) ** 2).sum(-1),
    ),
    "closed": (lambda tau: Closed(name="kl_rev", lam=LAM, tau=tau), lambda q, p: 3 * trusted_kl(q, p, True)),
    "after": (lambda tau: After(name="kl_rev", lam=LAM, tau=tau), lambda q, p: 2 * trusted_kl(q, p, False)),
}
BARRIERS = [name for name, (_, trusted) in REGS.items() if trusted is not None]
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "untied": (LlamaConfig, {"tie_word_embeddings": False}),
    "biased": (PhiConfig, {}),
    "capped": (Gemma2Config, {"head_dim": 2, "final_logit_softcapping": 3.0}),
    "divided": (GraniteConfig, {"logits_scaling": 4.0}),
    "multiplied": (CohereConfig, {"logit_scale": 0.3}),
}


@functools.lru_cache(maxsize=200)
def model_of(kind: str, d: int, v: int) -> Any:
    config, fields = HEADS[kind]
    size = {"hidden_size": d, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    model = AutoModelForCausalLM.from_config(config(**size, vocab_size=v, **fields, **NO_IDS))
    for i, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(v * 100 + d * 10 + i))
    return model.eval().requires_grad_(False)


def plain_aggregate(values: Tensor, lengths: list[int], how: str) -> Tensor:
    def one(x: Tensor) -> Tensor:
        if how == "p95":
            place, ordered = 0.95 * (len(x) - 1), x.sort().values
            low, part = int(place), place - int(place)
            return (1 - part) * ordered[low] + part * ordered[min(low + 1, len(x) - 1)]
        return {"mean": x.mean(), "rmse": (x.square().mean()).sqrt(), "max": x.max()}[how]

    return torch.stack([one(part) for part in values.split(lengths)])


@pytest.mark.parametrize("reg", REGS)
@pytest.mark.parametrize("kind", HEADS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    how=st.sampled_from(typing.get_args(Aggregator)), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    d=st.sampled_from([4, 8]), v=st.integers(2, 40), chunk=st.integers(1, 30), measure=st.booleans(),
    tau=st.sampled_from([0.0, 0.05, 0.5]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_values_and_gradients(
    kind: str, reg: str, how: Aggregator, lengths: list[int], d: int, v: int, chunk: int, measure: bool, tau: float,
    seed: int,
) -> None:  # fmt: skip
    """Reference: float64, torch.distributions or the formula written out, the loss of the design written out."""
    model, n, rng = model_of(kind, d, v), sum(lengths), torch.Generator().manual_seed(seed)
    hidden, other = torch.randn(n, d, generator=rng), torch.randn(n, d, generator=rng)
    reference, targets = hidden + 0.5 * other, torch.randint(0, v, (n,), generator=rng)
    make, trusted = REGS[reg]
    asked = Closed.asked

    exact = hidden.double().requires_grad_()
    q, p = full_logits(model, exact), full_logits(model, reference)
    nll_64 = -Categorical(logits=q).log_prob(targets)
    d_64 = nll_64.new_zeros(n) if trusted is None else trusted(q, p)
    over = plain_aggregate(d_64, lengths, how) - tau
    near_tau = trusted is not None and float(over.detach().abs().min()) < 1e-4  # the hinge has no one slope there
    loss_64 = (plain_aggregate(nll_64, lengths, "mean") + (0.0 if trusted is None else LAM) * over.relu()).mean()
    (slope_64,) = torch.autograd.grad(loss_64, exact)

    state, barrier = hidden.clone().requires_grad_(), make(tau)
    found = positions(model, state, reference, targets, barrier, chunk, measure)
    paid = barrier.penalty(aggregate(found.d, lengths, how))
    loss = (aggregate(found.nll, lengths, "mean") + paid).mean()
    (slope,) = torch.autograd.grad(loss, state)
    both = torch.stack([trusted_kl(q, p, True), trusted_kl(q, p, False)]) if measure else torch.zeros(2, n)
    for what, ours, theirs in (
        ("nll", found.nll, nll_64), ("d", found.d, d_64), ("both", found.both, both), ("loss", loss, loss_64)
    ):  # fmt: skip
        assert ours.dtype == torch.float32, f"{what} is {ours.dtype}"
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-5, rtol=1e-4, msg=lambda m: f"{what}: {m}")
    if not near_tau:
        size = float(slope_64.abs().max())
        torch.testing.assert_close(
            slope.double(), slope_64, atol=5e-5 * size + 1e-6, rtol=1e-3, msg=lambda m: f"gradient: {m}"
        )
    passes = -(-n // chunk)
    expected = asked + passes if reg == "closed" else asked
    assert Closed.asked == expected, f"{reg}: the closed form was asked {Closed.asked - asked} times in {passes} passes"


@pytest.mark.parametrize(("kind", "knows"), [
    (Squared, False), (Tempered, False), (Mixed, False), (After, False), (Closed, True), (KlFwd, True), (KlRev, True),
])  # fmt: skip
def test_who_keeps_a_closed_form(kind: type[Regulariser], knows: bool) -> None:
    """Reference: only a closed form written for this very divergence; subclasses that change nothing keep theirs."""
    heir = cast("type[Regulariser]", type("Heir", (kind,), {"__module__": __name__}))
    for one in (kind, heir):
        assert (one.value_and_grad is not Regulariser.value_and_grad) == knows, (
            f"{kind.__name__}: {one.value_and_grad.__qualname__}"
        )


def wide(v: int) -> Any:
    """A head whose logits are the first v entries of the states, so that tests say what logits are."""
    model = model_of("untied", 8, 8)
    return type("Wide", (), {
        "config": model.config, "get_output_embeddings": lambda self: (lambda states: states[..., :v])
    })()  # fmt: skip


@pytest.mark.parametrize("reg", REGS)
def test_extreme_logits(reg: str) -> None:
    """Reference: float64; logits of +-60, where probabilities underflow in float32 and differences are large."""
    v, rng, (make, trusted) = 9, torch.Generator().manual_seed(3), REGS[reg]
    student, reference = ((torch.randint(0, 3, (60, v), generator=rng) - 1) * 60.0 for _ in range(2))
    student[:2], reference[:2] = 60.0, -60.0  # flat, both
    student[2], reference[2] = torch.eye(v)[0] * 120 - 60, torch.eye(v)[1] * 120 - 60  # certain of different things
    targets, exact = torch.arange(60) % v, student.double().requires_grad_()
    nll_64 = -exact.log_softmax(-1)[torch.arange(60), targets]
    d_64 = 0 * nll_64 if trusted is None else trusted(exact, reference.double())
    weights = torch.linspace(0.5, 1.5, 60)
    (slope_64,) = torch.autograd.grad((weights * (nll_64 + d_64)).sum(), exact)
    state = student.clone().requires_grad_()
    nll, d, both = positions(wide(v), state, reference, targets, make(0.0), 7, measure=True)
    (slope,) = torch.autograd.grad((weights * (nll + d)).sum(), state)
    kls = torch.stack([trusted_kl(exact, reference.double(), forward) for forward in (True, False)])
    for what, ours, theirs in (
        ("nll", nll, nll_64),
        ("d", d, d_64),
        ("both", both, kls),
        ("gradient", slope, slope_64),
    ):
        assert ours.isfinite().all(), f"{reg}: {int((~ours.isfinite()).sum())} entries of {what} are not finite"
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-5, msg=lambda m: f"{reg}, {what}: {m}")


@pytest.mark.parametrize("how", typing.get_args(Aggregator))
@pytest.mark.parametrize("reg", BARRIERS)
def test_a_student_that_is_its_reference(reg: str, how: Aggregator) -> None:
    """Reference: 0 to the last bit, and a finite gradient, whatever the head; also for logits of +-60."""
    lengths = [1, 5, 2]
    cases = [(model_of(kind, 8, 40), torch.randn(8, 8, generator=torch.Generator().manual_seed(1))) for kind in HEADS]
    cases.append((wide(8), 60 * torch.randint(-1, 2, (8, 8), generator=torch.Generator().manual_seed(2)).float()))
    for model, hidden in cases:
        state = hidden.clone().requires_grad_()
        nll, d, both = positions(model, state, hidden, torch.arange(8), REGS[reg][0](0.0), 3, measure=True)
        assert float(d.detach().abs().max()) == 0, f"{reg}: divergence from itself is {d.tolist()}"
        assert float(both.abs().max()) == 0, f"measured divergence from itself is {both.tolist()}"
        (of_d,) = torch.autograd.grad(aggregate(d, lengths, how).sum(), state, retain_graph=True)
        assert of_d.abs().max() < 1e-3, f"{reg}, {how}: slope {float(of_d.abs().max())} at the minimum"
        (slope,) = torch.autograd.grad((nll.mean() + aggregate(d, lengths, how).sum()), state)
        assert slope.isfinite().all(), f"{reg}, {how}: {int((~slope.isfinite()).sum())} entries are not finite"


@pytest.mark.parametrize("forward", [True, False])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 6), v=st.integers(2, 50), scale=st.sampled_from([0.1, 2.0, 20.0]), seed=st.integers(0, 10**6))
def test_the_generic_slope_is_the_closed_form(forward: bool, n: int, v: int, scale: float, seed: int) -> None:
    """Reference: the closed forms of lm/divergence.py in float64; autograd's way does not change its arguments."""
    rng = torch.Generator().manual_seed(seed)
    log_q, log_p = ((scale * torch.randn(n, v, generator=rng).double()).log_softmax(-1) for _ in range(2))
    reg: Regulariser = REGS["kl_fwd" if forward else "kl_rev"][0](0.0)
    given_q, given_p = log_q.clone(), log_p.clone()
    generic = Regulariser.value_and_grad(reg, given_q, given_p)
    assert torch.equal(given_q, log_q), "the student's log-probabilities were changed"
    assert torch.equal(given_p, log_p), "the reference's log-probabilities were changed"
    closed = (kl_fwd_value_and_grad if forward else kl_rev_value_and_grad)(given_q, given_p)
    assert torch.equal(given_q, log_q), "a closed form changed the student's log-probabilities"
    for what, one, other in zip(("divergence", "gradient"), generic, closed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9, msg=lambda m: f"{what}: {m}")
        assert not one.requires_grad, f"{what} drags a graph along"


class Unnormalised(KlFwd):
    """Takes what it is given for log-probabilities."""

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        return (reference.exp() * (reference - student)).sum(-1)


def test_the_generic_slope_is_that_in_the_logits() -> None:
    """Reference: q - p, the gradient of KL(reference || student) in logits; in log-probabilities it would be -p."""
    rng = torch.Generator().manual_seed(0)
    log_q, log_p = (torch.randn(4, 9, generator=rng).double().log_softmax(-1) for _ in range(2))
    _, slope = Unnormalised(name="kl_fwd", lam=LAM, tau=0.0).value_and_grad(log_q, log_p)
    torch.testing.assert_close(slope, log_q.exp() - log_p.exp(), atol=1e-12, rtol=0)
