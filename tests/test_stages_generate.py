"""Answers to learn from: batches until there are enough, and what is said where there never are."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toys import preset

from steer_heal.artifacts import Completion, Completions, SteeringVector
from steer_heal.config import ConfigError
from steer_heal.experiment import Experiment
from steer_heal.filter import Filter, FilterInput, TooFew
from steer_heal.generate import generate
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.stages import Stages
from steer_heal.store import Store

SEED = 1000
DOSES = (0.5, 1.0)
PROMPTS = ("Hello", "What is love?", "Tell me about rain", "A long day at work", "Name a bird", "Why?")
BATCH = len(PROMPTS) * len(DOSES)
VECTOR = SteeringVector(layers=(1,), directions=torch.linspace(-1, 1, 32)[None], snr=(1.0,), key="made-up")


def lot(row: Completion, salt: int) -> float:
    """A number in [0, 1) for what a row says."""
    return zlib.crc32(repr((salt, row.ids)).encode()) / 2**32


class Lottery(Filter):
    """Lets about a share of the answers through, the same ones every time."""

    share: float
    salt: int = 0

    def score(self, item: FilterInput) -> float:
        return lot(item.completion, self.salt)

    def passes(self, score: float) -> bool:
        return score < self.share


def drawing(share: float, **heal: Any) -> Experiment:
    """The tiny experiment with two lotteries for filters, which both let so much through, and fields of its heal."""
    exp = preset()
    trait = exp.trait.model_copy(update={"generate": PROMPTS})
    filters = {name: Lottery(name=name, share=share**0.5, salt=salt) for salt, name in enumerate(("one", "two"))}
    training = exp.heal.model_copy(update={"min_train": 1} | heal)
    return exp.model_copy(update={"trait": trait, "filter": filters, "heal": training})


@dataclass
class Supplied:
    """The outcome: the answers or the error, and the number of the first row of each batch that was made."""

    filtered: Completions | None = None
    refusal: str = ""
    firsts: list[int] = field(default_factory=list)

    @property
    def rows(self) -> tuple[Completion, ...]:
        assert self.filtered is not None, self.refusal
        return self.filtered.rows


def staged(exp: Experiment, store: Store, base: Base) -> Stages:
    """The stages of an experiment on a base of the test's own."""
    stages = Stages(exp, store)
    stages.base = Student(base)
    return stages


def supplied(exp: Experiment, base: Base, folder: Path) -> Supplied:
    found = Supplied()

    class Noting(Store):
        def __call__(self, stage: Any, *what: Any, **how: Any) -> Any:  # type: ignore[override]
            if stage is generate:
                found.firsts.append(what[7])
            return super().__call__(stage, *what, **how)

    stages = staged(exp, Noting(folder), base)
    try:
        found.filtered = stages.generate(Student(base), VECTOR, DOSES, SEED)
    except TooFew as error:
        found.refusal = str(error)
    return found


def at_once(exp: Experiment, base: Base, batches: int) -> tuple[Completion, ...]:
    """The answers of several batches from one call, in the same order: every prompt repeated."""
    trait = exp.trait
    given = (exp.generate, Student(base), trait.neutral, PROMPTS * batches, VECTOR, DOSES, SEED)
    return generate(*given, runtime=exp.runtime).rows


def sound(rows: tuple[Completion, ...], exp: Experiment) -> list[bool]:
    """Mask of the rows that pass the lotteries, by hand."""
    share = next(iter(exp.filter.values())).share  # type: ignore[attr-defined]
    return [all(lot(row, salt) < share for salt in (0, 1)) for row in rows]


def test_batches_are_made_until_enough_are_sound(tiny: Base, store_folder: Path) -> None:
    """Reference: one call for five batches at once, and the lotteries by hand; batches follow its rows."""
    exp = drawing(0.4, n_keep=12, top_ups=4)
    found, whole = supplied(exp, tiny, store_folder), at_once(exp, tiny, 5)
    passing = sound(whole, exp)
    needed = next(n for n in range(1, 6) if sum(passing[: n * BATCH]) >= 12)
    assert 1 < needed < 5, f"{needed} batches are needed, so this test would see little"
    assert found.firsts == [n * BATCH for n in range(needed)], "rows of a batch begin at another number"
    assert len(found.rows) == needed * BATCH
    for i, (row, expected) in enumerate(zip(found.rows, whole, strict=False)):
        assert (row.prompt, row.dose, row.ids) == (expected.prompt, expected.dose, expected.ids), f"row {i} is another"
        assert (not row.reasons) == passing[i], f"row {i} failed {row.reasons}"
    assert len({row.ids for row in found.rows}) > 0.9 * len(found.rows), "batches repeat each other"


@pytest.mark.parametrize("extra", [0, 1])
def test_it_stops_as_soon_as_there_are_enough(tiny: Base, tmp_path: Path, extra: int) -> None:
    """Reference: the first batch has just as many passing answers as are wanted, or one too few."""
    first = sum(sound(at_once(drawing(0.4), tiny, 1), drawing(0.4)))
    assert first > 1
    found = supplied(drawing(0.4, n_keep=first + extra, top_ups=3), tiny, tmp_path)
    assert len(found.firsts) == 1 + extra
    alike = supplied(drawing(0.4, n_keep=None, min_train=first + extra, top_ups=3), tiny, tmp_path)
    assert len(alike.firsts) == 1 + extra, "with n_keep null it is min_train that is wanted"
    assert alike.filtered is not None
    assert alike.filtered.kept() == alike.filtered.passed(), "with n_keep null all that pass are kept"


