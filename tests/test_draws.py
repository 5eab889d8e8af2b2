"""What a seed draws: contexts, and training prompts."""

from __future__ import annotations

import pytest
from helpers.compose import composed

from steer_heal.contexts import drawn

POOL = tuple(f"prompt {i}" for i in range(48))


def test_a_draw_is_a_subset_in_order() -> None:
    some = drawn(POOL, 24, "a 0")
    assert len(set(some)) == 24
    assert list(some) == [prompt for prompt in POOL if prompt in some], "the order changed"
    assert some == drawn(POOL, 24, "a 0"), "the same seed draws other prompts"


@pytest.mark.parametrize("n", [None, 48, 100])
def test_a_small_pool_is_used_whole(n: int | None) -> None:
    assert drawn(POOL, n, "a 0") == POOL


def test_every_prompt_is_drawn_as_often_and_independently() -> None:
    """Reference: the binomial spread of how often a prompt is drawn, and of how many two seeds share."""
    draws = [set(drawn(POOL, 24, f"a {seed}")) for seed in range(400)]
    counts = [sum(prompt in some for some in draws) for prompt in POOL]
    assert 150 < min(counts) <= max(counts) < 250, f"drawn {min(counts)} to {max(counts)} times of 400"
    shared = [len(a & b) for a, b in zip(draws[::2], draws[1::2], strict=True)]
    assert 11 < sum(shared) / len(shared) < 13, "two seeds share about half of their prompts"


def test_a_new_prompt_changes_a_draw_as_little_as_possible() -> None:
    before, after = set(drawn(POOL, 24, "a 0")), set(drawn((*POOL, "new"), 24, "a 0"))
    assert len(before & after) >= 23


def test_seeds_draw_contexts_and_training_prompts_and_no_others() -> None:
    """Held-out prompts and probes stay, so that seeds are measured alike."""
    for trait in ("love", "formality", "care_over_authority"):
        one, two = (composed(f"trait={trait}", f"seed={seed}") for seed in (0, 1))
        assert one.trait == two.trait
        prompts = [exp.trait.draw(exp.generate.n_prompts, exp.seed) for exp in (one, two)]
        assert [len(some) for some in prompts] == [24, 24]
        assert prompts[0] != prompts[1]
        contexts = [exp.contexts.draw(exp.seed).prompts for exp in (one, two)]
        assert [len(some) for some in contexts] == [96, 96]
        assert contexts[0] != contexts[1]
        assert composed(f"trait={trait}", "reg=nll").contexts.draw(0).prompts == contexts[0], "cells share no vector"
