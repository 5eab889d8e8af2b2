"""Texts run as a tree of tokens, against each text run alone by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from helpers.families import ODD, PLAIN, SIZE, WINDOWED, WRAPPED, built, family, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from steer_heal.lm.base import body
from steer_heal.lm.batch import Pair, collate, states
from steer_heal.lm.hooks import Add
from steer_heal.lm.tree import MOST, completion_states, grow, states_of_each

CPU = torch.device("cpu")
SYSTEM, ASKED = ids(6, 1000), ids(4, 2)
PAIRS = [
    Pair(SYSTEM + ASKED, ids(9, 3)),
    Pair(SYSTEM + ASKED, ids(4, 4)),
    Pair(SYSTEM + ids(1, 5), ids(5, 6)),
    Pair(ids(3, 7), ids(7, 8)),
    Pair(SYSTEM + ASKED, ids(9, 3)[:5] + ids(6, 9)),
    Pair(SYSTEM + ASKED, ids(9, 3)),  # the first again
    Pair(SYSTEM + ASKED + ids(9, 3)[:2], ids(3, 10)),  # a prompt that ends within another's answer
    Pair(SYSTEM[:1], SYSTEM[1:4]),  # no token of its own
]
NARROW = {"mistral", "gemma2", "gemma3", "qwen2"}  # their windows are shorter than the texts
TREES = sorted({*PLAIN, "narrow_values", "mask_a_head", "mistral3", "qwen2_vl"} - NARROW)
OTHERS = sorted({*PLAIN, *ODD, *WRAPPED} - set(TREES))


def each(model: PreTrainedModel, pairs: Sequence[Pair], size: int = 16) -> list[Tensor]:
    return states_of_each(model, pairs, pad_id=0, size=size, what="test")


def alone(model: PreTrainedModel, pairs: Sequence[Pair]) -> list[Tensor]:
    with torch.no_grad():
        return [states(model, collate([pair], 0, CPU)) for pair in pairs]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], what: str = "") -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        size = float(other.abs().max())
        torch.testing.assert_close(one, other, atol=2e-5 * size, rtol=1e-4, msg=lambda m: f"{what} text {i}: {m}")


@contextmanager
def passes(model: PreTrainedModel) -> Iterator[list[tuple[int, ...]]]:
    """The shape of the ids in every pass of the body."""
    seen: list[tuple[int, ...]] = []
    hook = body(model).register_forward_pre_hook(
        lambda _module, _args, how: seen.append(tuple(how["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    hook.remove()


def shapes(name: str) -> list[tuple[int, ...]]:
    """What a family runs for PAIRS once it is known whether it runs trees; its states are those of each text alone."""
    model = family(name)
    assert_same(each(model, PAIRS), alone(model, PAIRS), name)
    with passes(model) as seen:
        each(model, PAIRS)
    return seen


@pytest.mark.parametrize("name", TREES)
def test_families_that_run_trees(name: str) -> None:
    seen = shapes(name)
    distinct = {(p.prompt + p.completion)[:i] for p in PAIRS for i in range(1, len(p))}
    assert seen == [(1, len(distinct))], f"{name} ran {seen}; there are {len(distinct)} different beginnings"


@pytest.mark.parametrize("name", OTHERS)
def test_families_that_do_not(name: str) -> None:
    """They see no tree, or one token is not enough to know its past: windows, selected keys, recurrent states."""
    seen = shapes(name)
    assert all(b > 1 or s < 20 for b, s in seen), f"{name} ran a tree: {seen}"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_eager_attention(name: str) -> None:
    """The mask alone decides there."""
    model = family(name, "eager")
    with passes(model) as seen:
        assert_same(each(model, PAIRS), alone(model, PAIRS), name)
    assert seen[-1][0] > 0, seen
    assert any(b == 1 and s > 30 for b, s in seen), f"{name} ran no tree: {seen}"


@pytest.mark.parametrize("kind", ["MistralConfig", "Gemma2Config", "Gemma3TextConfig", "Qwen2Config"])
def test_a_window_that_holds_the_tree(kind: str) -> None:
    """A tree has at most as many tokens as a window, so nothing in it is out of sight; longer texts run as a batch."""
    size = {**SIZE, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 4}
    kinds = {} if kind == "MistralConfig" else {**WINDOWED, "use_sliding_window": True}
    model = built(kind, **{**size, **kinds, "sliding_window": 24})
    with passes(model) as seen:
        found = each(model, PAIRS)
    assert_same(found, alone(model, PAIRS), kind)
    assert {b for b, _ in seen} == {1}, f"{kind} ran {seen}"
    assert 10 < max(s for _, s in seen) <= 24, f"a tree is larger than the window: {seen}"
    long = [Pair(ids(30, i), ids(5, i)) for i in range(3)]
    assert_same(each(model, long), alone(model, long), f"{kind}, long")


def test_bfloat16() -> None:
    """Reference: each text alone in float32; its own distance from that in bfloat16 is the yardstick."""
    model = built(PLAIN["llama"][0], **PLAIN["llama"][1])
    exact = torch.cat(alone(model, PAIRS))
    model = model.to(torch.bfloat16)  # type: ignore[arg-type]
    found, plain = torch.cat(each(model, PAIRS)), torch.cat(alone(model, PAIRS))
    assert found.dtype == torch.bfloat16
    off, usual = (float((one.float() - exact).norm()) for one in (found, plain))
    assert off < 1.5 * usual, f"{off:.3f} from float32, where each text alone is {usual:.3f} from it"


def test_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation acts on the states of a tree as on those of a batch."""
    model = family("llama")
    push = Add(torch.tensor(0.7).reshape(1, 1, 1), torch.linspace(-1, 1, 16), None, torch.float32)
    hook = model.model.layers[0].register_forward_hook(lambda _m, _i, out: push(out))
    try:
        assert_same(each(model, PAIRS), alone(model, PAIRS))
    finally:
        hook.remove()


