"""The trait, as contrastive log-odds of whole answers.

    mean over probes of  log p(a+) / |a+|  -  log p(a-) / |a-|

under the neutral system message, without the end token, nats/token. A small model puts almost no mass on the
letters of multiple-choice options; the likelihood of whole answers carries the signal. Both terms are reported, to show
whether one answer became likelier or the other less likely.
"""

from __future__ import annotations

from typing import Literal

from steer_heal.artifacts import Completions
from steer_heal.eval import Evaluation
from steer_heal.lm.batch import Pair, score
from steer_heal.lm.chat import chat_ids, text_ids
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime
from steer_heal.trait import Probe, Trait


class TraitLogOdds(Evaluation, key="steer_heal.eval.trait.TraitLogOdds"):
    """Gives `trait`, and its terms `trait_for` and `trait_against`."""

    name: Literal["trait"]

    def material(self, trait: Trait, answers: Completions) -> tuple[str, tuple[Probe, ...]]:
        return trait.neutral, trait.probes

    def measure(self, subject: Subject, material: tuple[str, tuple[Probe, ...]], runtime: Runtime) -> dict[str, float]:
        base, (neutral, probes) = subject.student.base, material
        system = subject.system or neutral
        pairs = [
            Pair(chat_ids(base.tokenizer, system, probe.prompt), text_ids(base.tokenizer, answer))
            for answers in ("trait", "counter")
            for probe, answer in ((probe, getattr(probe, answers)) for probe in probes)
        ]
        with subject.view() as model:
            found = score(model, pairs, pad_id=base.pad_id, micro_batch=runtime.score_batch, what="trait")
        means = [float(values.mean()) for values in found]
        n = len(probes)
        towards, against = sum(means[:n]) / n, sum(means[n:]) / n
        return {"trait": towards - against, "trait_for": towards, "trait_against": against}
