"""Attention over short sequences against transformers' own, written out (eager) and torch's fused kernel (sdpa)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.families import ODD, PLAIN, WRAPPED, alike, built, family
from torch import Tensor, nn
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from steer_heal.lm import attention
from steer_heal.lm.attention import SHORT, attend, short_sequences
from steer_heal.lm.base import blocks_of
from steer_heal.lm.batch import states

LEFT_ALONE = {"gemma2", "own_sdpa", "no_cache", "mamba"}  # no sdpa, or one of their own
WIDTH = 12  # tokens of the text; the windows are shorter


def module(h: int, g: int, **fields: Any) -> nn.Module:
    """The attributes of an attention layer that the functions read."""
    made = nn.Module().eval()
    vars(made).update(num_key_value_groups=h // g, is_causal=True, **fields)
    return made


def drawn(
    b: int, h: int, g: int, s: int, t: int, d: int, wide: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, laid out as projections leave them: [b, s, h, d], transposed."""
    rng = torch.Generator().manual_seed(s * 100 + t)
    shapes = (b, s, h, d), (b, t, g, d), (b, t, g, wide)
    q, k, v = ((1.5 * torch.randn(shape, generator=rng)).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes)
    return q, k, v


def causal(s: int, t: int, window: int = 10**6) -> Tensor:
    """Mask [s, t] of the keys that each query attends to, with the queries last among the t: written out."""
    return torch.tensor([[j <= i + t - s and j > i + t - s - window for j in range(t)] for i in range(s)])


def masks(kind: str, b: int, s: int, t: int) -> tuple[Tensor | None, Tensor]:
    """A mask as `attend` is given it, and the same as numbers to be added."""
    seen = causal(s, t)[None, None]
    if kind == "window":
        seen = causal(s, t, 4)[None, None]
    elif kind == "own":  # another for each sequence; all look at themselves
        rng = torch.Generator().manual_seed(1)
        seen = (torch.rand(b, 1, s, t, generator=rng) < 0.6) & seen | torch.eye(t)[None, None, t - s :].bool()
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    if kind == "numbers":
        rng = torch.Generator().manual_seed(2)
        added = added + torch.randn(b, 1, s, t, generator=rng, dtype=torch.float64)
        return added, added
    return (None if kind == "none" else seen), added


CASES = {  # heads, key heads, queries, keys, width, width of values, mask, scaling
    "mha": (4, 4, 7, 7, 6, 6, "none", None),
    "gqa": (4, 2, 7, 7, 6, 6, "none", None),
    "mqa": (4, 1, 7, 7, 6, 6, "none", None),
    "scaled": (4, 2, 7, 7, 6, 6, "none", 0.7),
    "window": (4, 2, 9, 9, 6, 6, "window", None),
    "mask of each sequence": (6, 2, 8, 8, 6, 6, "own", 0.3),
    "numbers": (4, 2, 8, 8, 6, 6, "numbers", None),
    "after a prefix": (4, 2, 3, 10, 6, 6, "causal", None),
    "after a prefix, window": (4, 1, 3, 10, 6, 6, "window", 0.5),
    "one query": (4, 2, 1, 9, 6, 6, "none", None),
    "one token": (4, 4, 1, 1, 6, 6, "none", None),
    "narrow values": (4, 2, 6, 6, 6, 3, "own", None),
    "as long as may be": (2, 1, SHORT, SHORT, 4, 4, "none", None),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: transformers' eager and sdpa attention in float64; neither of them is called by ours."""
    h, g, s, t, d, wide, kind, scaling = CASES[name]
    layer, (mask, added) = module(h, g), masks(kind, 3, s, t)
    inputs = drawn(3, h, g, s, t, d, wide)
    given = d**-0.5 if scaling is None else scaling
    trusted = {
        "eager": eager_attention_forward(layer, *inputs, added, scaling=given, dropout=0.0)[0],
        "sdpa": sdpa_attention.sdpa_attention_forward(layer, *inputs, mask, scaling=scaling)[0],
    }
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", lambda *_, **__: pytest.fail("the fused kernel ran"))
    ours, weights = attend(layer, *inputs, mask, dropout=0.0, scaling=scaling, sliding_window=4)
    assert weights is None, "attention weights were promised to nobody"
    assert ours.shape == (3, s, h, wide), f"{name}: {tuple(ours.shape)} instead of [b, s, h, d]"
    assert ours.is_contiguous(), f"{name}: families that view what they get would fail"
    over = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    slopes = torch.autograd.grad((over * ours).sum(), inputs)
    for who, theirs in trusted.items():
        atol = 1e-11 if who == "sdpa" else 5e-5  # eager takes its softmax in float32
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0, msg=lambda m: f"{name}, {who}: {m}")
        expected = torch.autograd.grad((over * theirs).sum(), inputs)
        for what, one, other in zip("qkv", slopes, expected, strict=True):
            torch.testing.assert_close(one, other, atol=atol, rtol=0, msg=lambda m: f"{name}, {who}, d{what}: {m}")


@torch.no_grad()
def test_bfloat16_is_as_exact_as_eager() -> None:
    """Reference: float64; the error of transformers' eager attention in bfloat16 is the yardstick."""
    inputs = drawn(3, 4, 2, 40, 40, 16, 16, torch.bfloat16)
    exact = [x.detach().double() for x in inputs]
    _, added = masks("none", 3, 40, 40)
    layer = module(4, 2)
    truth = eager_attention_forward(layer, *exact, added, scaling=0.25)[0]
    narrow = torch.zeros(added.shape, dtype=torch.bfloat16).masked_fill(added < 0, torch.finfo(torch.bfloat16).min)
    eager = eager_attention_forward(layer, *inputs, narrow, scaling=0.25)[0]
    ours = attend(layer, *inputs, None, scaling=0.25)[0]
    assert ours.dtype == torch.bfloat16, f"bfloat16 became {ours.dtype}"
    off, yardstick = (float((found.double() - truth).norm() / truth.norm()) for found in (ours, eager))
    assert off < 1.2 * yardstick, f"relative error {off:.2e}, transformers' eager attention has {yardstick:.2e}"


