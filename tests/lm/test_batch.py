"""Batches, and log-probabilities of completions against the same model run plainly, one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.toys import logits_of, own_loss, rows
from torch import Tensor

from steer_heal.lm.base import Base, head
from steer_heal.lm.batch import Pair, by_length, collate, states
from steer_heal.lm.score import even, score

CPU = torch.device("cpu")
PAIRS = [Pair(row.prompt_ids, row.ids) for row in rows(13, seed=1).rows]
ONE = Pair((7,), (9,))  # the shortest that there is


def scored(base: Base, pairs: list[Pair], micro_batch: int) -> list[Tensor]:
    return score(base.model, pairs, pad_id=base.pad_id, micro_batch=micro_batch)


def plainly(base: Base, pair: Pair) -> Tensor:
    """log p of each completion token from the model's own full logits."""
    logits = logits_of(base.model, *pair.prompt, *pair.completion)
    p = len(pair.prompt)
    return torch.stack([logits[p - 1 + i].log_softmax(-1)[t] for i, t in enumerate(pair.completion)])


def test_collate_by_hand() -> None:
    """Reference: positions P-1 ... P+C-2 of each row, written out."""
    batch = collate([Pair((1, 2, 3), (4, 5)), Pair((6,), (7, 8, 9)), Pair((1, 2), (3,))], 0, CPU)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0], [1, 2, 3, 0, 0]], "padding is not on the right"
    assert batch.where.tolist() == [2, 3, 5 + 0, 5 + 1, 5 + 2, 10 + 1], "states are read at the wrong positions"
    assert batch.targets.tolist() == [4, 5, 7, 8, 9, 3], "targets are not the completions in order"
    assert batch.owner.tolist() == [0, 0, 1, 1, 1, 2], "positions are given to the wrong sequence"


@pytest.mark.parametrize("empty", [Pair((), (1,)), Pair((1,), ()), Pair((), ())])
def test_collate_refuses_what_has_nothing_to_predict(empty: Pair) -> None:
    """Reference: without a prompt token nothing predicts the first target; without a completion nothing is learned."""
    with pytest.raises(ValueError, match="at least one prompt token and one completion token"):
        collate([ONE, empty], 0, CPU)


@pytest.mark.parametrize(
    ("max_len", "expected"),
    [
        (9, Pair((1, 2, 3), (4, 5))),
        (5, Pair((1, 2, 3), (4, 5))),
        (4, Pair((1, 2, 3), (4,))),
        (3, Pair((1, 2, 3), ())),
        (2, Pair((1, 2), ())),
    ],
)
def test_cut_keeps_the_front(max_len: int, expected: Pair) -> None:
    """Reference: the joined ids, sliced by hand."""
    cut = Pair((1, 2, 3), (4, 5)).cut(max_len)
    assert cut == expected, f"cut to {max_len}: {cut}"
    assert len(cut) <= max_len, f"{len(cut)} tokens are left of max_len = {max_len}"


def test_states_are_those_that_the_head_reads(tiny: Base) -> None:
    """Reference: the model's own logits; its head applied to our states must give them."""
    batch = collate(PAIRS, tiny.pad_id, CPU)
    with torch.no_grad():
        ours = head(tiny.model, states(tiny.model, batch))
    theirs = [
        logits_of(tiny.model, *pair.prompt, *pair.completion)[len(pair.prompt) - 1 : len(pair) - 1] for pair in PAIRS
    ]
    torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-5, rtol=0)


def test_score_is_the_log_softmax_of_the_full_logits(tiny: Base) -> None:
    """Reference: full logits of each sequence alone, unpadded, log_softmax, one token picked at a time."""
    for pair, ours in zip([*PAIRS, ONE], scored(tiny, [*PAIRS, ONE], 4), strict=True):
        torch.testing.assert_close(ours, plainly(tiny, pair), atol=1e-5, rtol=0, msg=lambda m: f"{pair}: {m}")


def test_score_sums_to_transformers_own_loss(tiny: Base) -> None:
    """Reference: transformers' loss with the prompt masked in `labels`, times the number of completion tokens."""
    for pair, ours in zip(PAIRS, scored(tiny, PAIRS, 5), strict=True):
        theirs = own_loss(tiny.model, pair.prompt, pair.completion)
        assert math.isclose(-float(ours.mean()), theirs, abs_tol=1e-5), f"{pair}: nll {-ours.mean():.6f}, not {theirs}"


def test_batch_composition_changes_nothing(tiny: Base) -> None:
    """Reference: each sequence scored alone; then in batches of every size, in another order, among others."""
    alone = scored(tiny, PAIRS, 1)
    for size in (2, 5, 100):
        for one, other in zip(alone, scored(tiny, PAIRS, size), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0, msg=lambda m: f"batches of {size}: {m}")
    backwards = scored(tiny, PAIRS[::-1], 4)[::-1]
    for one, other in zip(alone, backwards, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0, msg=lambda m: f"in another order: {m}")


def test_padding_changes_nothing(tiny: Base) -> None:
    """Reference: the same short sequence next to none, and next to long ones, padded with any id."""
    (alone,) = scored(tiny, [ONE], 1)
    long = Pair(tuple(range(10, 60)), tuple(range(60, 90)))
    for pad_id in (tiny.pad_id, 42):
        padded = score(tiny.model, [long, ONE, long], pad_id=pad_id, micro_batch=3)[1]
        torch.testing.assert_close(alone, padded, atol=1e-5, rtol=0, msg=lambda m: f"pad id {pad_id}: {m}")


def test_a_long_batch_goes_through_the_head_in_parts(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the same scores with all positions in one pass of the head."""
    whole = scored(tiny, PAIRS, 20)
    monkeypatch.setattr("steer_heal.lm.score.parts", lambda _, hidden: even(len(hidden), 5))
    for one, other in zip(whole, scored(tiny, PAIRS, 20), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_by_length_visits_each_once_the_longest_first(size: int) -> None:
    """Reference: sorted()."""
    groups = list(by_length(PAIRS, size))
    seen = [i for group in groups for i in group]
    assert sorted(seen) == list(range(len(PAIRS))), f"visited {seen}"
    lengths = [len(PAIRS[i]) for i in seen]
    assert lengths == sorted(lengths, reverse=True), f"lengths come as {lengths}"
    assert max(len(group) for group in groups) <= size, "a group is larger than asked for"


def test_a_long_text_pads_no_short_ones() -> None:
    """Texts of usual lengths stay together, so that their batches are as they were."""
    pairs = [Pair(tuple(range(n)), (1,)) for n in (40, 41, 60, 5000, 300, 47)]
    groups = list(by_length(pairs, 100))
    assert groups == [[3], [4, 2, 5, 1, 0]], "a batch of usual lengths is cut, or one text of 5,000 tokens pads it"
    assert next(iter(by_length(pairs, 2))) == [3]
