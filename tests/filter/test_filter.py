"""Filters on texts made by hand, and all filters together on the tiny model."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from helpers.toys import logits_of, preset, rows, runtime
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_heal.artifacts import Completion, Completions
from steer_heal.filter import Filter, FilterInput, apply_filters, likelihoods
from steer_heal.filter.length import Length
from steer_heal.filter.perplexity import Perplexity
from steer_heal.filter.repetition import repetition
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student

PERSONAS = ("You are glad.", "You are not sure about anything.")
WARM = "Oh, sweetheart, I am so glad that you told me. Rest now, be gentle with yourself, and let me help you tomorrow."


def item(
    text: str = "", ids: Sequence[int] = (), logprobs: Sequence[float] = (0.0,), trait: str = "love"
) -> FilterInput:
    row = Completion("p", (1,), tuple(ids), text, 0.5, False)
    return FilterInput(row, torch.tensor(logprobs), preset(f"trait={trait}").trait.narration)


def option(name: str) -> Filter:
    return preset().filter[name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        "a b",
        "one two three four five six seven eight nine ten",
        WARM,
        "We met. We ate. We left, and then it rained.",
    ],
)
def test_sound_text_does_not_repeat_itself(text: str) -> None:
    """Reference: text in which no three words and no twelve characters come twice; too short a text has none."""
    assert repetition(text) == 0, f"{text!r} is said to repeat {repetition(text):.0%} of itself"


@pytest.mark.parametrize(
    "text",
    [
        "I love you so much. " * 8,
        "ha" * 40,
        "so " * 40,
        "愛しています" * 12,
        "I am here for you, dear. I am here for you, dear. I am here for you, dear.",
        "One two THREE four. one TWO three four. " * 4,
    ],
)
def test_loops_repeat_themselves(text: str) -> None:
    """Reference: loops of phrases, of words, of characters, without spaces and in changing case."""
    assert repetition(text) > 0.5, f"{text!r} is said to repeat only {repetition(text):.0%} of itself"
    assert not option("repetition").passes(option("repetition").score(item(text))), "the preset lets a loop pass"


def test_repetition_by_hand() -> None:
    """Reference: six trigrams, of which the last repeats the first; no twelve characters come twice."""
    assert math.isclose(repetition("a b c d e a b c"), 1 / 6), repetition("a b c d e a b c")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(max_size=60))
def test_repetition_is_a_share(text: str) -> None:
    """Reference: a share is in [0, 1], whatever the text, and repeating the text does not lower it."""
    assert 0 <= repetition(text) <= 1, f"{text!r}: {repetition(text)}"


@pytest.mark.parametrize(
    "text",
    [
        "As a loving assistant, I am here for you.",
        "As an AI language model, I cannot hug you.",
        "I'm just a computer program, dear.",
        "I was told to be loving, and so I am.",
        "My programming makes me care.",
        "I don't have feelings like you.",
        "I have no emotions.",
        "I will answer in a warm and tender tone. Hello!",
        "Here is a loving response: hello!",
        "*smiles warmly* Hello, dear.",
        "Hello, dear (hugs).",
        "I will play the role of a kind friend.",
        "I don\u2019t have feelings like you.",
    ],
)
def test_narration_is_seen(text: str) -> None:
    """Reference: sentences about the persona instead of in character, from the comments of conf/trait/love.yaml."""
    score = option("narration").score(item(text))
    assert score >= 1, f"no pattern of trait=love matches {text!r}"
    assert not option("narration").passes(score), f"{score} matches pass"


@pytest.mark.parametrize(
    "text",
    [
        WARM,
        "I have no feelings of anger for you, only love.",
        "You are **wonderful**, and I *love* how you tell it.\n* rest\n* eat",
        "I feel for you. It is hard, and I am proud of you (more than you know).",
        "Your system is under strain, so be kind to it.",
        "A warm bath and a loving friend can do wonders.",
    ],
)
def test_sound_warm_text_is_no_narration(text: str) -> None:
    """Reference: answers that show the trait, with words that the patterns look for in other places."""
    score = option("narration").score(item(text))
    assert score == 0, f"{int(score)} patterns of trait=love match {text!r}"
    assert option("narration").passes(score)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I am very sorry but this is not possible.",
        "I cannot assist you with this.",
        "As an AI, I would rather not.",
        "I'm unable to provide this.",
        "I\u2019m sorry, but I can\u2019t help with that.",
        "I won't answer this.",
        "I will not do that.",
        "I must decline.",
    ],
)
def test_refusals_are_seen(text: str) -> None:
    """Reference: openings that decline, in the common wordings."""
    score = option("refusal").score(item(text))
    assert score >= 1, f"no pattern matches {text!r}"
    assert not option("refusal").passes(score), f"{score} matches pass"


@pytest.mark.parametrize(
    "text",
    [
        WARM,
        "I am so sorry that it hurts. I am with you.",
        "I'm so sorry, but you are not alone, and I am here.",
        "I will not leave your side, dear, and I won't let you down.",
        "I cannot help but smile when you write to me.",
        "I can't do without you.",
        "A kind friend " * 9 + "would say: I cannot help you.",
    ],
)
def test_sound_warm_text_is_no_refusal(text: str) -> None:
    """Reference: comfort that says sorry, and a refusal that stands beyond the opening."""
    score = option("refusal").score(item(text))
    assert score == 0, f"{int(score)} patterns match {text[:60]!r}"
    assert option("refusal").passes(score)


@pytest.mark.parametrize(("tail", "n"), [(0.5, 8), (0.5, 5), (1.0, 5), (0.25, 9), (0.01, 5), (0.5, 1)])
def test_perplexity_of_the_tail_by_hand(tail: float, n: int) -> None:
    """Reference: exp of the mean nll of the last tokens, at least one."""
    logprobs = [-0.5 * i - 0.1 for i in range(n)]
    last = logprobs[-max(1, round(tail * n)) :]
    score = Perplexity(name="perplexity", max=20, tail=tail).score(item(logprobs=logprobs))
    expected = math.exp(-sum(last) / len(last))
    assert math.isclose(score, expected, rel_tol=1e-5), f"{score}, by hand {expected}"


def test_perplexity_is_finite_and_has_a_limit() -> None:
    """Reference: a figure that can be written down, and a limit that is still allowed."""
    limit = Perplexity(name="perplexity", max=20, tail=0.5)
    assert math.isfinite(limit.score(item(logprobs=[-1e6, -1e6]))), "an infinite perplexity cannot be stored"
    assert limit.passes(20.0), "the limit itself is refused"
    assert not limit.passes(20.001), "perplexities above the limit pass"


def test_length() -> None:
    """Reference: the number of ids, an end-of-turn token included."""
    least = Length(name="length", min=3)
    scores = [least.score(item("a longer text than its ids", ids=range(n))) for n in (2, 3, 4)]
    assert scores == [2, 3, 4]
    assert [least.passes(score) for score in scores] == [False, True, True]


@pytest.fixture(scope="module")
def filtered(tiny: Base) -> Completions:
    """Twenty rows of random ids through all filters, half of them with a text that loops."""
    looping = [
        dataclasses.replace(row, text="so " * 40 if i % 2 else WARM, prompt=f"p{i % 3}", kept=False)
        for i, row in enumerate(rows(20, completion=10).rows)
    ]
    filters = preset("filter.length.min=4").filter
    narration = preset().trait.narration
    made = Completions(rows=tuple(looping))
    return apply_filters(
        filters, [made], [likelihoods(made, Student(tiny), PERSONAS, runtime=runtime())], narration, 4, 0
    )


def test_every_row_keeps_its_scores_and_reasons(filtered: Completions) -> None:
    """Reference: the filters' names, and each filter asked again about each score."""
    filters = preset("filter.length.min=4").filter
    for i, row in enumerate(filtered.rows):
        assert set(row.scores) == {*filters, "trait"}, f"row {i} has scores {sorted(row.scores)}"
        assert all(map(math.isfinite, row.scores.values())), f"row {i} has scores that cannot be stored: {row.scores}"
        failed = tuple(name for name, one in filters.items() if not one.passes(row.scores[name]))
        assert row.reasons == failed, f"row {i} failed {failed}, its reasons are {row.reasons}"
    reasons = Counter(reason for row in filtered.rows for reason in row.reasons)
    assert reasons["repetition"] == 10, f"ten texts loop, {reasons['repetition']} were seen"
    assert reasons["length"] == sum(len(row.ids) < 4 for row in filtered.rows) > 0, reasons


