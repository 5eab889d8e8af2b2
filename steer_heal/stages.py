"""What a round learns from: answers at the right doses, judged, and topped up while too few of them are sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loguru import logger

from steer_heal.artifacts import Completions, SteeringVector
from steer_heal.dose import Found
from steer_heal.eval import Subject
from steer_heal.experiment import Experiment
from steer_heal.filter import likelihoods, require, sift
from steer_heal.generate import generate
from steer_heal.lm.kl import strength
from steer_heal.lm.student import Student
from steer_heal.store import Store

FIRST_TRIAL = 500_000  # number of the first row of a trial: its noise is of no row that is learned from


@dataclass(frozen=True)
class Supply:
    """The answers of one cell's rounds."""

    exp: Experiment
    store: Store
    pristine: Student  # whose likelihoods the filters look at

    def judged(self, parts: Sequence[Completions], n_keep: int | None, seed: int) -> Completions:
        """All completions of several batches with what the filters say, and up to `n_keep` of them kept."""
        exp, personas = self.exp, (self.exp.trait.positive, self.exp.trait.negative)
        scored = [self.store(likelihoods, part, self.pristine, personas, runtime=exp.runtime) for part in parts]
        return self.store(sift, exp.filter, parts, scored, exp.trait.narration, n_keep, seed)

    def doses(self, student: Student, vector: SteeringVector, seed: int) -> Found:
        """The doses of a round, and how they were found; nothing to find where they change nothing. Raises NoDose."""
        if not self.exp.steer.has_strength:
            return Found((1.0,) * self.exp.dose.count())
        return self.exp.dose.find(_Trials(self, student, vector, seed))

    def completions(self, student: Student, vector: SteeringVector, doses: Sequence[float], seed: int) -> Completions:
        """Judged answers to the training prompts, in as many batches as it takes. Raises TooFew."""
        exp, trait, parts = self.exp, self.exp.trait, list[Completions]()
        wanted = exp.heal.n_keep or exp.heal.min_train
        given = (exp.generate, student, trait.neutral, trait.generate, vector, doses, seed)
        while True:
            drawn = sum(len(part.rows) for part in parts)
            parts.append(self.store(generate, *given, drawn, runtime=exp.runtime))
            sifted = self.judged(parts, exp.heal.n_keep, seed)
            sound = len(sifted.passed())
            if sound >= wanted or len(parts) > exp.heal.top_ups:
                break
            logger.info("{} of {} answers are sound, {} are wanted: another batch", sound, len(sifted.rows), wanted)
        require(sifted, exp.heal.min_train, exp.heal.max_len)
        if sound < wanted:
            logger.warning("{} sound answers in {} batches, {} were wanted: trains on fewer", sound, len(parts), wanted)
        return sifted


@dataclass(frozen=True)
class _Trials:
    """Answers to every training prompt at one dose, as a search asks for them; kept by the store like all others."""

    supply: Supply
    student: Student
    vector: SteeringVector
    seed: int

    def survival(self, dose: float, samples: int) -> float:
        judged = self.supply.judged([self._answers(dose, samples)], None, self.seed)
        return len(judged.passed()) / len(judged.rows)  # every prompt has as many answers as any other

    def divergence(self, dose: float, samples: int) -> float:
        subject, runtime = Subject(self.student, self.vector, dose), self.supply.exp.runtime
        return self.supply.store(strength, subject, self._answers(dose, samples), runtime=runtime).values["kl_p95"]

    def _answers(self, dose: float, samples: int) -> Completions:
        exp, store = self.supply.exp, self.supply.store
        sampling = exp.generate.model_copy(update={"n_samples": samples})
        asked = (exp.trait.neutral, exp.trait.generate, self.vector, [dose], self.seed, FIRST_TRIAL)
        return store(generate, sampling, self.student, *asked, runtime=exp.runtime)
