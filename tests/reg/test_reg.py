"""Regularisers: the hinge by hand, and weight decay against torch.optim.AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_heal.reg import Barrier, Regulariser
from steer_heal.reg.kl_fwd import KlFwd
from steer_heal.reg.kl_rev import KlRev
from steer_heal.reg.nll import Nll
from steer_heal.reg.wd import Wd

BARRIERS = [
    pytest.param(lambda lam, tau: KlFwd(name="kl_fwd", lam=lam, tau=tau), id="kl_fwd"),
    pytest.param(lambda lam, tau: KlRev(name="kl_rev", lam=lam, tau=tau), id="kl_rev"),
]


@pytest.mark.parametrize("make", BARRIERS)
def test_hinge(make: Callable[[float, float], Barrier]) -> None:
    """Reference: lam * max(0, D - tau) and its slope, by hand, below, at and above tau."""
    d = torch.tensor([0.0, 0.15, 0.25, 0.75], requires_grad=True)  # tau = 0.25 is exact in binary
    reg = make(2.0, 0.25)
    paid = reg.penalty(d)
    assert paid.tolist() == [0.0, 0.0, 0.0, 1.0], f"the hinge gives {paid.tolist()}"
    (slope,) = torch.autograd.grad(paid.sum(), d)
    assert slope[[0, 1, 3]].tolist() == [0.0, 0.0, 2.0], f"the slopes of the hinge are {slope.tolist()}"
    assert 0 <= slope[2] <= 2, f"at tau the slope {slope[2]} is no subgradient"
    assert reg.over(d).tolist() == [False, False, False, True], "`over` disagrees with who pays"
    assert reg.has_barrier, "a barrier says it has none"


@pytest.mark.parametrize("make", BARRIERS)
def test_lam_of_zero_is_no_barrier(make: Callable[[float, float], Barrier]) -> None:
    """Reference: 0 * relu(x) = 0, with slope 0."""
    d = torch.tensor([0.0, 5.0], requires_grad=True)
    paid = make(0.0, 0.1).penalty(d)
    (slope,) = torch.autograd.grad(paid.sum(), d)
    assert paid.tolist() == [0.0, 0.0], f"lam = 0 still costs {paid.tolist()}"
    assert slope.tolist() == [0.0, 0.0], f"lam = 0 still pushes by {slope.tolist()}"


@pytest.mark.parametrize("reg", [Nll(name="nll"), Wd(name="wd", lam=0.3, decay="round")], ids=lambda reg: str(reg.name))
def test_nll_and_wd_have_no_barrier(reg: Regulariser) -> None:
    """Reference: the loss is nll alone, whatever the divergence."""
    d = torch.tensor([0.0, 100.0])
    assert not reg.has_barrier, f"{reg.name} asks for a divergence"
    assert reg.penalty(d).tolist() == [0.0, 0.0], f"{reg.name} adds {reg.penalty(d).tolist()} to the loss"
    assert reg.over(d).tolist() == [False, False], f"{reg.name} counts sequences over a barrier it does not have"


@pytest.mark.parametrize("make", [*BARRIERS, pytest.param(lambda lam, tau: Nll(name="nll"), id="nll")])
def test_only_wd_shrinks(make: Callable[[float, float], Regulariser]) -> None:
    """Reference: without decay every weight keeps its size."""
    assert make(1.0, 0.1).decay_factor(1e-3, 1e-2) == 1.0, "weights shrink without weight decay"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rates=st.lists(st.floats(1e-7, 10.0), min_size=1, max_size=40), lam=st.floats(0, 20))
def test_round_decay_shrinks_by_exp_minus_lam_over_any_schedule(rates: Sequence[float], lam: float) -> None:
    """Reference: the product over a round is exp(-lam), whatever the schedule and its length."""
    reg = Wd(name="wd", lam=lam, decay="round")
    left = math.prod(reg.decay_factor(rate, sum(rates)) for rate in rates)
    assert math.isclose(left, math.exp(-lam), rel_tol=1e-9), f"{left} is left of the weights, not {math.exp(-lam)}"


def test_round_decay_follows_the_schedule() -> None:
    """Reference: twice the learning rate, twice the log-shrink; none where the rate is 0."""
    reg = Wd(name="wd", lam=0.6, decay="round")
    one, two = (math.log(reg.decay_factor(rate, 3.0)) for rate in (1.0, 2.0))
    assert math.isclose(two, 2 * one), f"log-shrinks {one} and {two} do not follow the learning rate"
    assert reg.decay_factor(0.0, 3.0) == 1.0, "a step of rate 0 shrinks"


@pytest.mark.parametrize("lam", [0.0, 0.1, 30.0])
def test_step_decay_is_adamw(lam: float) -> None:
    """Reference: torch.optim.AdamW's own weight_decay, step by step, against a shrink before a step without decay."""
    reg = Wd(name="wd", lam=lam, decay="step")
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)) for _ in range(2))
    plain = torch.optim.AdamW([ours], lr=1.0, weight_decay=0.0)
    decayed = torch.optim.AdamW([theirs], lr=1.0, weight_decay=lam)
    rates = [0.01, 0.02, 0.015, 0.001]
    for step, rate in enumerate(rates):
        with torch.no_grad():
            ours.mul_(reg.decay_factor(rate, sum(rates)))
        for parameter, optimiser in ((ours, plain), (theirs, decayed)):
            optimiser.param_groups[0]["lr"] = rate
            parameter.grad = torch.tensor([0.3, -0.1, 2.0], dtype=torch.float64) * (step + 1)
            optimiser.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0, msg=lambda m: f"step {step}: {m}")
