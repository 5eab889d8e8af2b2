"""Stochastic rounding to bfloat16, and the student's view that rests on it, against exact sums."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.compose import composed
from helpers.toys import adapter, assert_untouched, neighbours, snapshot
from torch import Tensor

from steer_heal.lm.base import Base
from steer_heal.lm.rounding import HALF, noise, round_to
from steer_heal.lm.student import Student
from steer_heal.model import load

N = 200_000


def values(seed: int, n: int = N) -> Tensor:
    """Numbers of both signs and many sizes."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=rng) * torch.rand(n, generator=rng).mul(12).sub(9).exp()


def rounded(exact: Tensor, name: str = "layer", seed: int = 0) -> Tensor:
    return round_to(exact.clone(), torch.bfloat16, name, seed).float()


def test_a_number_becomes_one_of_its_neighbours() -> None:
    """Reference: the neighbours by torch's own rounding and a step of one unit in the last place."""
    exact = values(1)
    inner, outer = neighbours(exact)
    found = rounded(exact)
    assert torch.equal(torch.minimum(inner.abs(), outer.abs()), inner.abs())
    off = (found != inner) & (found != outer)
    assert not off.any(), f"{int(off.sum())} numbers are no neighbour, first {exact[off][:3].tolist()}"
    assert 0.3 < float((found != inner).float().mean()) < 0.7, "one neighbour is hardly ever chosen"


def test_the_mean_is_exact() -> None:
    """Reference: the exact numbers; the standard error of the mean of 64 draws comes from the neighbours' distance."""
    exact = values(2, 4000)
    inner, outer = neighbours(exact)
    draws = torch.stack([rounded(exact, seed=seed) for seed in range(64)]).double()
    share = ((exact - inner) / (outer - inner)).nan_to_num(0).double()
    error = (share * (1 - share) / 64).sqrt() * (outer - inner).abs()
    z = ((draws.mean(0) - exact) / error)[error > 0]
    assert abs(float(z.mean())) < 4 / math.sqrt(len(z)), f"a bias of {float(z.mean()):.3f} standard errors"
    assert 0.9 < float(z.std()) < 1.1, f"a spread of {float(z.std()):.2f} standard errors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_dtype_holds_stays_as_it_is(dtype: torch.dtype) -> None:
    """Reference: the numbers themselves, to the bit: zeros of both signs, the smallest and infinities too."""
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40, -1e-45, 3.3895e38, -1.0])
    exact = torch.cat([odd, values(3)]).to(dtype)
    found = round_to(exact.float().clone(), dtype, "layer", 0)
    whole = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(found.view(whole), exact.view(whole))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x800000 + 1])
def test_what_is_no_number_stays_none(bits: int) -> None:
    """NaN as a CPU writes it, as a GPU does, and with the other payloads: a broken adapter must not become zeros."""
    odd = torch.full((1000,), bits, dtype=torch.int32).view(torch.float32)
    assert odd.isnan().all()
    assert rounded(odd).isnan().all()


def test_noise_is_uniform_and_independent() -> None:
    """Reference: the moments of a uniform number; lanes of one draw, names and seeds do not correlate."""
    drawn = {key: noise(N, *key).double() + HALF for key in (("a", 0), ("b", 0), ("a", 1))}
    for key, some in drawn.items():
        assert 0 <= some.min() < 4, f"{key}: from {some.min()}"
        assert 2**16 - 5 < some.max() < 2**16, f"{key}: to {some.max()}"
        for lane in (some, *(some[k::4] for k in range(4))):
            z = (lane.mean() - (2**16 - 1) / 2) / (2**16 / math.sqrt(12 * len(lane)))
            assert abs(float(z)) < 4, f"{key}: the mean is {float(z):.1f} standard errors off"
    a, b, c = drawn.values()
    for one, other in ((a, b), (a, c), (a[:-1], a[1:]), (a[:-4], a[4:])):
        r = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
        assert abs(r) < 4 / math.sqrt(len(one)), f"a correlation of {r:.4f}"
    assert torch.equal(noise(1000, "a", 0), noise(N, "a", 0)[:1000]), "a layer's noise depends on its size"


