"""The teacher that is only prompted, against the model asked under that persona by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compose import composed
from helpers.replay import Recording
from helpers.toys import by_hand, greedy, logits_of, own_loss, preset, runtime
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from steer_heal.artifacts import Completion, Completions, SteeringVector
from steer_heal.dose import DoseSearch
from steer_heal.eval import EvalInput, Evaluation, Readings, evaluate
from steer_heal.generate import generate
from steer_heal.lm.base import Base
from steer_heal.lm.chat import Chat
from steer_heal.lm.kl import steering_kl
from steer_heal.lm.student import Student, Subject
from steer_heal.loop import run
from steer_heal.result import Result
from steer_heal.stages import Stages
from steer_heal.steer import extract
from steer_heal.steer.prompt import Prompt
from steer_heal.store import Store
from steer_heal.tracker import Tracker

EXP = preset("steer=prompt", "dose.alpha=[0.5,1.5]", "heal.n_keep=16", "heal.epochs=1")
TRAIT, SAMPLING = EXP.trait, EXP.generate
PERSONA = SteeringVector((), torch.empty(0, 0), (), system=TRAIT.positive)


def answers(student: Student, system: str, vector: SteeringVector | None, doses: Sequence[float], **how: Any) -> Any:
    sampling = SAMPLING.model_copy(update=how)
    return generate(sampling, student, system, TRAIT.held_out[:3], vector, doses, 5, runtime=runtime()).rows


def evaluated(name: str, subject: Subject, spoken: Completions | None = None) -> dict[str, float]:
    option: Evaluation = EXP.eval[name]
    answers = spoken or Completions(())
    readings = Readings.of(subject, answers, (TRAIT.positive, TRAIT.negative), partial, runtime=runtime())
    material = option.material(EvalInput("healed", TRAIT, subject, answers, None, None, readings))
    return evaluate(option, subject, material, runtime=runtime()).values


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def spoken(second_round: Student) -> Completions:
    """The answers under the persona of a student that has learned something."""
    return Completions(answers(second_round, TRAIT.neutral, PERSONA, [1.0]))


def test_what_it_teaches(tiny: Base) -> None:
    """Reference: the first of the two personas, and nothing else."""
    personas = (TRAIT.positive, TRAIT.negative)
    vector = extract(Prompt(name="prompt"), Student(tiny), personas, EXP.contexts, runtime=runtime())
    assert (vector.layers, vector.snr, vector.system, vector.operation) == ((), (), TRAIT.positive, "add")
    assert vector.directions.shape == (0, 0)
    assert vector.norms() == []


def test_the_artifact_comes_back(tiny: Base, tmp_path: Path) -> None:
    """Reference: itself, from its folder and through a store, where each student's is its own and finds its answers."""
    PERSONA.save(tmp_path)
    back = SteeringVector.load(tmp_path)
    assert (back.layers, back.snr, back.system) == ((), (), TRAIT.positive)
    assert back.directions.shape == (0, 0)
    for _ in range(2):
        store = Store(tmp_path / "store")
        made = store(extract, EXP.steer, Student(tiny), ("Be glad.", "Be cold."), EXP.contexts, runtime=runtime())
        assert (made.system, made.layers) == ("Be glad.", ())
        given = (SAMPLING, Student(tiny), TRAIT.neutral, TRAIT.held_out[:2], made, [1.0], 3)
        first = store(generate, *given, runtime=runtime())
        assert first.rows == generate(*given, runtime=runtime()).rows
    assert store.computed == [], "the second time nothing is computed"


@pytest.mark.parametrize("top_k", [1, 50])
def test_it_answers_as_the_persona_and_is_learned_under_the_neutral_message(second_round: Student, top_k: int) -> None:
    """Reference: the student asked under the persona outright, and what it is asked otherwise."""
    rows = answers(second_round, TRAIT.neutral, PERSONA, [1.0, 1.0], top_k=top_k)
    asked = answers(second_round, TRAIT.positive, None, [1.0, 1.0], top_k=top_k)
    neutral = answers(second_round, TRAIT.neutral, None, [1.0, 1.0], top_k=top_k)
    assert [(row.ids, row.text, row.ended) for row in rows] == [(row.ids, row.text, row.ended) for row in asked]
    assert [row.prompt_ids for row in rows] == [row.prompt_ids for row in neutral]
    assert all(one.ids != other.ids for one, other in zip(rows, neutral, strict=True)), "the persona says the same"
    assert (rows[0].ids == rows[1].ids) == (top_k == 1), "two answers of a prompt are one, or greedy ones are not"


def test_greedy_answers_are_transformers_own(second_round: Student) -> None:
    """Reference: transformers' generate(do_sample=False) after the persona's ids, on weights added by hand."""
    model, base = by_hand(second_round), second_round.base
    for row in answers(second_round, TRAIT.neutral, PERSONA, [1.0], top_k=1):
        asked = base.chat.prompt(TRAIT.positive, row.prompt)
        assert row.ids == greedy(model, asked, SAMPLING.max_new_tokens, sorted(base.end_ids)), row.prompt
        assert row.prompt_ids == base.chat.prompt(TRAIT.neutral, row.prompt)


