"""Evaluations of a model: each is a file with a subclass of `Evaluation`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from steer_heal.artifacts import Completions, Likelihoods, Metrics, Row, States
from steer_heal.config import Config
from steer_heal.filter import likelihoods
from steer_heal.heal.drift import Drift
from steer_heal.lm.batch import Pair
from steer_heal.lm.chat import Chat
from steer_heal.lm.kl import answer_states
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime
from steer_heal.store import stage
from steer_heal.trait import Trait

Who = Literal["base", "steered", "healed"]
MODELS: tuple[Who, ...] = ("base", "steered", "healed")


@dataclass(frozen=True)
class Column:
    """A figure that an evaluation gives: what tables, pictures and trackers know about it.

    An outcome or a damage is shown in the table and the picture, a diagnostic only where `shown` says so.
    """

    name: str
    about: str  # what it is, in one line of the legend
    unit: str = ""  # nats, nats/token, share, tokens; empty for a plain number
    better: Literal["more", "less", "neither"] = "neither"
    role: Literal["outcome", "damage", "diagnostic"] = "diagnostic"
    circular: str = ""  # with what: `base` is a figure that a barrier tied to base improves by itself
    over_base: str = ""  # name of the difference to base's figure, which is then logged and shown
    heading: str = ""  # of the table's column; the name unless given
    shown: tuple[Who, ...] | None = None  # models in the table; None: the healed one, of an outcome or a damage

    @property
    def models_shown(self) -> tuple[Who, ...]:
        return self.shown if self.shown is not None else ("healed",) if self.role != "diagnostic" else ()

    @property
    def label(self) -> str:
        """The name under which it is shown."""
        return self.heading or self.over_base or self.name


@dataclass(frozen=True)
class Spoken:
    """The states with which answers were generated, as if computed."""

    answers: Completions

    def __call__(self) -> States:
        assert self.answers.states is not None
        return self.answers.states


@dataclass(frozen=True)
class Readings:
    """What models make of a subject's answers, computed when first called and shared by all evaluations and filters.

    States are those at the answers' tokens, for `steer_heal.lm.kl.token_kl`.
    """

    own: Callable[[], States]  # of the subject
    unsteered: Callable[[], States]  # of its student, not steered
    base: Callable[[], States]
    likelihoods: Callable[[], Likelihoods]  # under base with the neutral system message and both personas

    @classmethod
    def of(
        cls, subject: Subject, answers: Completions, personas: tuple[str, str], later: Callable[..., Callable[[], Any]],
        *, runtime: Runtime,
    ) -> Self:  # fmt: skip
        """`later` takes a stage and its arguments and returns what computes it: `partial`, or `Lazy` with a store.

        The subject's own states are those of generation, if the answers have them.
        """
        base = subject.student.pristine()

        def of(one: Subject) -> Callable[[], States]:
            if answers.states is not None and one == subject:
                return Spoken(answers)
            return later(answer_states, one, answers, runtime=runtime)

        neutral = of(Subject(base))
        scored = later(likelihoods, answers, base, personas, neutral, runtime=runtime)
        return cls(of(subject), of(Subject(subject.student)), neutral, scored)


@dataclass(frozen=True)
class EvalInput:
    """All that there is to evaluate a model by."""

    who: Who
    trait: Trait
    subject: Subject  # student, vector and dose
    answers: Completions  # of the subject to the held-out prompts
    train: Completions | None  # the round's completions, filtered; None for base
    drift: Drift | None  # of the healed model, over the kept ones; None for the others
    readings: Readings


class Evaluation(Config):
    """Subclasses set `name` and `columns`, and implement both methods."""

    columns: ClassVar[tuple[Column, ...]]
    models: ClassVar[tuple[Who, ...]] = MODELS  # that it evaluates
    name: str

    @classmethod
    def __pydantic_init_subclass__(cls, **given: Any) -> None:
        """Raises TypeError for a class that does not declare its figures, or declares what cannot be shown."""
        super().__pydantic_init_subclass__(**given)
        if not getattr(cls, "columns", ()):
            raise TypeError(
                f"{cls.__name__}: an evaluation declares its figures: columns: ClassVar = (Column(...), ...)"
            )
        if len(inspect.signature(cls.material).parameters) != 2:
            raise TypeError(f"{cls.__name__}.material takes one argument, an EvalInput")
        for column in cls.columns:
            if column.over_base and "base" not in cls.models:
                raise TypeError(f"{cls.__name__}: {column.name} has over_base, and base is not among its models")
            if other := set(column.models_shown) - set(cls.models):
                raise TypeError(f"{cls.__name__}: {column.name} is shown of {', '.join(other)}, not among its models")

    def sequences(self, chat: Chat, trait: Trait, system: str) -> dict[str, Pair]:
        """Return the fixed texts that it scores under a system message, by the place of each in the configuration.

        They are checked against the model before a run starts.
        """
        return {}

    def material(self, given: EvalInput) -> Any:
        """Select what `measure` reads beside the subject.

        It is part of the key: a result depends on it, on the option and on the subject, and on nothing else.
        """
        raise NotImplementedError(type(self))

    def measure(self, subject: Subject, material: Any, runtime: Runtime) -> Metrics:
        """A figure for each of `columns`, and if there are items (probes, texts, answers), theirs by item id."""
        raise NotImplementedError(type(self))


@stage("eval.evaluate")
def evaluate(evaluation: Evaluation, subject: Subject, material: Any, *, runtime: Runtime) -> Metrics:
    """One evaluation of one subject. Raises ValueError for figures other than the declared ones."""
    found = evaluation.measure(subject, material, runtime)
    if not isinstance(found, Metrics):
        raise ValueError(
            f"eval={evaluation.name}: measure returns {type(found).__name__}, not steer_heal.artifacts.Metrics"
        )
    declared, given = {column.name for column in evaluation.columns}, found.values.keys()
    if odd := declared ^ given:
        raise ValueError(
            f"eval={evaluation.name}: measure gives {', '.join(sorted(given)) or 'nothing'}, and `columns` has "
            f"{', '.join(sorted(declared)) or 'none'}; they differ in {', '.join(sorted(odd))}"
        )
    if strange := {name for item in found.items.values() for name in item} - declared:
        raise ValueError(f"eval={evaluation.name}: items have {', '.join(sorted(strange))}, which `columns` has not")
    return found


def means(ids: Sequence[str], columns: Mapping[str, Sequence[float]]) -> Metrics:
    """Metrics whose figures are the plain means of their items'; `columns` holds values in the order of `ids`."""
    items: dict[str, Row] = {i: {} for i in ids}
    for name, values in columns.items():
        for i, value in zip(ids, values, strict=True):
            items[i][name] = value
    return Metrics({name: sum(values) / len(values) for name, values in columns.items()}, items)
