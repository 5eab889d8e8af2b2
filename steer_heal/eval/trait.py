"""The trait, as contrastive log-odds of whole answers.

    mean over probes of  log p(a+) / |a+|  -  log p(a-) / |a-|

under the neutral system message, without the end token, nats/token. A small model puts almost no mass on lettered
options; the likelihood of whole answers carries the signal. Both terms are kept, so that a shift by one answer growing
likelier can be told from one by the other growing unlikelier.
"""

from __future__ import annotations

from typing import Literal

from steer_heal.batch import Pair, score
from steer_heal.eval import Evaluation, Subject
from steer_heal.model import chat_ids, text_ids
from steer_heal.runtime import Runtime
from steer_heal.trait import Trait


class TraitLogOdds(Evaluation):
    """Gives `trait`, and its terms `trait_for` and `trait_against`."""

    name: Literal["trait"]

    def measure(self, subject: Subject, trait: Trait, runtime: Runtime) -> dict[str, float]:
        base = subject.student.base
        pairs = [
            Pair(chat_ids(base.tokenizer, trait.neutral, probe.prompt), text_ids(base.tokenizer, answer))
            for answers in ("trait", "counter")
            for probe, answer in ((probe, getattr(probe, answers)) for probe in trait.probes)
        ]
        with subject.view() as model:
            found = score(model, pairs, pad_id=base.pad_id, micro_batch=runtime.score_batch, what="trait")
        means = [float(values.mean()) for values in found]
        n = len(trait.probes)
        towards, against = sum(means[:n]) / n, sum(means[n:]) / n
        return {"trait": towards - against, "trait_for": towards, "trait_against": against}
