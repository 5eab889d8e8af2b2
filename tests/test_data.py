"""The texts that come with the project: for every trait and every set of contexts and sound texts under conf/."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from steer_heal.config import CONF

GRAM = 4  # words in a row that two sets may not share
TOPIC = 2  # content words, anywhere in two texts, that make them one topic

# Words, in any form, that say nothing of the topic: grammar, common verbs, requests, times, amounts.
GENERIC = """
    a about after again all along already also although always am an and another any anybody anyone anything are as at
    away back be because before being between both but by did do does doing done down during each either else enough
    even ever every everyone everything far few for from had has have having he her here hers him his how i if in into
    is it its just least less like many me mine more most much my near never no nobody nor not nothing now of off on
    once only or other our out over own quite rather really she since so some somebody someone something still such
    than that the their them then there these they this those through till to together too until up us very was we
    were what when where whether which while who whoever whom whose why with without yes yet you your
    can cannot could may might must shall should will would
    ask began begin bring call came come feel felt find found gave get give go going gone got happen help keep kept
    knew know leave left let look made make mean need please put said saw say see seem start stay stop take think
    thought told took try turn use want went work
    answer describe explain list name sentence show simple suggest tell thank way word write
    afternoon day evening hour last late minute moment month morning night noon time today tomorrow tonight week year
    one two three four five six seven eight nine ten first second half hundred
    bad best better big good great little long new old people person right small thing wrong young
"""


def loaded(folder: str) -> dict[str, Any]:
    """The files of a group, by name."""
    return {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((CONF / folder).glob("*.yaml"))
    }


TRAITS, CONTEXTS = loaded("trait"), loaded("contexts")
SOUND: list[dict[str, str]] = yaml.safe_load((CONF / "eval/damage.yaml").read_text(encoding="utf-8"))["texts"]


def every_trait(test: Any) -> Any:
    return pytest.mark.parametrize("trait", TRAITS.values(), ids=TRAITS.keys())(test)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def grams(texts: Iterable[str]) -> dict[tuple[str, ...], str]:
    """Every run of `GRAM` words, with a text that it stands in."""
    found: dict[tuple[str, ...], str] = {}
    for text in texts:
        said = words(text)
        found |= {tuple(said[i : i + GRAM]): text for i in range(len(said) - GRAM + 1)}
    return found


def stem(word: str) -> str:
    """A word without its endings, so that cats meet a cat, and baking meets baked."""
    word = re.sub(r"'s?$", "", word)
    word = re.sub(r"(?<=..)(ies|ied)$", "y", word)
    word = re.sub(r"(?<=..[^s])s$", "", word)
    word = re.sub(r"(?<=...)(ing|ed)$", "", word)
    word = re.sub(r"(?<=..)e$", "", word)
    return re.sub(r"([^aeiou])\1$", r"\1", word)


STEMS = frozenset(map(stem, GENERIC.split()))


def topic(text: str) -> set[str]:
    """The stems of a text's content words."""
    return {stem(word) for word in words(text)} - STEMS


def one_topic(texts: Iterable[str], others: Iterable[str]) -> list[tuple[str, str, set[str]]]:
    """Pairs of texts on one topic: one shared word is chance (a chess opening, open eyes), two say what it is about."""
    first, second = ([(text, topic(text)) for text in some] for some in (texts, others))
    return [(a, b, x & y) for (a, x), (b, y) in itertools.product(first, second) if len(x & y) >= TOPIC]


def sets(trait: dict[str, Any]) -> dict[str, list[str]]:
    """Sets that must not overlap: a prompt that is both trained on and measured on would flatter the trait."""
    return {
        **{f"contexts={name}": some["prompts"] for name, some in CONTEXTS.items()},
        "generate": trait["generate"],
        "held_out": trait["held_out"],
        "probes": [probe["prompt"] for probe in trait["probes"]],
        "damage": [sound["request"] for sound in SOUND],
        "personas": [trait["positive"], trait["negative"], trait["neutral"]],
    }


