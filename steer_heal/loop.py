"""The whole loop: steer, filter, heal, evaluate, fold the adapter in, and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from loguru import logger

from steer_heal.artifacts import Adapter, Completion, Completions, Row, SteeringVector
from steer_heal.dose import NoDose
from steer_heal.eval import Subject, evaluate
from steer_heal.experiment import Experiment
from steer_heal.filter import TooFew
from steer_heal.generate import generate
from steer_heal.heal import HealError, heal
from steer_heal.heal.drift import Drift, drift
from steer_heal.heal.reference import Targets, reference_states
from steer_heal.lm.kl import strength
from steer_heal.lm.student import Student
from steer_heal.model import load
from steer_heal.reg import Barrier, Regulariser
from steer_heal.reg.nll import Nll
from steer_heal.report.diagnostics import CurveLog, check, places
from steer_heal.report.round_log import tell_search, tell_vector
from steer_heal.stages import Supply
from steer_heal.steer import extract
from steer_heal.store import Later, Store
from steer_heal.system.terminal import within
from steer_heal.tracker.wandb import Tracker

PERSONS = ("base", "steered", "healed")


@dataclass
class Result:
    """What a run found: one row of figures a round, the adapters, and answers to show."""

    rounds: list[Row] = field(default_factory=list)
    adapters: list[Adapter] = field(default_factory=list)
    answers: list[dict[str, list[Completion]]] = field(default_factory=list)  # of each round, by person
    drifts: list[Drift] = field(default_factory=list)  # of each round
    collapsed: bool = False  # whether the last round fell below the coherence floor
    stopped: str = ""  # why it ended before its last round

    @property
    def best(self) -> int:
        """The round with the highest trait gain minus damage, both in nats/token; not one that fell apart."""
        score = [row["healed/trait"] - row["base/trait"] - row["healed/damage"] for row in self.rounds]
        whole = range(len(score) - 1 if self.collapsed and len(score) > 1 else len(score))
        return max(whole, key=lambda k: score[k])


def run(exp: Experiment, store: Store, tracker: Tracker) -> Result:
    """Run every round of one cell. Raises ConfigError.

    Raises TooFew, NoDose or HealError when the first round cannot be trained. A later one that cannot ends the run with
    what the earlier ones found.
    """
    trait, how, base = exp.trait, {"runtime": exp.runtime}, load(exp.model)
    exp.fit()  # what this model has no place for is refused now, not after it has generated
    personas, pristine, result = (trait.positive, trait.negative), Student(base), Result()
    supply = Supply(exp, store, pristine)

    def examined(who: Student, vector: SteeringVector | None = None, dose: float = 0.0) -> tuple[Completions, Row]:
        subject, row = Subject(who, vector, dose), Row()
        answers = store(generate, exp.generate, who, trait.neutral, trait.held_out, vector, [dose], exp.seed, **how)
        for option in exp.eval.values():
            row |= store(evaluate, option, subject, option.material(trait, answers), **how).values
        return answers, row

    student, teacher, reg = pristine, exp.steer, exp.reg
    first: SteeringVector | None = None

    def steer(k: int) -> tuple[SteeringVector, Completions, float]:
        """The vector of a round, its completions with what is kept of them, and the mean dose of those."""
        vector = store(extract, teacher, student, personas, exp.contexts, **how)
        seed = exp.seed + 1000 * (k + 1)
        tell_vector(k, vector, first or vector, tracker)
        try:
            found = supply.doses(student, vector, seed)
        except NoDose as error:
            tell_search(k, error.found, tracker)
            raise
        tell_search(k, found, tracker)
        sifted = supply.completions(student, vector, found.doses, seed)
        return vector, sifted, sum(row.dose for row in sifted.kept()) / len(sifted.kept())

    def healed(
        k: int, reg: Regulariser, student: Student, sifted: Completions, held_out: Completions
    ) -> tuple[Regulariser, Adapter, Drift]:
        """The regulariser with its tau settled, what it learned, and how far that strayed."""
        seed, anchor = exp.seed + 1000 * (k + 1), pristine if exp.heal.reference == "base" else student
        validation, targets = supply.judged([held_out], None, seed), Targets.of(sifted.kept(), exp.heal.max_len)
        reference = Later(store, reference_states, anchor, targets, **how)

        def trained(reg: Regulariser, log: Callable[[Row], None]) -> tuple[Adapter, Drift]:
            given = (student, reference, sifted, validation, seed)
            adapter = store(heal, exp.heal, exp.lora, reg, *given, log=log, **how)
            return adapter, store(drift, student.learn(adapter), reference, targets, exp.reg.distance(), **how)

        if reg.percentile is not None:
            logger.info("tau: training without a barrier, to see how far that goes")
            _, free = trained(Nll(name="nll"), lambda _: None)
            reg = reg.settle(free.per_text("barrier", exp.heal.agg))
        if exp.reg.percentile is not None and isinstance(reg, Barrier):
            logger.info("tau is {:.3g} nats, {} of training without a barrier", reg.limit, f"p{exp.reg.percentile:g}")
        done, steps = sum(len(a.curve) for a in result.adapters), exp.heal.total_steps(len(targets.pairs))
        curve = CurveLog(reg, steps, tracker, offset=done)
        adapter, strayed = trained(reg, curve)
        curve.replay(adapter)
        for sentence in [*check(adapter, reg), *places(strayed)]:
            logger.info("  {}", sentence)
        return reg, adapter, strayed

    answers, figures = dict[str, Completions](), dict[str, Row]()
    answers["base"], figures["base"] = examined(student)
    for k in range(exp.n_rounds):
        with within(f"round {k}"):
            try:
                vector, sifted, dose = steer(k)
                answers["steered"], figures["steered"] = examined(student, vector, dose)
                steered = Subject(student, vector, dose)
                figures["steered"] |= store(strength, steered, answers["steered"], **how).values
                reg, adapter, strayed = healed(k, reg, student, sifted, answers["steered"])
            except (TooFew, NoDose, HealError) as error:
                if not result.rounds:
                    raise
                result.stopped = f"round {k}: {error}"
                break
            student = student.learn(adapter)
            answers["healed"], figures["healed"] = examined(student)
            first, teacher = first or vector, teacher.settle(vector)
            row = _row(k, figures, adapter) | _steering(vector, first, sifted, dose) | strayed.summary()
            if isinstance(reg, Barrier):
                row["tau"] = reg.limit
        tracker.log({f"round/{name}": value for name, value in row.items()})
        tracker.histogram(f"divergence/round {k}", strayed.of("kl_rev").tolist())
        result.rounds.append(row)
        result.adapters.append(adapter)
        result.drifts.append(strayed)
        result.answers.append({who: list(answers[who].rows) for who in PERSONS})
        logger.info("round {}: {}", k, _sentence(row))
        if row["healed/coherence"] < exp.min_coherence:
            result.collapsed = True
            result.stopped = f"round {k}: coherence {row['healed/coherence']:.0%} is under {exp.min_coherence:.0%}"
            break
    if result.stopped:
        logger.warning("stopped early, {}", result.stopped)
    logger.info("best round: {} (highest trait gain minus damage)", result.best)
    return result


def _sentence(row: Row) -> str:
    names = ("trait", "damage", "coherence")
    return "; ".join(" ".join([who, *(f"{name} {row[f'{who}/{name}']:.2f}" for name in names)]) for who in PERSONS)


def _row(k: int, figures: dict[str, Row], adapter: Adapter) -> Row:
    """Everything that the evaluations and the heal found, with text nll also as damage over base."""
    row: Row = {"index": k}
    for who, values in figures.items():
        row |= {f"{who}/{name}": value for name, value in values.items()}
        for part in ("", "_raw", "_turn"):
            row[f"{who}/damage{part}"] = values[f"text_nll{part}"] - figures["base"][f"text_nll{part}"]
    row["kl_base"] = figures["healed"]["kl_base"]
    return row | {name if name.startswith("heal_") else f"heal_{name}": v for name, v in adapter.summary.items()}


def _steering(vector: SteeringVector, first: SteeringVector, sifted: Completions, dose: float) -> Row:
    """What was steered with, and log p(y | positive persona) - log p(y | negative persona) of the kept and dropped."""
    found: Row = {
        "generated": len(sifted.rows), "passed": len(sifted.passed()), "kept": len(sifted.kept()), "dose": dose,
    }  # fmt: skip
    if vector.layers:
        n = len(vector.layers)
        found |= {"vector_norm": sum(vector.norms()) / n, "vector_snr": sum(vector.snr) / n}
        found["cos_v0"] = vector.cosine(first)
    for name, some in (("kept", sifted.kept()), ("dropped", [row for row in sifted.rows if row.reasons])):
        if some:
            found[f"{name}_trait"] = sum(row.scores["trait"] for row in some) / len(some)
    return found
