"""The draw of completions to keep, and the error if there are too few."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_heal.artifacts import Completion, Completions
from steer_heal.filter import TooFew, draw_evenly, require


def made(prompts: int, doses: int, n: int, seed: int) -> list[Completion]:
    rng = random.Random(seed)
    return [
        Completion(f"p{rng.randrange(prompts)}", (1,), (2,), "", float(rng.randrange(doses)), False) for _ in range(n)
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    prompts=st.integers(1, 5),
    doses=st.integers(1, 4),
    n=st.integers(0, 30),
    take=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_spread_over_prompts(prompts: int, doses: int, n: int, take: int, seed: int) -> None:
    """Reference: as even as possible: no prompt is ahead of one that still has rows by more than one."""
    some = made(prompts, doses, n, seed)
    chosen = draw_evenly(range(n), some, take, seed)
    assert len(chosen) == min(n, take), f"{len(chosen)} of {n} rows drawn, {take} wanted"
    count = Counter(some[i].prompt for i in chosen)
    left = {some[i].prompt for i in range(n) if i not in chosen}
    for prompt in left:
        ahead = max(count.values(), default=0) - count[prompt]
        assert ahead <= 1, f"{prompt} has {count[prompt]} rows and more to give; another has {ahead} more"
    assert chosen == draw_evenly(range(n), some, take, seed), "the same seed drew other rows"


def test_spread_over_doses() -> None:
    """Reference: three prompts at four doses, once each: eight rows are two of every dose, whatever the seed."""
    grid = [Completion(f"p{p}", (1,), (2,), "", dose, False) for p in range(3) for dose in (0.4, 0.6, 0.8, 1.0)]
    draws = []
    for seed in range(20):
        chosen = draw_evenly(range(12), grid, 8, seed)
        doses = Counter(grid[i].dose for i in chosen)
        assert set(doses.values()) == {2}, f"seed {seed}: doses {dict(doses)}"
        draws.append(frozenset(chosen))
    assert len(set(draws)) > 5, f"20 seeds drew only {len(set(draws))} different sets"


def test_spread_takes_from_the_allowed_only_and_all_without_a_limit() -> None:
    """Reference: the indices given."""
    some = made(3, 2, 10, 0)
    assert draw_evenly([1, 4, 7], some, None, 0) == {1, 4, 7}
    assert draw_evenly([1, 4, 7], some, 2, 0) < {1, 4, 7}
    assert draw_evenly([], some, 5, 0) == set()


def test_too_few_says_what_starved() -> None:
    """Reference: the counts, by hand."""
    reasons = [("length",), ("length", "refusal"), ("length",), (), ()]
    bare = made(1, 1, 5, 0)
    some = [dataclasses.replace(row, reasons=why, kept=not why) for row, why in zip(bare, reasons, strict=True)]
    found = Completions(rows=tuple(some))
    require(found, 2, 512)
    with pytest.raises(TooFew, match=r"2 of 5 completions kept.*min_train=3.*length 3, refusal 1"):
        require(found, 3, 512)
    with pytest.raises(TooFew, match=r"0 of 2 kept completions fit heal\.max_len=1"):
        require(found, 2, 1)
    with pytest.raises(TooFew, match="0 of 0"):
        require(Completions(rows=()), 1, 512)
