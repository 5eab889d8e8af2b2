"""A batch's shared prefix, run once, against every sequence run in full: states and gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.families import ODD, PLAIN, SIZE, WINDOW, WRAPPED, alike, built, family, ids
from helpers.toys import lora
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from steer_heal.lm.attention import short_sequences
from steer_heal.lm.batch import MIN_PREFIX, Batch, Pair, collate, shared_length, shared_states, states
from steer_heal.lora import live_adapter

SHARING = [*PLAIN, *WRAPPED, "narrow_values", "viewing", "mask_a_head", "own_sdpa"]
CPU = torch.device("cpu")


@contextmanager
def passes(model: PreTrainedModel) -> Iterator[list[tuple[int, ...]]]:
    """The shape of the ids in every pass of the body."""
    seen: list[tuple[int, ...]] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _module, _args, how: seen.append(tuple(how["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    hook.remove()


def both(model: PreTrainedModel, batch: Batch) -> list[tuple[Tensor, list[Tensor]]]:
    """States and the gradient in a live adapter, both of whose factors are random; plainly, then shared."""
    found = []
    with live_adapter(lora(2), model, 3) as wrapped:
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        for i, p in enumerate(parameters):
            p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        for how in (states, shared_states):
            hidden = how(model, batch)
            weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(99))
            found.append((hidden.detach(), list(torch.autograd.grad((weights * hidden).sum(), parameters))))
    return found


def assert_same(model: PreTrainedModel, batch: Batch, what: str) -> None:
    (plain, expected), (shared, slopes) = both(model, batch)
    size = float(plain.abs().max())
    torch.testing.assert_close(shared, plain, atol=1e-5 * size, rtol=1e-4, msg=lambda m: f"{what}, states: {m}")
    largest = max(float(slope.abs().max()) for slope in expected)
    assert largest > 1e-2, f"{what}: this test needs a gradient"
    for i, (one, other) in enumerate(zip(slopes, expected, strict=True)):
        torch.testing.assert_close(
            one, other, atol=1e-5 * largest, rtol=1e-4, msg=lambda m: f"{what}, gradient of factor {i}: {m}"
        )


@pytest.mark.parametrize("prefix", [0, 1, MIN_PREFIX - 1, MIN_PREFIX, WINDOW, 13, 60])
@pytest.mark.parametrize("name", SHARING)
def test_prefixes(name: str, prefix: int) -> None:
    """Reference: `states`, of every sequence whole; a prefix that is worth it really runs once, one row of it."""
    model, batch = family(name), alike(prefix)
    assert batch.prefix == prefix, f"the prompts share {prefix} tokens, not {batch.prefix}"
    with passes(model) as seen, torch.no_grad():
        shared_states(model, batch)
    b, s = batch.ids.shape
    whole = [(b, s)] if prefix < MIN_PREFIX else [(1, prefix), (b, s - prefix - 1)]
    assert seen == whole, f"{name}: ids of {seen} went through the body, not {whole}"
    assert_same(model, batch, f"{name}, {prefix} shared tokens")


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "qwen2", "gpt2"])
def test_prefixes_where_attention_is_ours(name: str) -> None:
    """Reference: `states` under the model's own attention; a heal runs both shortcuts at once."""
    model, batch = family(name), alike(13)
    (plain, expected), _ = both(model, batch)
    with short_sequences(model):
        _, (shared, slopes) = both(model, batch)
    torch.testing.assert_close(shared, plain, atol=1e-4, rtol=1e-4, msg=lambda m: f"{name}, states: {m}")
    largest = max(float(slope.abs().max()) for slope in expected)
    for one, other in zip(slopes, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * largest, rtol=1e-3, msg=lambda m: f"{name}, gradient: {m}")


def batch_of(prompts: Sequence[tuple[int, ...]], completions: Sequence[int]) -> Batch:
    return collate([Pair(p, ids(n, i)) for i, (p, n) in enumerate(zip(prompts, completions, strict=True))], 0, CPU)