@pytest.mark.parametrize(
    ("fields", "shape", "mask", "how"),
    [
        pytest.param({}, (SHORT + 1, SHORT + 1), None, {}, id="long"),
        pytest.param({}, (5, 5), None, {"is_causal": False}, id="all see all"),
        pytest.param({"is_causal": False}, (5, 5), None, {}, id="all see all in this layer"),
        pytest.param({"is_causal": False}, (5, 5), None, {"is_causal": None}, id="all see all, nothing asked"),
        pytest.param({}, (3, 9), None, {}, id="a cache that is still to be filled"),
        pytest.param({}, (5, 5), "a head", {}, id="a mask a head"),
        pytest.param({}, (5, 5), None, {"position_bias": "a head"}, id="position bias"),
    ],
)
def test_what_is_left_to_the_fused_kernel(fields: Any, shape: tuple[int, int], mask: Any, how: Any) -> None:
    """Reference: transformers' sdpa attention, to the bit; ours knows nothing of what is asked for here."""
    layer, inputs = module(4, 2), drawn(2, 4, 2, *shape, 6, 6)
    vars(layer).update(fields)
    a_head = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mask = a_head if mask == "a head" else mask
    how = {k: a_head if v == "a head" else v for k, v in how.items()}
    ours = attend(layer, *inputs, mask, **how)[0]
    theirs = sdpa_attention.sdpa_attention_forward(layer, *inputs, mask, **how)[0]
    assert torch.equal(ours, theirs), f"off by {float((ours - theirs).abs().max())}"


def test_soft_capping_is_refused_and_dropout_drops() -> None:
    """Reference: transformers' sdpa attention refuses the one and does the other."""
    layer, inputs = module(4, 2), drawn(2, 4, 2, 5, 5, 6, 6)
    with pytest.raises(ValueError, match="softcap"):
        attend(layer, *inputs, None, softcap=2.0)
    whole = attend(layer, *inputs, None)[0]
    assert attend(layer, *inputs, None, dropout=1.0)[0].abs().max() < whole.abs().max() / 1e6, "dropout was ignored"


@pytest.mark.parametrize("name", [*PLAIN, *ODD, *WRAPPED])
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the same model outside; one that has no sdpa, or its own, is left alone to the bit."""
    model, batch, calls = family(name), alike(WIDTH), list[int]()
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def noting(*args: Any, **how: Any) -> Any:
        calls.append(1)
        return attend(*args, **how)

    monkeypatch.setattr(attention, "attend", noting)
    with torch.no_grad():
        plain = states(model, batch)
        with short_sequences(model):
            found = states(model, batch)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own, f"{name}: another sdpa was left"
    if name in LEFT_ALONE:
        assert not calls, f"{name}: attends by ours"
        assert torch.equal(found, plain), f"{name}: other states"
    else:
        attending = 1 if name == "hybrid" else len(blocks_of(model))
        assert len(calls) == attending, f"{name}: {len(calls)} layers attend by ours, not {attending}"
        size = float(plain.abs().max())
        torch.testing.assert_close(found, plain, atol=1e-5 * size, rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen2"])
def test_windows_matter_here(name: str) -> None:
    """Reference: the same weights without a window: had the tests above none to respect, they would show nothing."""
    kind, fields = PLAIN[name]
    wide = built(kind, **{**fields, "sliding_window": 300})
    with torch.no_grad():
        far = (states(wide, alike(WIDTH)) - states(family(name), alike(WIDTH))).abs().max()
    assert far > 1e-2, f"{name}: the window changes the states by {far} only"


def test_soft_capped_attention_has_no_fused_kernel() -> None:
    """Reference: transformers gives Gemma2 eager attention, and refuses sdpa; were that to change, see `_plain`."""
    assert family("gemma2").config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        built(*PLAIN["gemma2"][:1], "sdpa", **PLAIN["gemma2"][1])


def sdpa() -> Any:
    """What attends in models with sdpa."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_its_own_implementation_comes_back() -> None:
    """Reference: the registry before, also after an exception, and also when already inside."""
    own = sdpa()
    with pytest.raises(RuntimeError, match="on purpose"), short_sequences(family("llama")):
        assert sdpa() is attend, "this test needs a model that attends by ours"
        raise RuntimeError("on purpose")
    assert sdpa() is own, f"after an exception: {sdpa()}"
    with short_sequences(family("llama")):
        with short_sequences(family("llama")):
            assert sdpa() is attend, "the inner one took it away"
        assert sdpa() is attend, "the outer one lost it"
    assert sdpa() is own, f"after two: {sdpa()}"


def test_eager_models_and_other_devices_are_left_alone() -> None:
    """Reference: the registry before."""
    own = sdpa()
    with short_sequences(family("llama", "eager")):
        assert sdpa() is own, "an eager model changed"
    elsewhere = SimpleNamespace(config=family("llama").config, device=torch.device("cuda"))
    with short_sequences(elsewhere):  # type: ignore[arg-type]
        assert sdpa() is own, "a model that is not on the CPU changed"