def test_a_dose_of_0_is_nobody(second_round: Student) -> None:
    """Reference: the neutral message, in one batch with rows under the persona."""
    both = answers(second_round, TRAIT.neutral, PERSONA, [0.0, 1.0])
    neutral = answers(second_round, TRAIT.neutral, None, [0.0, 1.0])
    assert [row.ids for row in both[::2]] == [row.ids for row in neutral[::2]]
    assert all(one.ids != other.ids for one, other in zip(both[1::2], neutral[1::2], strict=True))
    assert Subject(second_round, PERSONA, 0.0).system is None
    assert Subject(second_round, PERSONA, 1.0).system == TRAIT.positive
    assert evaluated("trait", Subject(second_round, PERSONA, 0.0)) == evaluated("trait", Subject(second_round))


@pytest.mark.parametrize("system", [TRAIT.positive, TRAIT.neutral])
def test_trait(second_round: Student, system: str) -> None:
    """Reference: transformers' own loss of each answer, after ids made here, one unpadded sequence at a time."""
    model, tokenizer = by_hand(second_round), second_round.base.tokenizer
    found = evaluated("trait", Subject(second_round, *((PERSONA, 1.0) if system == TRAIT.positive else ())))

    def likely(prompt: str, answer: str) -> float:
        return -own_loss(model, Chat(tokenizer).prompt(system, prompt), Chat(tokenizer).text(answer))

    towards = mean([likely(probe.prompt, probe.trait) for probe in TRAIT.probes])
    against = mean([likely(probe.prompt, probe.counter) for probe in TRAIT.probes])
    assert found["trait_for"] == pytest.approx(towards, abs=1e-4)
    assert found["trait_against"] == pytest.approx(against, abs=1e-4)
    assert found["trait"] == pytest.approx(towards - against, abs=1e-4)


def test_damage(second_round: Student) -> None:
    """Reference: transformers' own loss; raw text has no system message, and so the persona has no part in it."""
    model, tokenizer = by_hand(second_round), second_round.base.tokenizer
    plain, told = (evaluated("damage", Subject(second_round, *how)) for how in ((), (PERSONA, 1.0)))
    texts = EXP.eval["damage"].texts  # type: ignore[attr-defined]
    for system, found in ((TRAIT.neutral, plain), (TRAIT.positive, told)):
        turns = [
            own_loss(model, Chat(tokenizer).prompt(system, sound.request), Chat(tokenizer).text(sound.text))
            for sound in texts
        ]
        assert found["text_nll_turn"] == pytest.approx(mean(turns), abs=1e-4), system
    assert told["text_nll_raw"] == pytest.approx(plain["text_nll_raw"], abs=1e-6)
    assert told["text_nll_turn"] != pytest.approx(plain["text_nll_turn"], abs=1e-3), "the persona changes nothing"


def divergences(student: Student, other: Student, row: Completion) -> Tensor:
    """KL(student under the persona || other under the neutral message) [c] at each token of an answer, by hand."""
    tokenizer = student.base.tokenizer

    def after(model: Any, system: str) -> Categorical:
        asked = Chat(tokenizer).prompt(system, row.prompt)
        logits = logits_of(model, *asked, *row.ids)[len(asked) - 1 : -1]
        return Categorical(logits=logits.double())

    return kl_divergence(after(by_hand(student), TRAIT.positive), after(by_hand(other), TRAIT.neutral))


def test_strength_is_the_divergence_of_the_two_messages(second_round: Student, spoken: Completions) -> None:
    """Reference: torch.distributions on the same answers, unpadded, the same student on both sides."""
    found = steering_kl(Subject(second_round, PERSONA, 1.0), spoken, runtime=runtime()).values
    every = torch.cat([divergences(second_round, second_round, row) for row in spoken.rows])
    assert found["kl_mean"] == pytest.approx(float(every.mean()), rel=1e-4)
    for name, share in (("kl_p50", 0.5), ("kl_p95", 0.95), ("kl_max", 1.0)):
        assert found[name] == pytest.approx(float(every.quantile(share)), rel=1e-4), name
    assert found["kl_mean"] > 0.01, "the persona changes nothing, so this test sees little"
    nobody = steering_kl(Subject(second_round, PERSONA, 0.0), spoken, runtime=runtime()).values
    assert nobody["kl_max"] == pytest.approx(0, abs=1e-6)


