"""Stages of the loop: one method per arrow of its diagram, each through the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from loguru import logger

from steer_heal.artifacts import Adapter, Completions, Likelihoods, Metrics, Row, States, SteeringVector
from steer_heal.dose import DoseSearch
from steer_heal.eval import EvalInput, Readings, Who, evaluate
from steer_heal.experiment import Experiment
from steer_heal.filter import apply_filters, likelihoods, require
from steer_heal.generate import generate
from steer_heal.heal import heal
from steer_heal.heal.drift import Drift, drift
from steer_heal.heal.reference import Targets, reference_states
from steer_heal.lm.kl import steering_kl
from steer_heal.lm.student import Student, Subject
from steer_heal.match import Frontier, GatedStudent
from steer_heal.model import load
from steer_heal.reg import Regulariser
from steer_heal.reg.nll import Nll
from steer_heal.result import Evaluated
from steer_heal.steer import Teacher, extract
from steer_heal.store import Lazy, Store
from steer_heal.system.terminal import within

FIRST_TRIAL = 500_000  # number of a trial's first row: trials share no noise with rows that are trained on


@dataclass(frozen=True)
class HealTask:
    """Data and reference of a round's training: the same for every regulariser that is tried on it."""

    student: Student
    reference: Lazy[States]
    targets: Targets
    train: Completions
    validation: Completions
    seed: int


class Stages:
    """The stages of one experiment, bound to its options, store and runtime.

    Raises ConfigError for options that do not fit the model, before anything is generated.
    """

    def __init__(self, exp: Experiment, store: Store) -> None:
        self.exp, self.store, self.runtime = exp, store, exp.runtime
        self.personas, self.base = (exp.trait.positive, exp.trait.negative), Student(load(exp.model), seed=exp.seed)
        self.contexts = exp.contexts.draw(exp.seed)
        self.prompts = exp.trait.draw(exp.generate.n_prompts, exp.seed)
        exp.check_model()

    @contextmanager
    def round(self, k: int) -> Iterator[None]:
        """Name the round in log and bars as long as it lasts; at its end log what the store served of it."""
        with within(f"round {k}"):
            try:
                yield
            finally:
                self.store.log_served()

    def extract(self, student: Student, teacher: Teacher) -> SteeringVector:
        """The steering vector of a student."""
        return self.store(extract, teacher, student, self.personas, self.contexts, runtime=self.runtime)

    def find_doses(self, student: Student, vector: SteeringVector, seed: int) -> DoseSearch:
        """The doses of a round, and the search that found them. Raises NoDose."""
        if not self.exp.steer.has_strength:
            return DoseSearch((1.0,) * self.exp.dose.count())
        return self.exp.dose.find(Trials(self, student, vector, seed))

    def generate(self, student: Student, vector: SteeringVector, doses: Sequence[float], seed: int) -> Completions:
        """Filtered answers to the training prompts, in at most 1 + `heal.top_ups` batches. Raises TooFew."""
        exp, trait, parts = self.exp, self.exp.trait, list[Completions]()
        wanted = exp.heal.n_keep or exp.heal.min_train
        while True:
            drawn = sum(len(part.rows) for part in parts)
            with within(f"batch {len(parts) + 1}"):
                parts.append(
                    self.store(
                        generate, exp.generate, student, trait.neutral, self.prompts, vector, doses, seed, drawn,
                        runtime=self.runtime,
                    )
                )  # fmt: skip
                filtered = self.filter(parts, exp.heal.n_keep, seed)
            passed = len(filtered.passed())
            if passed >= wanted or len(parts) > exp.heal.top_ups:
                break
            logger.info("{} of {} answers pass, {} wanted: drawing another batch", passed, len(filtered.rows), wanted)
        require(filtered, exp.heal.min_train, exp.heal.max_len)
        if passed < wanted:
            logger.warning("{} answers in {} batches pass, {} wanted: training on fewer", passed, len(parts), wanted)
        return filtered

    def filter(self, parts: Sequence[Completions], n_keep: int | None, seed: int) -> Completions:
        """The completions of several batches with every filter's outcome, up to `n_keep` of them kept."""
        scored = [self.store(likelihoods, part, self.base, self.personas, runtime=self.runtime) for part in parts]
        return self._filtered(parts, scored, n_keep, seed)

    def _filtered(
        self, parts: Sequence[Completions], scored: Sequence[Likelihoods], n_keep: int | None, seed: int
    ) -> Completions:
        return self.store(apply_filters, self.exp.filter, parts, scored, self.exp.trait.narration, n_keep, seed)

    def evaluate(
        self, who: Who, student: Student, train: Completions | None = None, vector: SteeringVector | None = None,
        drift: Drift | None = None,
    ) -> Evaluated:  # fmt: skip
        """Answers and figures of a student; if there is a vector, steered at the mean dose of the training data."""
        exp, trait = self.exp, self.exp.trait
        dose = train.mean_dose() if vector is not None and train is not None else 0.0
        found: dict[str, Metrics] = {}
        with within(who):
            answers = self.store(
                generate, exp.generate, student, trait.neutral, trait.held_out, vector, [dose], exp.seed, 0, True,
                runtime=self.runtime,
            )  # fmt: skip
            subject, later = Subject(student, vector, dose), partial(Lazy, self.store)
            readings = Readings.of(subject, answers, self.personas, later, runtime=self.runtime)
            given = EvalInput(who, trait, subject, answers, train, drift, readings)
            for name, option in exp.eval.items():
                if who in option.models:
                    found[name] = self.measure(name, given)
        return Evaluated(given, found)

    def measure(self, name: str, given: EvalInput) -> Metrics:
        """One evaluation of a subject."""
        option = self.exp.eval[name]
        with within(name):
            return self.store(evaluate, option, given.subject, option.material(given), runtime=self.runtime)

    def target(self, base: Evaluated, steered: Evaluated) -> float | None:
        """The trait gain to match at, nats/token; None if nothing is matched."""
        return self.exp.match.target(steered.values["trait"] - base.values["trait"])

    def match(self, healed: Evaluated, base: Evaluated, target: float | None) -> Frontier | None:
        """The healed student's frontier, and its trait and damage at the gate where its trait gain is `target`."""
        if target is None:
            return None
        return self.exp.match.find(Gates(self, healed.given, base.values["trait"]), target)

    def heal_task(self, student: Student, train: Completions, held_out: Evaluated, seed: int) -> HealTask:
        """Training and validation data of a round, and the reference that its divergences are measured against."""
        anchor = self.base if self.exp.heal.reference == "base" else student
        with within("held-out"):
            validation = self._filtered([held_out.answers], [held_out.given.readings.likelihoods()], None, seed)
        targets = Targets.of(train.kept(), self.exp.heal.max_len)
        reference = Lazy(self.store, reference_states, anchor, targets, runtime=self.runtime)
        return HealTask(student, reference, targets, train, validation, seed)

    def fix_tau(self, reg: Regulariser, task: HealTask) -> Regulariser:
        """The regulariser with its tau in nats: `p75` is that percentile of what training without a barrier reaches."""
        if reg.percentile is None:
            return reg
        logger.info("tau: training without a barrier first, to measure its divergences")
        with within("tau"):
            _, free = self.heal(Nll(name="nll"), task, log=lambda _: None)
        return reg.with_tau_from(free.per_text("barrier", self.exp.heal.agg))

    def heal(self, reg: Regulariser, task: HealTask, log: Callable[[Row], None]) -> tuple[Adapter, Drift]:
        """The adapter that a round learns, and its drift from the reference. Raises HealError."""
        adapter = self.store(
            heal, self.exp.heal, self.exp.lora, reg, task.student, task.reference, task.train, task.validation,
            task.seed, runtime=self.runtime, log=log,
        )  # fmt: skip
        healed = task.student.learn(adapter)
        divergence = self.exp.reg.distance()
        return adapter, self.store(drift, healed, task.reference, task.targets, divergence, runtime=self.runtime)


