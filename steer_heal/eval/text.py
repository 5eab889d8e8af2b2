"""Text quality of a model's answers to the held-out prompts.

`coherence` rests on signs that no reference model defines: an answer repeats itself, compresses as loops do, or has few
distinct words. `ppl` and `kl_base` are measured with base, so a barrier that is tied to base improves them by itself:
they are shown and decide nothing.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import Field

from steer_heal.artifacts import Completions, Metrics, Row, States, answer_ids
from steer_heal.eval import Column, EvalInput, Evaluation, means
from steer_heal.filter.repetition import repetition
from steer_heal.lm.kl import token_kl
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime

WINDOW = 50  # words within which distinct ones are counted, so that a long answer compares with a short one
BYTES = 600  # that are compressed at once, for the same reason

Material = tuple[Completions, Callable[[], States], Callable[[], States]]


class Text(Evaluation, key="steer_heal.eval.text.Text"):
    """An item is an answer."""

    columns: ClassVar = (
        Column(
            "coherence", "share of answers that neither loop nor run out of words", "share", "more",
            heading="coher-\nent", shown=("healed",),
        ),
        Column("repetition", "share of n-grams that occurred before in the answer", "share", "less"),
        Column("compression", "compressed size over size of an answer, the least of any 600 bytes", "", "more"),
        Column("distinct", "share of distinct words among any 50 in a row, the least of an answer", "share", "more"),
        Column("ppl", "perplexity of the answers under base", "", circular="base"),
        Column("kl_base", "KL(model || base) on the model's own answers", "nats", circular="base"),
        Column("length", "length of an answer", "tokens"),
    )  # fmt: skip
    name: Literal["text"]
    max_repetition: float = Field(ge=0, le=1)  # limits of a coherent answer; shares
    min_compression: float = Field(ge=0, le=1)
    min_distinct: float = Field(ge=0, le=1)

    def material(self, given: EvalInput) -> Material:
        return given.answers, given.readings.own, given.readings.base

    def measure(self, subject: Subject, material: Material, runtime: Runtime) -> Metrics:
        answers, own, base = material
        scored, divergences = token_kl(subject, answers, own(), base())
        rows, nll = answers.rows, [-float(s.mean()) for s in scored]
        signs = [self.signs(row.text) for row in rows]
        found = means(
            answer_ids(rows),
            {
                **{name: [sign[name] for sign in signs] for name in signs[0]},
                "kl_base": [float(d.mean()) for d in divergences],
                "length": [float(len(row.ids)) for row in rows],
            },
        )
        found.values["ppl"] = math.exp(min(80.0, sum(nll) / len(nll)))
        for item, value in zip(found.items.values(), nll, strict=True):
            item["ppl"] = math.exp(min(80.0, value))
        return found

    def signs(self, text: str) -> Row:
        """The three signs of one answer, and 1 or 0 for coherent or not; an answer without words is not."""
        repeated, size, words = repetition(text), compression(text), distinct(text)
        sound = repeated <= self.max_repetition and size >= self.min_compression and words >= self.min_distinct
        return {"coherence": float(sound), "repetition": repeated, "compression": size, "distinct": words}


def compression(text: str) -> float:
    """Compressed size over size, the least of any `BYTES` in a row, or of all if fewer; 0 for an empty text."""
    data = text.encode()
    parts = [data[i : i + BYTES] for i in range(0, max(1, len(data) - BYTES + BYTES // 2), BYTES // 2)]
    return min(min(1.0, len(zlib.compress(part, 9)) / len(part)) for part in parts) if data else 0.0


def distinct(text: str) -> float:
    """The least share of distinct words among any `WINDOW` in a row, or among all if there are fewer; 0 without any."""
    words = re.findall(r"[^\W_]+", text.lower())
    windows = [words[i : i + WINDOW] for i in range(max(1, len(words) - WINDOW + 1))]
    return min(len(set(some)) / len(some) for some in windows) if words else 0.0
