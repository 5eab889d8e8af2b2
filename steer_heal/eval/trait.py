"""The trait, as contrastive log-odds of whole answers.

    mean over probes of  log p(a+) / |a+|  -  log p(a-) / |a-|

under the neutral system message, without the end token, nats/token. A small model puts almost no mass on lettered
options; the likelihood of whole answers carries the signal. Both terms are kept, so that a shift by one answer growing
likelier can be told from one by the other growing unlikelier.
"""

from __future__ import annotations

from typing import Literal

from steer_heal.artifacts import Completions
from steer_heal.eval import Evaluation, Subject
from steer_heal.lm.batch import Pair, score
from steer_heal.model import chat_ids, text_ids
from steer_heal.runtime import Runtime
from steer_heal.trait import Probe, Trait


class TraitLogOdds(Evaluation):
    """Gives `trait`, and its terms `trait_for` and `trait_against`."""

    name: Literal["trait"]

    def material(self, trait: Trait, answers: Completions) -> tuple[str, tuple[Probe, ...]]:
        return trait.neutral, trait.probes

    def measure(self, subject: Subject, material: tuple[str, tuple[Probe, ...]], runtime: Runtime) -> dict[str, float]:
        base, (neutral, probes) = subject.student.base, material
        system = subject.told or neutral
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