SAME = ids(9, 3)
BATCHES = {
    "identical prompts": batch_of([SAME, SAME, SAME], [3, 7, 1]),
    "identical prompts and completions": collate([Pair(SAME, (5, 6))] * 3, 0, CPU),
    "one sequence": batch_of([SAME], [4]),
    "one sequence of one completion token": batch_of([SAME], [1]),
    "completions of one token": batch_of([SAME, (*SAME, 4), (*SAME[:8], 30)], [1, 1, 1]),
    "a prompt that another begins with": batch_of([SAME, (*SAME, 4, 5, 6), SAME[:6]], [2, 3, 8]),
    "the shortest prompt and the longest completion": batch_of([SAME[:5], (*SAME, 4, 5, 6, 8, 9)], [12, 1]),
}


@pytest.mark.parametrize("what", BATCHES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_batches(name: str, what: str) -> None:
    """Reference: `states`, of every sequence whole."""
    assert BATCHES[what].prefix >= MIN_PREFIX, "this test needs a prefix that is run apart"
    assert_same(family(name), BATCHES[what], f"{name}, {what}")


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(begin=st.lists(st.integers(0, 2), max_size=6).map(tuple), ends=prompts)
@example(begin=(), ends=[(1,)])
@example(begin=(1, 2), ends=[(0,), (0, 0)])
@example(begin=(), ends=[(2, 1), (2, 1, 0), (2, 1, 1)])
def test_the_prefix_is_the_longest_that_all_share(begin: tuple[int, ...], ends: list[tuple[int, ...]]) -> None:
    """Reference: every length tried; each prompt keeps its last token, whose state predicts a target."""
    made = [begin + end for end in ends]
    fits = [k for k in range(20) if len({p[:k] for p in made}) == 1 and all(k < len(p) for p in made)]
    found = shared_length(made)
    assert found == max(fits), f"prefix of {made}: {found}, not {max(fits)}"


@pytest.mark.parametrize("name", ["no_cache", "mamba", "hybrid", "keys_and_states"])
def test_families_that_keep_no_keys_take_the_plain_way(name: str) -> None:
    """Reference: `states`, to the bit: what such a model keeps would be wrong, or there is nothing."""
    model, batch = family(name), alike(9)
    with torch.no_grad(), passes(model) as seen:
        plain, shared = states(model, batch), shared_states(model, batch)
    assert torch.equal(plain, shared), f"{name}: off by {float((plain - shared).abs().max())}"
    assert seen[-1] == tuple(batch.ids.shape), f"{name}: the last pass was of {seen[-1]}, not of whole sequences"


def test_checkpointed_blocks_take_the_plain_way() -> None:
    """Reference: `states` of the same model, one pass; under checkpointing blocks keep nothing of a prefix."""
    model, batch = copy.deepcopy(family("llama")), alike(9)
    model.gradient_checkpointing_enable()
    model.train()  # no dropout, but checkpointing acts only here
    with passes(model) as seen:
        shared = shared_states(model, batch)
    assert seen == [tuple(batch.ids.shape)], f"ids of {seen} went through the body"
    torch.testing.assert_close(shared, states(family("llama"), batch), atol=1e-5, rtol=1e-5)


LONG = {"short_factor": [1.0, 1.0], "long_factor": [3.0, 4.0], "original_max_position_embeddings": 32}
STRETCHED: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {"rope_type": "longrope", "factor": 4.0, **LONG},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize(("kind", "prefix", "apart"), [
    ("dynamic", 10, True), ("dynamic", 28, False),
    ("longrope", 10, True), ("longrope", 28, False),
    ("yarn", 10, True), ("yarn", 28, True),
])  # fmt: skip
def test_angles_that_depend_on_the_length(kind: str, prefix: int, apart: bool) -> None:
    """Reference: `states`; beyond 32 tokens two kinds of RoPE turn the keys of the prefix by other angles as well."""
    fields = {**SIZE, "max_position_embeddings": 32 if kind == "dynamic" else 128}
    model = built("LlamaConfig", **fields, rope_parameters={"rope_theta": 100.0, **STRETCHED[kind]})
    batch = alike(prefix)
    with torch.no_grad(), passes(model) as seen:
        shared = shared_states(model, batch)
        plain = states(model, batch)
    assert (len(seen) == 3) == apart, f"{kind}: passes of {seen}"
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-4, msg=lambda m: f"{kind}, {prefix} tokens: {m}")


def test_every_family_has_its_place() -> None:
    """Reference: the list of families; one that is added is to be shared or to be known not to be."""
    assert {*SHARING, "no_cache", "mamba", "hybrid", "keys_and_states", "selected_keys"} == {*PLAIN, *ODD, *WRAPPED}
