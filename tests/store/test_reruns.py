"""Recomputation after a change: a table of every field, against the stages that read it and those that follow.

The loop runs once for real. For every change it runs again on a store that computes keys as ever, but gives back what
the first run made; so a stage counts as rerun if its key is a new one. A value that a stage's code turns into another
value does not change here, only keys do, with one exception: doses, which answers copy from what they are asked for.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.readers import (
    ALL_EVALS,
    ANSWERS,
    EXTRACT,
    HEAL,
    MODEL,
    ROWS,
    SCORED,
    SIFTED,
    STEERED,
    TABLE,
    affected,
    reads,
)
from helpers.replay import Keys, Recording, Replaying, replayed, two_rounds

from steer_heal.artifacts import Completions
from steer_heal.loop import run
from steer_heal.store import Store
from steer_heal.store.keys import VERSIONS, fingerprint
from steer_heal.tracker.jsonl import JsonlConfig


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Two rounds of the tiny experiment, for real."""
    folder = tmp_path_factory.mktemp("baseline")
    store = Recording(folder / "store", two_rounds())
    with JsonlConfig(name="jsonl").open(folder, config={}, group=None, run_name="baseline") as tracker:
        run(two_rounds(), store, tracker)
    return store


def changed(before: Keys, after: Keys) -> set[str]:
    """The calls of the second run whose results are not there after the first."""
    return {label for label, key in after.items() if key not in before.values()}


def assert_reruns(found: set[str], expected: set[str], what: str) -> None:
    assert found == expected, (
        f"{what} reruns too much: {sorted(found - expected)}; too little: {sorted(expected - found)}"
    )


def test_the_replay_gives_the_keys_of_the_run(baseline: Recording, tmp_path: Path) -> None:
    """Reference: the store itself, and the graph that the table builds on."""
    keys = replayed(baseline, tmp_path, two_rounds())
    assert keys == baseline.labels.keys, "the replay has other keys than the run"
    assert keys.keys() == reads().keys(), f"unknown or missing calls: {sorted(keys.keys() ^ reads().keys())}"
    assert len(set(keys.values())) == len(keys), "two calls share a key, so a rerun of one may go unseen"


@pytest.mark.parametrize(("under", "override"), ROWS, ids=lambda text: text.partition("path=")[0][:40] or "tiny")
def test_a_change_reruns_what_can_read_it(baseline: Recording, tmp_path: Path, under: str, override: str) -> None:
    """Reference: the table, and what is made from the results of those stages."""
    given = [under] if under else []
    before = replayed(baseline, tmp_path, two_rounds(*given))
    after = replayed(baseline, tmp_path, two_rounds(*given, override))
    expected = affected(TABLE[under][override], under=under)
    assert_reruns(changed(before, after), expected, f"{override} under {under or 'tiny'}")


EVALS = ("trait", "damage", "text", "persona", "drift")
EXAMINED = {"healed.answers 0", *(f"healed.eval.{name} 0" for name in EVALS)}
AFTER_TRAINING = {"heal 0", "drift 0"} | EXAMINED  # the drift is the healed student's


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("heal.lr=0.02", AFTER_TRAINING),
        ("filter.length.min=2", {"train.filtered 0", "held.filtered 0"} | AFTER_TRAINING),
        ("trait.generate=[a,b,c,d,e,f,g,h]", AFTER_TRAINING | {
            "train.answers 0", "train.scored 0", "train.filtered 0",
        }),
        ("trait.held_out=[a,b]", {
            "base.answers 0", "base.eval.text 0", "base.eval.persona 0", "steered.answers 0", "steered.eval.text 0",
            "steered.eval.persona 0", "steered.eval.strength 0", "held.scored 0", "held.filtered 0"} | AFTER_TRAINING),
        ("contexts.prompts=[a,b]", {label for label in reads(1) if not label.startswith("base")}),
        ("eval.text.max_repetition=0.3", {"base.eval.text 0", "steered.eval.text 0", "healed.eval.text 0"}),
    ],
)  # fmt: skip
def test_one_round_by_hand(baseline: Recording, tmp_path: Path, override: str, expected: set[str]) -> None:
    """Reference: the sets written out, so that the table's "and what follows" is itself checked."""
    before = replayed(baseline, tmp_path, two_rounds("n_rounds=1"))
    after = replayed(baseline, tmp_path, two_rounds("n_rounds=1", override))
    assert_reruns(changed(before, after), expected, override)


def test_more_rounds_rerun_none_of_the_first(baseline: Recording, tmp_path: Path) -> None:
    """Reference: all calls of the third round, and no other."""
    after = replayed(baseline, tmp_path, two_rounds("n_rounds=3"))
    assert_reruns(changed(baseline.labels.keys, after), {x for x in reads(3) if x.endswith(" 2")}, "n_rounds=3")


class Choosy(Replaying):
    """Another filter keeps other rows: those at the highest dose."""

    def altered(self, label: str, made: Any, what: tuple[Any, ...]) -> Any:
        made = super().altered(label, made, what)
        if "train.filtered" not in label:
            return made
        most = max(row.dose for row in made.rows)
        kept = tuple(dataclasses.replace(row, kept=row.kept and row.dose == most) for row in made.rows)
        return Completions(rows=kept)


