"""Text quality of a model's answers to the held-out prompts.

`ppl` and `kl_base` are measured against base: for a barrier that is tied to base they are circular, so they are shown
but are no verdict. `coherence` is the share of answers that neither loop nor fall apart by the two limits below.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from steer_heal.artifacts import Completions
from steer_heal.eval import Evaluation
from steer_heal.filter.repetition import repetition
from steer_heal.lm.kl import token_kl
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime
from steer_heal.trait import Trait


class Text(Evaluation, key="steer_heal.eval.text.Text"):
    """Gives `ppl`, `repetition`, `coherence`, `kl_base` (KL(subject || base) on its own samples, nats) and `length`."""

    name: Literal["text"]
    max_perplexity: float = Field(gt=1)  # of an answer under base, to count as coherent
    max_repetition: float = Field(ge=0, le=1)  # share of repeated n-grams

    def material(self, trait: Trait, answers: Completions) -> Completions:
        return answers

    def measure(self, subject: Subject, material: Completions, runtime: Runtime) -> dict[str, float]:
        rows = material.rows
        scored, divergences = token_kl(subject, Subject(subject.student.pristine()), rows, runtime, "text")
        nll, kl = [-float(s.mean()) for s in scored], [float(d.mean()) for d in divergences]
        repeats = [repetition(row.text) for row in rows]
        coherent = [
            math.log(self.max_perplexity) >= a and self.max_repetition >= b for a, b in zip(nll, repeats, strict=True)
        ]
        n = len(rows)
        return {
            "ppl": math.exp(min(80.0, sum(nll) / n)),
            "repetition": sum(repeats) / n,
            "coherence": sum(coherent) / n,
            "kl_base": sum(kl) / n,
            "length": sum(len(row.ids) for row in rows) / n,
        }