def test_rounding_follows_its_input_without_a_jump_back() -> None:
    """With the noise fixed a weight is a step function that never falls as what is added to it grows."""
    weight, delta = values(4, 4000), values(5, 4000).abs() * 1e-3
    path = torch.stack([rounded(weight + c * delta) for c in torch.linspace(0, 2, 60).tolist()])
    assert (path.diff(dim=0) >= 0).all()
    assert float((path[-1] > path[0]).float().mean()) > 0.1, "nothing moves, so this test would miss a jump"


# the view


@pytest.fixture(scope="module")
def bf16() -> Base:
    """The tiny model in bfloat16."""
    return load(composed("experiment=tiny", "model.dtype=bfloat16").model)


@pytest.mark.parametrize("gate", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [0.01, 0.1])
def test_a_view_applies_what_was_learned(bf16: Base, gate: float, size: float) -> None:
    """Projection of the applied on the learned change, against 1 with the standard error of the rounding's variance.

    The weakest changes here are a hundredth of the distance between neighbouring weights.
    """
    student = Student(bf16).learn(adapter(bf16, 1, size=size)).learn(adapter(bf16, 2, size=size)).gated(gate)
    before, found, nearest = snapshot(bf16.model), [], []
    with student.view() as model:
        for name in student.history[0].modules():
            weight = before[f"{name}.weight"].float()
            learned = gate * sum(one.delta(name) for one in student.history)
            assert isinstance(learned, Tensor)
            exact, seen = weight + learned, model.get_submodule(name).weight
            assert isinstance(seen, Tensor)
            inner, outer = neighbours(exact)
            share = ((exact - inner) / (outer - inner)).nan_to_num(0)
            variance = share * (1 - share) * (outer - inner).square()
            power = learned.square().sum()
            error = float((learned.square() * variance).sum().sqrt() / power)
            at = float(((seen.float() - weight) * learned).sum() / power)
            assert abs(at - 1) < 4 * error + 1e-3, f"{name}: {at:.3f} of what was learned, error {error:.4f}"
            found.append(at)
            nearest.append(float(((exact.bfloat16().float() - weight) * learned).sum() / power))
    mean = sum(found) / len(found)
    assert 0.98 < mean < 1.02, f"{mean:.3f} of what was learned, on average over layers"
    if size * gate <= 0.005:
        assert sum(nearest) / len(nearest) < 0.9, "rounding to nearest loses nothing here: the test is too easy"
    assert_untouched(bf16.model, before)


def test_the_noise_is_that_of_seed_and_name(bf16: Base) -> None:
    """The same weights for the same seed, others for another; float32 has none."""
    student = Student(bf16).learn(adapter(bf16, 1))
    name = student.history[0].modules()[0]

    def weight(one: Student) -> Tensor:
        with one.view() as model:
            seen = model.get_submodule(name).weight
            assert isinstance(seen, Tensor)
            return seen.clone()

    other = Student(bf16, student.history, seed=7)
    assert torch.equal(weight(student), weight(student))
    differ = float((weight(student) != weight(other)).float().mean())
    assert differ > 0.05, f"another seed rounds {differ:.1%} of the weights otherwise"
    assert other.fingerprint != student.fingerprint
    assert other.pristine().fingerprint == student.pristine().fingerprint, "nothing was learned, nothing is rounded"
    assert other.learn(adapter(bf16, 2)).seed == other.gated(0.5).seed == 7


def test_layers_that_share_a_weight_each_have_their_own_change(bf16: Base) -> None:
    """Reference: the sum of the shared weight and one layer's change; afterwards they share the very same weight."""
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    blocks = [bf16.model.get_submodule(name) for name in names]
    own = blocks[1].weight
    blocks[1].weight = blocks[0].weight
    try:
        before = snapshot(bf16.model)
        student = Student(bf16).learn(adapter(bf16, 1)).learn(adapter(bf16, 2))
        with student.view() as model:
            for name in names:
                delta = sum(one.delta(name) for one in student.history)
                assert isinstance(delta, Tensor)
                seen = model.get_submodule(name).weight
                assert isinstance(seen, Tensor)
                inner, outer = neighbours(before[f"{name}.weight"].float() + delta)
                near = (seen.float() == inner) | (seen.float() == outer)
                assert near.float().mean() > 0.999, f"{name} has another layer's change"
        assert blocks[0].weight is blocks[1].weight, "the layers do not share their weight any more"
        assert_untouched(bf16.model, before)
    finally:
        blocks[1].weight = own