def test_text(tiny: Base, second_round: Student, spoken: Completions) -> None:
    """Reference: base asked neutrally, by transformers' own loss; divergence from it by torch.distributions."""
    found = evaluated("text", Subject(second_round, PERSONA, 1.0), spoken)
    neutral = [tiny.chat.prompt(TRAIT.neutral, row.prompt) for row in spoken.rows]
    nll = [own_loss(tiny.model, asked, row.ids) for asked, row in zip(neutral, spoken.rows, strict=True)]
    assert found["ppl"] == pytest.approx(float(torch.tensor(mean(nll)).exp()), rel=1e-3)
    kl = [float(divergences(second_round, Student(tiny), row).mean()) for row in spoken.rows]
    assert found["kl_base"] == pytest.approx(mean(kl), rel=1e-4)
    assert evaluated("text", Subject(second_round), spoken)["kl_base"] != pytest.approx(mean(kl), rel=1e-2)


@pytest.mark.parametrize("dose", ["walk", "iso_kl"])
def test_there_is_no_strength_to_look_for(tiny: Base, store_folder: Path, dose: str) -> None:
    """In a sweep with searched doses it gives as many answers as vectors do, and nothing is tried."""
    exp = composed("experiment=tiny", "steer=prompt", f"dose={dose}")
    student = Student(tiny)
    vector = exp.steer.teach(student, ("Be kind", "Be cold"), exp.contexts, exp.runtime)
    store = Store(store_folder)
    assert Stages(exp, store).find_doses(student, vector, 0) == DoseSearch((1.0,) * 4)
    assert not store.computed, f"tried: {store.computed}"


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Recording, list[dict[str, Any]], list[str]]:
    """A complete run: its result, its stages' artifacts, the rows of metrics.jsonl, and the tables it showed."""
    folder, exp, shown = tmp_path_factory.mktemp("run"), EXP.model_copy(update={"n_rounds": 2}), list[str]()

    class Watched(Tracker):
        def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
            shown.append(key)

    store = Recording(folder / "store", exp)
    with Watched(folder) as tracker:
        result = run(exp, store, tracker)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result, store, rows, shown


def test_each_dose_is_one_more_answer(two_rounds: Any) -> None:
    """Reference: 2 doses and 12 prompts; all answers at a dose of 1, and no two of a prompt drawn by one number."""
    _, store, _, _ = two_rounds
    for k in range(2):
        made = store.made[f"train.filtered {k}"].rows
        prompts = TRAIT.draw(SAMPLING.n_prompts, EXP.seed)
        assert len(made) == 2 * len(prompts) * SAMPLING.n_samples
        assert {row.dose for row in made} == {1.0}
        assert [row.prompt for row in made] == [prompt for prompt in prompts for _ in range(2)]
        assert sum(one.ids == two.ids for one, two in zip(made[::2], made[1::2], strict=True)) < 3
    assert {row.dose for row in store.made["steered.answers 0"].rows} == {1.0}


def test_base_and_healed_are_asked_neutrally(tiny: Base, two_rounds: Any) -> None:
    """Reference: who each of them is, asked under the neutral message without any persona; in the second round too."""
    result, store, _, _ = two_rounds
    student = Student(tiny)
    students = [student]
    for made in [done.adapter for done in result.rounds]:
        students.append(students[-1].learn(made))
    for label, who in zip(("base.answers 0", "healed.answers 0", "healed.answers 1"), students, strict=True):
        rows = generate(SAMPLING, who, TRAIT.neutral, TRAIT.held_out, None, [0.0], EXP.seed, runtime=EXP.runtime).rows
        assert store.made[label].rows == rows, label
    asked = generate(
        SAMPLING, students[1], TRAIT.positive, TRAIT.held_out, None, [1.0], EXP.seed, runtime=EXP.runtime
    ).rows
    assert [row.ids for row in store.made["steered.answers 1"].rows] == [row.ids for row in asked]
    neutral = [tiny.chat.prompt(TRAIT.neutral, row.prompt) for row in asked]
    assert [row.prompt_ids for row in store.made["steered.answers 1"].rows] == neutral
    for row, who in zip(result.rows, students[1:], strict=True):
        assert row["healed/trait"] == pytest.approx(evaluated("trait", Subject(who))["trait"], abs=1e-4)
        assert row["base/trait"] == pytest.approx(evaluated("trait", Subject(students[0]))["trait"], abs=1e-4)
    told = evaluated("trait", Subject(students[1], PERSONA, 1.0))["trait"]
    assert result.rows[1]["steered/trait"] == pytest.approx(told, abs=1e-4)


def test_nothing_is_said_of_a_vector(two_rounds: Any) -> None:
    """Reference: the names of all figures of two rounds; raw damage under a persona is none."""
    result, _, rows, shown = two_rounds
    names = {name for row in rows for name in row}
    assert not [name for name in names if "vector" in name or "cos_v0" in name]
    assert not [name for name in names if name.startswith("dose/")]
    assert not [key for key in shown if key.startswith(("vector", "dose"))]
    assert len(result.rounds) == 2
    for row in result.rows:
        assert row["dose"] == 1.0
        assert row["steered/kl_mean"] > 0
    assert result.rows[0]["steered/damage_raw"] == pytest.approx(0, abs=1e-6)
    assert abs(result.rows[0]["steered/damage_turn"]) > 1e-3