@dataclass(frozen=True)
class Gates:
    """A healed student at any gate, for `Match.find`."""

    stages: Stages
    given: EvalInput  # the student's
    zero: float  # base's trait

    def gain(self, gate: float) -> float:
        return self._measure("trait", gate).values["trait"] - self.zero

    def student(self, gate: float) -> GatedStudent:
        found = {name: self._measure(name, gate) for name in ("trait", "damage")}
        return GatedStudent(gate, found["trait"].values["trait"] - self.zero, found)

    def _measure(self, name: str, gate: float) -> Metrics:
        student = Subject(self.given.subject.student.gated(gate))
        with within(f"gate {gate:.3g}"):
            return self.stages.measure(name, replace(self.given, subject=student))


@dataclass(frozen=True)
class Trials:
    """Answers to every training prompt at one dose, for `Dose.find`."""

    stages: Stages
    student: Student
    vector: SteeringVector
    seed: int

    def pass_rate(self, dose: float, samples: int) -> float:
        """Share of the answers that pass every filter; every prompt has the same number of answers."""
        with within(f"dose {dose:.3g}"):
            filtered = self.stages.filter([self._answers(dose, samples)], None, self.seed)
        return len(filtered.passed()) / len(filtered.rows)

    def divergence(self, dose: float, samples: int) -> float:
        """95th percentile over positions of KL(steered || unsteered), nats."""
        with within(f"dose {dose:.3g}"):
            subject, answers = Subject(self.student, self.vector, dose), self._answers(dose, samples)
            return self.stages.store(steering_kl, subject, answers, runtime=self.stages.runtime).values["kl_p95"]

    def _answers(self, dose: float, samples: int) -> Completions:
        exp, stages = self.stages.exp, self.stages
        return stages.store(
            generate, exp.generate.model_copy(update={"n_samples": samples}), self.student, exp.trait.neutral,
            stages.prompts, self.vector, [dose], self.seed, FIRST_TRIAL, runtime=stages.runtime,
        )  # fmt: skip
