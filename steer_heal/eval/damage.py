"""Damage: nll of fixed sound text that has nothing to do with the trait.

Scored raw and as the assistant's answer, nats/token. The loop reports it over base's; text that was written beforehand
does not care which reference a barrier was tied to.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steer_heal.artifacts import Completions
from steer_heal.config import Config
from steer_heal.eval import Evaluation, Subject
from steer_heal.lm.batch import Pair, score
from steer_heal.model import chat_ids, text_ids
from steer_heal.runtime import Runtime
from steer_heal.trait import Trait


class SoundText(Config):
    """A text and what somebody would have asked to be told it."""

    request: str = Field(min_length=1)
    text: str = Field(min_length=2)


class Damage(Evaluation):
    """Gives `text_nll`, the mean of `text_nll_raw` and `text_nll_turn`, each a mean over texts of their mean nll."""

    name: Literal["damage"]
    texts: tuple[SoundText, ...] = Field(min_length=1)

    def material(self, trait: Trait, answers: Completions) -> str:
        return trait.neutral

    def measure(self, subject: Subject, material: str, runtime: Runtime) -> dict[str, float]:
        base = subject.student.base
        bodies = [text_ids(base.tokenizer, sound.text) for sound in self.texts]
        whole = [
            tuple(base.tokenizer(sound.text)["input_ids"]) for sound in self.texts
        ]  # led by a BOS where one is due
        raw = [Pair(ids[:1], ids[1:]) for ids in whole]
        turn = [
            Pair(chat_ids(base.tokenizer, subject.told or material, sound.request), body)
            for sound, body in zip(self.texts, bodies, strict=True)
        ]
        with subject.view() as model:
            found = score(model, raw + turn, pad_id=base.pad_id, micro_batch=runtime.score_batch, what="damage")
        means = [-float(values.mean()) for values in found]
        n = len(bodies)
        nll_raw, nll_turn = sum(means[:n]) / n, sum(means[n:]) / n
        return {"text_nll": (nll_raw + nll_turn) / 2, "text_nll_raw": nll_raw, "text_nll_turn": nll_turn}
