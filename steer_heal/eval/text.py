"""The text that it writes: its answers to the held-out prompts.

`ppl` and `kl_base` are measured against base: for a barrier that is tied to base they are circular, so they are shown
and never a verdict. `coherence` is the share of answers that neither loop nor fall apart by the two limits below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from steer_heal.artifacts import Completions
from steer_heal.batch import HEAD_POSITIONS, Batch, Pair, by_length, collate, logprobs, states
from steer_heal.eval import Evaluation, Subject
from steer_heal.filter.repetition import repetition
from steer_heal.head import both_divergences
from steer_heal.progress import bar
from steer_heal.runtime import Runtime
from steer_heal.trait import Trait

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Text(Evaluation):
    """Gives `ppl`, `repetition`, `coherence`, `kl_base` (KL(subject || base) on its own samples, nats) and `length`."""

    name: Literal["text"]
    max_perplexity: float = Field(gt=1)  # of an answer under base, to count as coherent
    max_repetition: float = Field(ge=0, le=1)  # share of repeated n-grams

    def material(self, trait: Trait, answers: Completions) -> Completions:
        return answers

    @torch.no_grad()
    def measure(self, subject: Subject, material: Completions, runtime: Runtime) -> dict[str, float]:
        base, rows = subject.student.base, material.rows
        pairs = [Pair(row.prompt_ids, row.ids) for row in rows]
        groups = list(by_length(pairs, runtime.score_batch))
        batches = [collate([pairs[i] for i in group], base.pad_id, base.device) for group in groups]
        nll, kl = [0.0] * len(rows), [0.0] * len(rows)
        with bar("text", 2 * len(rows)) as advance:
            with subject.view() as model:
                own = [self._states(model, batch, advance) for batch in batches]
            with subject.student.pristine().view() as model:
                reference = [self._states(model, batch, advance) for batch in batches]
        for group, batch, mine, fixed in zip(groups, batches, own, reference, strict=True):
            lengths = [len(pairs[i].completion) for i in group]
            scored = logprobs(model, fixed, batch.targets).split(lengths)
            reverse = both_divergences(model, mine, fixed, HEAD_POSITIONS)[1].split(lengths)
            for i, s, d in zip(group, scored, reverse, strict=True):
                nll[i], kl[i] = -float(s.mean()), float(d.mean())
        repeats = [repetition(row.text) for row in rows]
        sound = [
            math.log(self.max_perplexity) >= a and self.max_repetition >= b for a, b in zip(nll, repeats, strict=True)
        ]
        n = len(rows)
        return {
            "ppl": math.exp(min(80.0, sum(nll) / n)),
            "repetition": sum(repeats) / n,
            "coherence": sum(sound) / n,
            "kl_base": sum(kl) / n,
            "length": sum(len(row.ids) for row in rows) / n,
        }

    @staticmethod
    def _states(model: PreTrainedModel, batch: Batch, advance: Callable[[int], None]) -> Tensor:
        found = states(model, batch)
        advance(len(batch.ids))
        return found