def test_what_is_kept_decides_the_dose_of_the_steered_figures(baseline: Recording, tmp_path: Path) -> None:
    """Reference: steered figures are at the mean dose of what was kept, and of the sifting read nothing else."""
    few = ("heal.min_train=1", "filter.length.min=2")
    after = replayed(baseline, tmp_path, two_rounds(*few), Choosy)
    assert_reruns(changed(baseline.labels.keys, after), affected(SIFTED | STEERED), "another mean dose")


def test_a_real_run_agrees(baseline: Recording, tmp_path: Path) -> None:
    """Reference: the stages that a real store computes; how it is carried out takes no part."""
    for overrides, expected in ((("runtime.micro_batch=3", "seed=0"), 0), (("eval.text.min_distinct=0.3",), 5)):
        store = Store(baseline.root)
        with JsonlConfig(name="jsonl").open(tmp_path, config={}, group=None, run_name="again") as tracker:
            run(two_rounds(*overrides), store, tracker)
        assert store.computed == ["eval.evaluate"] * expected, f"{overrides}: computed {store.computed}"


def test_auto_is_the_device_that_it_finds(baseline: Recording, tmp_path: Path) -> None:
    """Reference: on a machine with nothing but a CPU the same as cpu, and otherwise another one."""
    exp = two_rounds("model.device=auto")
    expected = set() if exp.model.torch_device().type == "cpu" else affected(MODEL)
    assert_reruns(changed(baseline.labels.keys, replayed(baseline, tmp_path, exp)), expected, "model.device=auto")


VERSIONED = {
    "steer.extract": EXTRACT, "generate.generate": ANSWERS, "filter.sift": SIFTED,
    "filter.likelihoods": SCORED | {f"{who}.eval.persona" for who in ("base", "steered", "healed")},
    "heal.heal": HEAL, "heal.drift.drift": {"drift"}, "apart.strength": set(),  # of a search, which is not made here
    "eval.evaluate": ALL_EVALS | {"steered.eval.strength", "healed.eval.drift"},
}  # fmt: skip


@pytest.mark.parametrize("stage", VERSIONED)
def test_a_new_version_reruns_its_stage_and_what_follows(
    baseline: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Reference: the calls of that stage, and what is made from their results."""
    monkeypatch.setitem(VERSIONS, stage, VERSIONS.get(stage, 1) + 1)
    after = replayed(baseline, tmp_path, two_rounds())
    assert_reruns(changed(baseline.labels.keys, after), affected(VERSIONED[stage]), f"another version of {stage}")


def test_versions_are_of_stages_that_exist() -> None:
    """Reference: the stages of the loop; a misspelt one would change nothing, silently."""
    assert VERSIONS.keys() <= VERSIONED.keys(), f"no such stages: {VERSIONS.keys() - VERSIONED.keys()}"


SAME = [
    (("lora=r16",), ("lora=r8", "lora.r=16")),
    (("lora=r16",), ("lora=r16", "lora.lora_alpha=32")),
    (("lora=r16",), ("lora=r4", "lora.r=16", "lora.lora_alpha=32.0", "lora.name=mine")),
    (("reg=kl_rev", "lam=0.7"), ("reg=kl_rev", "reg.lam=0.7")),
    (("heal.lr=1e-3",), ("heal.lr=0.001",)),
    (("dose.alpha=[1,2,3,4]",), ("dose.alpha=[1.0,2.0,3.0,4.0]",)),
    (("filter=[length,perplexity]",), ("filter=[perplexity,length]",)),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=str)
def test_the_same_thing_said_otherwise_is_found(
    baseline: Recording, tmp_path: Path, one: tuple[str, ...], other: tuple[str, ...]
) -> None:
    """Reference: the keys of the first way to say it."""
    keys = [replayed(baseline, tmp_path, two_rounds(*said)) for said in (one, other)]
    assert_reruns(changed(*keys), set(), f"{other} after {one}")


def imported(path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's regulariser, out of a file that says `source`."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("users_own", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "users_own", module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # sources of one length and second look the same to Python
    spec.loader.exec_module(module)
    return module.Own(name="own")


OWN = """
from steer_heal.reg import Regulariser

class Own(Regulariser):
    def decay_factor(self, lr: float, lr_sum: float) -> float:
        return 0.9
"""


def test_a_users_regulariser_is_another_once_its_source_changes(
    baseline: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the same file again, and with another number in it; the heal reruns and what follows."""
    sources = (OWN, OWN, OWN.replace("0.9", "0.8"))
    own = [imported(tmp_path / "users_own.py", source, monkeypatch) for source in sources]
    prints = []
    for option, source in zip(own, sources, strict=True):
        imported(tmp_path / "users_own.py", source, monkeypatch)
        prints.append(fingerprint(option))
    assert prints[0] == prints[1] != prints[2], f"fingerprints {prints}"
    keys = [replayed(baseline, tmp_path, two_rounds().model_copy(update={"reg": option})) for option in own]
    assert_reruns(changed(keys[0], keys[1]), set(), "the same source")
    assert_reruns(changed(keys[0], keys[2]), affected(HEAL), "another source")
