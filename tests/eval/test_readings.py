"""What models make of answers, computed once, against passes of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toys import adapter, preset, runtime
from torch import Tensor

from steer_heal.artifacts import Completions, SteeringVector
from steer_heal.eval import Readings
from steer_heal.filter import likelihoods
from steer_heal.generate import generate
from steer_heal.lm.base import Base, body
from steer_heal.lm.kl import answer_states
from steer_heal.lm.student import Student, Subject
from steer_heal.store import Lazy, Store

TRAIT = preset().trait
PERSONAS = (TRAIT.positive, TRAIT.negative)
PUSH = SteeringVector((1,), torch.linspace(-3, 3, 32)[None], (1.0,), key="made-up")
PERSONA = SteeringVector((), torch.empty(0, 32), (), system=TRAIT.positive)


@pytest.fixture(scope="module")
def second_round(tiny: Base) -> Student:
    return Student(tiny).learn(adapter(tiny, 1, size=0.2))


def said(subject: Subject, **how: Any) -> Completions:
    """Six answers of at most 20 tokens, some of which end by themselves."""
    sampling = preset().generate.model_copy(update={"max_new_tokens": 20, "n_samples": 2, "temperature": 2.0})
    return generate(
        sampling, subject.student, TRAIT.neutral, TRAIT.held_out[:3], subject.vector, [subject.dose], 3, 0, True,
        runtime=runtime(**how),
    )  # fmt: skip


def subjects(student: Student) -> dict[str, Subject]:
    return {"plain": Subject(student), "steered": Subject(student, PUSH, 0.7), "told": Subject(student, PERSONA, 1.0)}


@pytest.mark.parametrize("who", ["plain", "steered", "told"])
@pytest.mark.parametrize("batch", [2, 100])
def test_generation_hands_on_the_states_of_its_answers(
    second_round: Student, who: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: a pass over the finished answers."""
    monkeypatch.setitem(vars(second_round.base), "end_ids", frozenset(range(0, 400, 7)))
    subject = subjects(second_round)[who]
    answers = said(subject, generate_batch=batch)
    assert answers.states is not None
    assert len({len(row.ids) for row in answers.rows}) > 1, "this test needs rows that leave early"
    expected = answer_states(subject, answers, runtime=runtime())
    for i, (one, other) in enumerate(zip(answers.states.states, expected.states, strict=True)):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4, msg=lambda m: f"answer {i}: {m}")


def test_states_are_stored_with_the_answers(second_round: Student, tmp_path: Path) -> None:
    answers = said(Subject(second_round))
    answers.save(tmp_path)
    loaded = Completions.load(tmp_path)
    assert loaded == answers
    assert loaded.states is not None
    assert answers.states is not None
    assert all(map(torch.equal, loaded.states.states, answers.states.states))


def test_answers_without_states_are_run(second_round: Student) -> None:
    subject = Subject(second_round)
    answers = said(subject)
    plain = Completions(answers.rows)
    found = Readings.of(subject, plain, PERSONAS, partial, runtime=runtime()).own()
    expected = Readings.of(subject, answers, PERSONAS, partial, runtime=runtime()).own()
    for one, other in zip(found.states, expected.states, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("who", ["plain", "steered", "told"])
def test_readings_are_of_the_models_they_name(second_round: Student, who: str) -> None:
    """Reference: passes of each model of its own, under its own system message."""
    subject = subjects(second_round)[who]
    answers = said(subject)
    found = Readings.of(subject, answers, PERSONAS, partial, runtime=runtime())
    for name, one in (("unsteered", Subject(second_round)), ("base", Subject(second_round.pristine()))):
        expected = answer_states(one, Completions(answers.rows), runtime=runtime())
        assert_close(getattr(found, name)().states, expected.states, name)
    plain = likelihoods(answers, second_round.pristine(), PERSONAS, runtime=runtime())
    assert_close(found.likelihoods().logprobs, plain.logprobs, "log-probabilities under base")
    assert found.likelihoods().trait == pytest.approx(plain.trait, abs=1e-5)


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4, msg=lambda m: f"{what}, answer {i}: {m}")


def test_in_the_first_round_nothing_is_run_twice(tiny: Base, tmp_path: Path) -> None:
    """Reference: the stages that a store computes. Base is the unsteered student, and its answers need no pass."""
    student, store = Student(tiny), Store(tmp_path)
    for subject, passes in ((Subject(student), 0), (Subject(student, PUSH, 0.7), 1)):
        answers = store(
            generate, preset().generate, student, TRAIT.neutral, TRAIT.held_out[:3], subject.vector, [subject.dose],
            3, 0, True, runtime=runtime(),
        )  # fmt: skip
        store.computed.clear()
        found = Readings.of(subject, answers, PERSONAS, partial(Lazy, store), runtime=runtime())
        for _ in range(2):
            found.own(), found.unsteered(), found.base(), found.likelihoods()
        assert store.computed == ["lm.kl.answer_states"] * passes + ["filter.likelihoods"]


def test_likelihoods_run_base_for_the_personas_alone(tiny: Base) -> None:
    """Reference: the texts that go through the body; those under the neutral message are known."""
    answers, asked = said(Subject(Student(tiny))), list[tuple[int, ...]]()
    found = Readings.of(Subject(Student(tiny)), answers, PERSONAS, partial, runtime=runtime())

    def look(_module: Any, _inputs: Any, how: dict[str, Any]) -> None:
        asked.append(tuple(how["input_ids"][0, :12].tolist()))

    hook = body(tiny.model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        found.likelihoods()
    finally:
        hook.remove()
    first = {persona: tiny.chat.prompt(persona, "x")[:12] for persona in (*PERSONAS, TRAIT.neutral)}
    assert first[TRAIT.neutral] not in asked
    assert set(asked) == {first[persona] for persona in PERSONAS}