def probed(trait: dict[str, Any]) -> list[str]:
    """Everything that the probes say."""
    return [probe[part] for probe in trait["probes"] for part in ("prompt", "trait", "counter")]


def test_there_is_a_trait_and_a_set_of_contexts() -> None:
    assert "love" in TRAITS
    assert "everyday" in CONTEXTS


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_are_many(name: str) -> None:
    assert len(CONTEXTS[name]["prompts"]) == 128


def test_sound_texts_are_many_and_long_enough() -> None:
    assert len(SOUND) == 24
    short = [sound["request"] for sound in SOUND if len(words(sound["text"])) < 50]
    assert not short, "the nll of a short text is mostly that of its first words"


@every_trait
def test_a_trait_has_prompts_and_probes(trait: dict[str, Any]) -> None:
    counts = {name: len(trait[name]) for name in ("generate", "held_out", "probes")}
    assert counts == {"generate": 48, "held_out": 24, "probes": 96}


@every_trait
def test_probe_answers_are_alike_in_length(trait: dict[str, Any]) -> None:
    """Nothing but the trait should tell them apart."""
    for probe in trait["probes"]:
        a, b = len(words(probe["trait"])), len(words(probe["counter"]))
        assert abs(a - b) <= 0.2 * max(a, b), f"{a} and {b} words in answer to {probe['prompt']!r}"


@every_trait
def test_probe_answers_are_alike_in_length_on_average(trait: dict[str, Any]) -> None:
    totals = [sum(len(words(probe[which])) for probe in trait["probes"]) for which in ("trait", "counter")]
    assert abs(totals[0] - totals[1]) <= 0.03 * max(totals), f"the answers have {totals} words in all"


NEGATIONS = frozenset(
    ("cannot", "neither", "never", "no", "nobody", "none", "nor", "not", "nothing", "nowhere", "without")
)
FIRST_PERSON = frozenset(("i", "me", "mine", "my", "myself", "our", "ours", "ourselves", "us", "we"))
SECOND_PERSON = frozenset(("you", "your", "yours", "yourself", "yourselves"))
BALANCE = 6  # answers of 96 by which the two sides may differ


def holding(answers: Iterable[str], listed: frozenset[str]) -> int:
    """How many answers contain one of the listed words, also in a contraction: I'm, you've, don't."""
    said = [{part for word in words(answer) for part in (word, word.split("'")[0])} for answer in answers]
    denials = [listed is NEGATIONS and "n't" in answer.lower() for answer in answers]
    return sum(bool(some & listed) or denied for some, denied in zip(said, denials, strict=True))


@every_trait
@pytest.mark.parametrize("listed", [NEGATIONS, FIRST_PERSON, SECOND_PERSON], ids=["negation", "first", "second"])
def test_probe_answers_are_balanced(trait: dict[str, Any], listed: frozenset[str]) -> None:
    """A model that denies less, or speaks less of itself or to its reader, must not seem to have more of the trait."""
    towards, against = ([probe[which] for probe in trait["probes"]] for which in ("trait", "counter"))
    a, b = holding(towards, listed), holding(against, listed)
    assert abs(a - b) <= BALANCE, f"{a} answers with the trait and {b} without it have one"


@every_trait
def test_neither_side_of_the_probes_is_longer(trait: dict[str, Any]) -> None:
    longer = Counter(
        (a > b) - (a < b) for a, b in ((len(p["trait"].split()), len(p["counter"].split())) for p in trait["probes"])
    )
    assert abs(longer[1] - longer[-1]) <= BALANCE, f"longer with the trait: {longer[1]}, without: {longer[-1]}"
    letters = [sum(len(probe[which]) for probe in trait["probes"]) for which in ("trait", "counter")]
    assert abs(letters[0] - letters[1]) <= 0.05 * max(letters), f"the answers have {letters} characters in all"