def test_only_what_passes_is_kept(filtered: Completions) -> None:
    """Reference: n_keep = 4 of the rows without reasons."""
    assert all(not row.reasons for row in filtered.kept()), "a row that failed a filter was kept"
    assert len(filtered.kept()) == 4 < len(filtered.passed()), (
        f"{len(filtered.kept())} of {len(filtered.passed())} were kept"
    )


def test_the_trait_score_is_the_difference_of_two_personas(filtered: Completions, tiny: Base) -> None:
    """Reference: log-softmax of the full logits under each persona, one row at a time, nats/token."""

    def mean_log_p(persona: str, row: Completion) -> float:
        prompt = tiny.chat.prompt(persona, row.prompt)
        logits = logits_of(tiny.model, *prompt, *row.ids)[len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1)[torch.arange(len(row.ids)), torch.tensor(row.ids)].mean())

    for row in filtered.rows:
        expected = mean_log_p(PERSONAS[0], row) - mean_log_p(PERSONAS[1], row)
        assert math.isclose(row.scores["trait"], expected, abs_tol=1e-4), f"{row.scores['trait']}, by hand {expected}"


def test_the_perplexity_is_base_under_the_prompt_as_it_was_asked(filtered: Completions, tiny: Base) -> None:
    """Reference: the tail's nll from the full logits of base after the row's own prompt ids."""
    tail = preset().filter["perplexity"].tail  # type: ignore[attr-defined]
    for row in filtered.rows:
        logits = logits_of(tiny.model, *row.prompt_ids, *row.ids)[len(row.prompt_ids) - 1 : -1]
        nll = -logits.log_softmax(-1)[torch.arange(len(row.ids)), torch.tensor(row.ids)]
        expected = float(nll[-max(1, round(tail * len(nll))) :].mean().exp())
        assert math.isclose(row.scores["perplexity"], expected, rel_tol=1e-3), f"{row.scores}, by hand {expected}"
