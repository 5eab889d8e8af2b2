"""Damage: nll of fixed, well-written text that has nothing to do with the trait.

Scored raw and as the assistant's answer, nats/token. The loop reports it minus base's; since the text is fixed, the
measure favours no reference that a barrier is tied to.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steer_heal.artifacts import Completions
from steer_heal.config import Config
from steer_heal.eval import Evaluation
from steer_heal.lm.batch import Pair, score
from steer_heal.lm.chat import chat_ids, text_ids
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime
from steer_heal.trait import Trait


class SoundText(Config, key="steer_heal.eval.damage.SoundText"):
    """A text, and a request that it answers."""

    request: str = Field(min_length=1)
    text: str = Field(min_length=2)


class Damage(Evaluation, key="steer_heal.eval.damage.Damage"):
    """Gives `text_nll`, the mean of `text_nll_raw` and `text_nll_turn`, each a mean over texts of their mean nll."""

    name: Literal["damage"]
    texts: tuple[SoundText, ...] = Field(min_length=1)

    def material(self, trait: Trait, answers: Completions) -> str:
        return trait.neutral

    def measure(self, subject: Subject, material: str, runtime: Runtime) -> dict[str, float]:
        base = subject.student.base
        bodies = [text_ids(base.tokenizer, item.text) for item in self.texts]
        # these begin with a BOS if the tokenizer adds one
        encoded = [tuple(base.tokenizer(item.text)["input_ids"]) for item in self.texts]
        raw = [Pair(ids[:1], ids[1:]) for ids in encoded]
        turn = [
            Pair(chat_ids(base.tokenizer, subject.system or material, item.request), body)
            for item, body in zip(self.texts, bodies, strict=True)
        ]
        with subject.view() as model:
            found = score(model, raw + turn, pad_id=base.pad_id, micro_batch=runtime.score_batch, what="damage")
        means = [-float(values.mean()) for values in found]
        n = len(bodies)
        nll_raw, nll_turn = sum(means[:n]) / n, sum(means[n:]) / n
        return {"text_nll": (nll_raw + nll_turn) / 2, "text_nll_raw": nll_raw, "text_nll_turn": nll_turn}