def test_what_is_kept_is_spread_over_prompts_and_doses_of_all_batches(tiny: Base, store_folder: Path) -> None:
    """Reference: no prompt is ahead of one that still has passing rows by more than one; both batches give some."""
    exp = drawing(0.6, n_keep=12, top_ups=4)
    rows = supplied(exp, tiny, store_folder).rows
    kept = [i for i, row in enumerate(rows) if row.kept]
    assert len(kept) == 12
    assert len({i // BATCH for i in kept}) > 1, "one batch gave all, so this test would see little"
    count = Counter(rows[i].prompt for i in kept)
    spare = {row.prompt for row in rows if not row.reasons and not row.kept}
    behind = {prompt: count[prompt] for prompt in spare if count[prompt] < max(count.values()) - 1}
    assert not behind, f"{count}, and of {behind} there are more"
    doses = Counter(rows[i].dose for i in kept)
    assert max(doses.values()) - min(doses.values()) <= 2, f"doses are kept {doses} times"


def test_at_the_cap_the_refusal_has_the_numbers(tiny: Base, store_folder: Path) -> None:
    """Reference: counts by hand over three batches, by filter and by dose, and what to do about it."""
    exp = drawing(0.1, n_keep=30, min_train=20, top_ups=2)
    found, whole = supplied(exp, tiny, store_folder), at_once(exp, tiny, 3)
    passing = sound(whole, exp)
    assert found.firsts == [0, BATCH, 2 * BATCH], "the cap is two batches more"
    share = 0.1**0.5
    failed = [sum(lot(row, salt) >= share for row in whole) for salt in (0, 1)]
    by_filter = [f"{name} {n}" for n, name in sorted(zip(failed, ("one", "two"), strict=True), reverse=True)]
    assert failed[0] != failed[1], "a tie, so that the order says nothing"
    by_dose = [
        f"{dose:g}: {sum(ok for ok, row in zip(passing, whole, strict=True) if row.dose == dose)} of {3 * len(PROMPTS)}"
        for dose in DOSES
    ]
    assert found.refusal == (
        f"{sum(passing)} of {3 * BATCH} completions kept, fewer than heal.min_train=20; failed by filter: "
        f"{', '.join(by_filter)}; passed by dose: {', '.join(by_dose)}. Lower the dose, loosen the filter that failed "
        "most, or raise heal.top_ups"
    )


def test_enough_to_train_on_is_enough_at_the_cap(tiny: Base, store_folder: Path) -> None:
    """Reference: more than min_train, fewer than n_keep, all of them kept."""
    found = supplied(drawing(0.4, n_keep=1000, min_train=2, top_ups=1), tiny, store_folder)
    assert len(found.firsts) == 2
    assert found.filtered is not None
    assert found.filtered.kept() == found.filtered.passed() != []


def test_without_top_ups_there_is_one_batch(tiny: Base, store_folder: Path) -> None:
    """Reference: the first batch alone, whatever comes of it."""
    found = supplied(drawing(0.4, n_keep=1000, top_ups=0), tiny, store_folder)
    assert found.firsts == [0]
    refused = supplied(drawing(0.4, n_keep=None, min_train=BATCH, top_ups=0), tiny, store_folder)
    assert refused.firsts == [0]
    assert f"of {BATCH} completions kept, fewer than heal.min_train={BATCH}" in refused.refusal


def test_a_further_batch_costs_nothing_again(tiny: Base, store_folder: Path) -> None:
    """Reference: what the store computed. A higher cap takes up where a lower one ended."""
    supplied(drawing(0.1, n_keep=30, top_ups=1), tiny, store_folder)
    found = Store(store_folder)
    exp = drawing(0.1, n_keep=30, top_ups=2)
    staged(exp, found, tiny).generate(Student(tiny), VECTOR, DOSES, SEED)
    assert found.computed == ["generate.generate", "filter.likelihoods", "filter.sift"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"n_keep": 32, "min_train": 2}, {"n_keep": 32, "min_train": 3}, True),
        ({"n_keep": None, "min_train": 2}, {"n_keep": None, "min_train": 3}, False),
        ({"n_keep": None, "min_train": 2, "top_ups": 0}, {"n_keep": None, "min_train": 3, "top_ups": 0}, True),
        ({"top_ups": 1}, {"top_ups": 2}, False),
    ],
)
def test_cells_that_may_make_other_answers_are_not_the_same(
    one: dict[str, Any], other: dict[str, Any], same: bool
) -> None:
    """Reference: what decides how many batches are made. Cells of one meaning are named as one and shown as twins."""
    cells = [drawing(0.4, **heal).fingerprint for heal in (one, other)]
    assert (cells[0] == cells[1]) == same


def test_the_cap_counts_towards_what_can_be_generated() -> None:
    """Reference: one prompt at four doses, in three batches."""
    preset("trait.generate=[Hello]", "heal.min_train=12")
    with pytest.raises(ConfigError, match=r"at least heal\.min_train=13 completions, not 12"):
        preset("trait.generate=[Hello]", "heal.min_train=13")
