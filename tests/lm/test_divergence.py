"""Divergences per position against torch.distributions, and their aggregation against plain definitions."""

from __future__ import annotations

import typing

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from steer_heal.lm.divergence import Aggregator, aggregate, kl_fwd, kl_rev

AGGREGATORS: tuple[Aggregator, ...] = typing.get_args(Aggregator)
quick = settings(max_examples=40, deadline=None, derandomize=True)
shapes = {"n": st.integers(1, 7), "v": st.integers(2, 30), "seed": st.integers(0, 10**6)}


def drawn(n: int, v: int, seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    student, reference = (scale * torch.randn(n, v, generator=rng, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), reference


def trusted(direction: str, student: Tensor, reference: Tensor) -> Tensor:
    q, p = Categorical(logits=student), Categorical(logits=reference)
    return kl_divergence(p, q) if direction == "fwd" else kl_divergence(q, p)


@pytest.mark.parametrize("direction", ["fwd", "rev"])
@quick
@given(**shapes)
def test_values_and_gradients(direction: str, n: int, v: int, seed: int) -> None:
    """Reference: torch.distributions.kl_divergence, in float64."""
    student, reference = drawn(n, v, seed)
    ours = {"fwd": kl_fwd, "rev": kl_rev}[direction](student, reference)
    theirs = trusted(direction, student, reference)
    assert ours.shape == (n,), f"one value a position was expected, not {tuple(ours.shape)}"
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=lambda m: f"kl_{direction}: {m}")
    weights = torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    got, expected = (torch.autograd.grad((weights * d).sum(), student)[0] for d in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11, msg=lambda m: f"gradient of kl_{direction}: {m}")


@pytest.mark.parametrize("direction", ["fwd", "rev"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logits_cost_nothing(direction: str, dtype: torch.dtype) -> None:
    """Reference: KL(p || p) = 0, its minimum, whatever constant is added to the logits."""
    logits = drawn(5, 400, 0)[0].detach().to(dtype)
    kl = {"fwd": kl_fwd, "rev": kl_rev}[direction]
    student = logits.clone().requires_grad_()
    same = kl(student, logits)
    assert same.abs().max() == 0, f"kl_{direction} of a distribution with itself is {same.abs().max()}"
    (slope,) = torch.autograd.grad(same.sum(), student)
    assert slope.abs().max() < 1e-6, f"kl_{direction} has slope {slope.abs().max()} at its minimum"
    shifted = kl(logits + 3.0, logits)
    assert shifted.abs().max() < 1e-5, f"kl_{direction} sees a constant added to the logits: {shifted.abs().max()}"


def test_the_directions_are_not_swapped() -> None:
    """Reference: forward KL is costly where the student drops a choice, reverse KL where it invents one."""
    broad, narrow = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -20.0]])
    dropped, kept_one = float(kl_fwd(narrow, broad)), float(kl_rev(narrow, broad))
    assert dropped > 5, f"a student that drops a choice pays only {dropped:.2f} nats of KL(reference || student)"
    assert kept_one < 0.7, f"a student that settles on one of the choices pays {kept_one:.2f} of KL(student || ref)"
    invented = float(kl_rev(broad, narrow))
    assert invented > 5, f"a student that invents a choice pays only {invented:.2f} nats of KL(student || reference)"


def plain(how: str, part: list[float]) -> float:
    return {
        "mean": sum(part) / len(part),
        "rmse": (sum(x * x for x in part) / len(part)) ** 0.5,
        "p95": float(numpy.percentile(part, 95)),
        "max": max(part),
    }[how]


@pytest.mark.parametrize("how", AGGREGATORS)
@quick
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_aggregate(how: Aggregator, lengths: list[int], seed: int) -> None:
    """Reference: the definitions in plain Python, and numpy.percentile."""
    values = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    listed, start, expected = values.tolist(), 0, []
    for length in lengths:
        expected.append(plain(how, listed[start : start + length]))
        start += length
    got = aggregate(values, lengths, how)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), msg=lambda m: f"{how}: {m}")


@pytest.mark.parametrize("how", AGGREGATORS)
def test_aggregate_of_one_position_is_that_position(how: Aggregator) -> None:
    """Reference: any average or order statistic of one number is the number."""
    values = torch.tensor([0.3, 0.0, 7.0])
    assert torch.allclose(aggregate(values, [1, 1, 1], how), values), f"{how} changes a single position"


@pytest.mark.parametrize("how", AGGREGATORS)
@pytest.mark.parametrize("lengths", [[1], [1, 5], [4, 2]])
def test_gradient_at_zero_divergence_is_finite(how: Aggregator, lengths: list[int]) -> None:
    """Reference: the student starts as its reference, so a NaN here would end every heal at its first step."""
    student, _ = drawn(sum(lengths), 9, 3)
    for kl in (kl_fwd, kl_rev):
        for values in (kl(student, student.detach()), 0.0 * student.sum(-1)):
            (slope,) = torch.autograd.grad(aggregate(values, lengths, how).sum(), student)
            assert slope.isfinite().all(), f"{how} of zeros has gradient {slope}"


@pytest.mark.parametrize("how", AGGREGATORS)
def test_gradient_of_aggregate(how: Aggregator) -> None:
    """Reference: finite differences, torch.autograd.gradcheck."""
    values = torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: aggregate(x, [1, 5, 3], how), (values,)), f"{how}: wrong gradient"
