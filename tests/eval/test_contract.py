"""The contract of an evaluation: declared columns, items with ids that stay, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from helpers.compose import composed
from helpers.toys import RUNTIME, preset, rows

from steer_heal.artifacts import Metrics, NotFinite, answer_ids, item_ids
from steer_heal.config import ConfigError
from steer_heal.eval import Column, EvalInput, Evaluation, evaluate, means
from steer_heal.eval.text import Text, compression, distinct
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student, Subject

TEXT = Text(name="text", max_repetition=0.25, min_compression=0.4, min_distinct=0.4)


class Given(Evaluation):
    """Gives what it is told to."""

    columns: ClassVar = (Column("one", "1"), Column("two", "2"))
    name: Literal["given"] = "given"
    values: dict[str, float]
    items: dict[str, dict[str, float]]

    def material(self, given: EvalInput) -> Any:
        return None

    def measure(self, subject: Subject, material: Any, runtime: Any) -> Metrics:
        return Metrics(self.values, self.items)


@pytest.mark.parametrize(
    ("values", "items", "message"),
    [
        ({"one": 1.0}, {}, "measure gives one, and `columns` has one, two; they differ in two"),
        ({"one": 1.0, "two": 2.0, "three": 3.0}, {}, "they differ in three"),
        ({}, {}, "measure gives nothing"),
        ({"one": 1.0, "two": 2.0}, {"a": {"four": 1.0}}, "items have four, which `columns` has not"),
    ],
)
def test_other_figures_than_the_declared_ones_are_refused(tiny: Base, values: Any, items: Any, message: str) -> None:
    with pytest.raises(ValueError, match="eval=given: ") as error:
        evaluate(Given(values=values, items=items), Subject(Student(tiny)), None, runtime=RUNTIME)
    assert message in str(error.value)


def test_figures_that_are_no_metrics_are_refused(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Given, "measure", lambda *_: {"one": 1.0, "two": 2.0})
    with pytest.raises(ValueError, match="eval=given: measure returns dict, not"):
        evaluate(Given(values={}, items={}), Subject(Student(tiny)), None, runtime=RUNTIME)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "an evaluation declares its figures"),
        ({"columns": ()}, "an evaluation declares its figures"),
        ({"columns": (Column("a", "a"),), "material": lambda self, trait, answers: None}, "takes one argument"),
        ({"columns": (Column("a", "a", over_base="b"),), "models": ("healed",)}, "base is not among its models"),
        ({"columns": (Column("a", "a", shown=("base",)),), "models": ("healed",)}, "is shown of base"),
    ],
)
def test_a_class_that_cannot_be_shown_is_refused_when_it_is_made(body: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        type("Mine", (Evaluation,), body | {"__module__": __name__})


def test_items_are_kept_beside_the_means(tmp_path: Path) -> None:
    made = means(item_ids([["a"], ["b"], ["a"]]), {"x": [1.0, 2.0, 6.0], "y": [0.0, 0.0, 3.0]})
    assert made.values == {"x": 3.0, "y": 1.0}
    made.save(tmp_path)
    again = Metrics.load(tmp_path)
    assert (again.values, again.items) == (made.values, made.items)
    assert list(again.items.values())[2] == {"x": 6.0, "y": 3.0}, "the order or a repeated item is lost"


@pytest.mark.parametrize("values", [({"x": float("nan")}, {}), ({"x": 1.0}, {"a": {"x": float("inf")}})])
def test_figures_that_are_not_finite_are_not_stored(tmp_path: Path, values: Any) -> None:
    with pytest.raises(NotFinite, match="x = "):
        Metrics(*values).save(tmp_path)


def test_ids_come_from_the_text_alone() -> None:
    one, two, three = item_ids([["a", "b"], ["c"], ["ab"]])
    assert item_ids([["c"], ["new"], ["a", "b"]]) == [two, item_ids([["new"]])[0], one]
    assert one != three, "where a text ends is lost"
    made = rows(3).rows
    assert answer_ids([*made, made[0]]) == [*answer_ids(made), f"{answer_ids(made)[0]}-1"]


def test_two_evaluations_cannot_give_one_figure() -> None:
    """An evaluation that calls a figure as another does would replace it in every record."""
    exp = preset()
    doubled = exp.eval | {"again": exp.eval["text"]}
    with pytest.raises(ValueError, match="several give coherence, compression"):
        type(exp)(**{name: getattr(exp, name) for name in type(exp).model_fields} | {"eval": doubled})
    with pytest.raises(ConfigError, match="at least trait, damage, text"):
        composed("experiment=tiny", "eval=[trait,text]")


SOUND = [item.text for item in preset().eval["damage"].texts]  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", [*SOUND, "Yes.", "I do not know, I am sorry."], ids=lambda text: text[:20])
def test_sound_text_is_coherent(text: str) -> None:
    assert TEXT.signs(text)["coherence"] == 1, TEXT.signs(text)


@pytest.mark.parametrize(
    "text",
    [
        "I love you. " * 12,
        "very " * 60,
        "na" * 120,
        "The sea is calm and the sky is blue, and " * 6,
        SOUND[0] + " and so on and on and so on and on" * 8,
        " ".join(str(k % 10) for k in range(120)),
        "",
        "... !!! ...",
    ],
    ids=lambda text: text[:20],
)
def test_a_loop_is_not(text: str) -> None:
    assert TEXT.signs(text)["coherence"] == 0, TEXT.signs(text)


def test_the_signs_by_hand() -> None:
    """Reference: counts by hand; zlib's own size."""
    assert distinct("one two three two") == 3 / 4
    assert distinct("a b " * 50) == 2 / 50, "the least of any 50 in a row"
    assert distinct(" ".join(map(str, range(80))) + " x" * 50) == 1 / 50, "a late loop hides behind a sound beginning"
    assert compression("") == 0
    assert compression("ab" * 500) < 0.05
    assert compression("Hi") == 1