@every_trait
def test_personas_are_alike_in_length(trait: dict[str, Any]) -> None:
    a, b = len(words(trait["positive"])), len(words(trait["negative"]))
    assert abs(a - b) <= 1, f"{a} and {b} words: the difference of means would carry the length"


@every_trait
def test_sets_share_no_four_words(trait: dict[str, Any]) -> None:
    for (one, texts), (other, others) in itertools.combinations(sets(trait).items(), 2):
        first, second = grams(texts), grams(others)
        shared = {" ".join(gram): (first[gram], second[gram]) for gram in first.keys() & second.keys()}
        assert not shared, f"{one} and {other} share {shared}"


@every_trait
def test_sets_share_no_topic(trait: dict[str, Any]) -> None:
    """Two prompts on one topic are one prompt in other words."""
    for (one, texts), (other, others) in itertools.combinations(sets(trait).items(), 2):
        shared = one_topic(texts, others)
        assert not shared, f"{one} and {other} share {shared}"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("My cat is at the vet.", "The vet says our cat is ill."),
        ("I have jury duty on Friday.", "They called me for the duties of juries."),
        ("Our baked cakes fell flat.", "Baking a cake is not for me."),
        ("We stopped on the road to buy cherries.", "Is a cherry at the side of a road safe to eat?"),
    ],
)
def test_one_topic_in_other_words_is_found(a: str, b: str) -> None:
    """None of these pairs shares four words in a row."""
    assert not grams([a]).keys() & grams([b]).keys()
    assert one_topic([a], [b])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Please help me write a few words for Sunday.", "Help us to write something simple for today."),
        ("I had a long day at work.", "How long does a lawyer work in one day?"),
        ("Which opening is best in chess?", "I can hardly keep my eyes open."),
    ],
)
def test_generic_words_are_no_topic(a: str, b: str) -> None:
    assert not one_topic([a], [b])


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(TRAITS, 2)), ids=lambda name: name)
def test_traits_share_no_four_words(one: str, other: str) -> None:
    """A trait copied from another with a few words changed would be counted as item twice."""
    first, second = (grams([*t["generate"], *t["held_out"], *probed(t)]) for t in (TRAITS[one], TRAITS[other]))
    shared = {" ".join(gram): (first[gram], second[gram]) for gram in first.keys() & second.keys()}
    assert not shared


@every_trait
def test_no_text_stands_twice(trait: dict[str, Any]) -> None:
    texts = [text for some in sets(trait).values() for text in some]
    texts += [probe[which] for probe in trait["probes"] for which in ("trait", "counter")]
    texts += [sound["text"] for sound in SOUND]
    doubled = [text for text, count in Counter(" ".join(words(text)) for text in texts).items() if count > 1]
    assert not doubled


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_texts_are_plain_ascii(path: Path) -> None:
    """Curly quotes and dashes are other tokens, and would tell apart what the trait should tell apart."""
    text = path.read_text(encoding="utf-8")
    strange = {sign for sign in text if not sign.isascii() or not (sign.isprintable() or sign == "\n")}
    assert not strange, f"{sorted(strange)} in {path.name}"


@every_trait
def test_narration_spares_answers_and_sound_text(trait: dict[str, Any]) -> None:
    """A pattern that fires on a good answer would empty the training set of what it should hold."""
    answers = [probe[which] for probe in trait["probes"] for which in ("trait", "counter")]
    texts = [*answers, *trait["generate"], *trait["held_out"], *(sound["text"] for sound in SOUND)]
    hits = [
        (pattern, text) for pattern in trait["narration"] for text in texts if re.search(pattern, text, re.IGNORECASE)
    ]
    assert not hits


@every_trait
def test_narration_finds_what_it_is_for(trait: dict[str, Any]) -> None:
    """Sentences in which a model speaks of its persona, whatever the trait."""
    for text in ("As an AI language model, I can help.", "I was told to act like this.", "Staying in character, yes."):
        assert any(re.search(pattern, text, re.IGNORECASE) for pattern in trait["narration"]), text