def test_nothing_stays_registered() -> None:
    from transformers import AttentionInterface

    before = dict(AttentionInterface._global_mapping)
    each(family("llama"), PAIRS)
    assert AttentionInterface._global_mapping == before


def test_groups_are_no_larger_than_asked_for() -> None:
    model = family("llama")
    for size in (1, 3):
        found = list(completion_states(model, PAIRS, pad_id=0, size=size, advance=lambda _: None))
        assert max(len(group) for group, _ in found) == size
        assert sorted(i for group, _ in found for i in group) == list(range(len(PAIRS)))
        for group, hidden in found:
            assert len(hidden) == sum(len(PAIRS[i].completion) for i in group)


def test_a_tree_has_a_largest_size() -> None:
    """Its mask grows with the square of its tokens. A text longer than that runs alone, without a mask."""
    model = built("LlamaConfig", **{**SIZE, "max_position_embeddings": 10_000, "num_hidden_layers": 1})
    pairs = [Pair(ids(1000, i), ids(5, i)) for i in range(5)] + [Pair(ids(MOST + 50, 9), ids(5, 9))]
    with passes(model) as seen:
        assert_same(each(model, pairs), alone(model, pairs))
    assert sorted(s for _, s in seen if s > 20)[-1] == MOST + 55
    assert max(s for _, s in seen if s <= MOST) > 1990


def test_no_texts() -> None:
    assert each(family("llama"), []) == []


texts = st.lists(st.integers(3, 6), min_size=1, max_size=7).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(Pair, texts, texts), min_size=1, max_size=9))
def test_any_texts(pairs: list[Pair]) -> None:
    """Reference: each alone. Few different ids, so that texts share beginnings of every kind."""
    model = family("llama")
    assert_same(each(model, pairs), alone(model, pairs))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(Pair, texts, texts), min_size=1, max_size=9))
def test_a_tree_by_its_definition(pairs: list[Pair]) -> None:
    """Reference: the set of all beginnings; a token sees those that are beginnings of its own."""
    pairs = sorted(pairs, key=lambda pair: pair.prompt + pair.completion[:-1])
    tree = grow(pairs, torch.float32, CPU)
    of: dict[int, tuple[int, ...]] = {}
    for place in tree.positions[0].argsort().tolist():
        seen = [i for i, value in enumerate(tree.mask[0, 0, place].tolist()) if value == 0]
        before = [of[i] for i in seen if i != place]
        of[place] = (*max(before, key=len, default=()), int(tree.ids[0, place]))
        assert {of[i] for i in seen} == {of[place][: k + 1] for k in range(len(of[place]))}, "sees others' tokens"
        assert tree.positions[0, place] == len(of[place]) - 1
    wanted = {(p.prompt + p.completion)[:k] for p in pairs for k in range(1, len(p))}
    assert sorted(of.values()) == sorted(wanted), "a beginning is missing, or stands there twice"
    expected = [(p.prompt + p.completion)[: len(p.prompt) + k] for p in pairs for k in range(len(p.completion))]
    assert [of[i] for i in tree.where.tolist()] == expected, "states are read at the wrong tokens"
