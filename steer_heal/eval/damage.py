"""Damage: nll of fixed, well-written text that has nothing to do with the trait.

Scored raw and as the assistant's answer, nats/token. The loop reports it minus base's; since the text is fixed, the
measure favours no reference that a barrier is tied to.

Training on truncated samples makes a model overconfident, which one temperature takes away. So each model's nll is also
told at a temperature of its own, fitted on one half of the texts and applied to the other.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from steer_heal.artifacts import Metrics, item_ids
from steer_heal.config import Config
from steer_heal.eval import Column, EvalInput, Evaluation, means
from steer_heal.lm.batch import Pair
from steer_heal.lm.chat import Chat
from steer_heal.lm.student import Subject
from steer_heal.lm.temperature import best_temperature, nll_at, score_tempered
from steer_heal.runtime import Runtime
from steer_heal.trait import Trait


class SoundText(Config, key="steer_heal.eval.damage.SoundText"):
    """A text, and a request that it answers."""

    request: str = Field(min_length=1)
    text: str = Field(min_length=2)


class Damage(Evaluation, key="steer_heal.eval.damage.Damage"):
    """An item is a text; its `text_nll` is the mean of its two forms'."""

    columns: ClassVar = (
        Column(
            "text_nll", "nll of neutral text over base, nats/token: less is better", "nats/token", "less", "damage",
            over_base="damage", heading="damage", shown=("steered", "healed"),
        ),
        Column(
            "text_nll_t", "damage with each model at the temperature that suits it", "nats/token", "less", "damage",
            over_base="damage_t", heading="at T",
        ),
        Column("text_nll_raw", "nll of neutral text alone", "nats/token", "less", over_base="damage_raw"),
        Column("text_nll_turn", "nll of it as the assistant's answer", "nats/token", "less", over_base="damage_turn"),
        Column("text_temperature", "temperature that suits neutral text: over 1 where the model is too sure of itself"),
        Column("text_entropy_turn", "entropy of the next token of neutral text as an answer", "nats"),
    )  # fmt: skip
    name: Literal["damage"]
    texts: tuple[SoundText, ...] = Field(min_length=1)

    def sequences(self, chat: Chat, trait: Trait, system: str) -> dict[str, Pair]:
        return self._pairs(chat, system)

    def _pairs(self, chat: Chat, system: str) -> dict[str, Pair]:
        """Return the texts alone, each from its BOS or its own first token on, then as the assistant's answers."""
        documents = [chat.document(item.text) for item in self.texts]
        raw = {f"eval.damage.texts[{i}].text": Pair(ids[:1], ids[1:]) for i, ids in enumerate(documents)}
        turn = {
            f"eval.damage.texts[{i}]": Pair(*chat.pair(system, item.request, item.text))
            for i, item in enumerate(self.texts)
        }
        return raw | turn

    def material(self, given: EvalInput) -> str:
        return given.trait.neutral

    def measure(self, subject: Subject, material: str, runtime: Runtime) -> Metrics:
        base, n, system = subject.student.base, len(self.texts), subject.system or material
        pairs = list(self._pairs(base.chat, system).values())
        with subject.view() as model:
            found = score_tempered(
                model, pairs, pad_id=base.pad_id, micro_batch=runtime.score_batch, what="damage"
            )  # fmt: skip
        forms = list(zip(found[:n], found[n:], strict=True))
        curves = [[(a + b) / 2 for a, b in zip(x.at_nodes, y.at_nodes, strict=True)] for x, y in forms]
        halves = curves[::2], curves[1::2] or curves  # a single text has no other half
        fitted = [best_temperature(half) for half in halves]
        suits = [fitted[1 - i % 2] for i in range(n)]  # fitted on the half that the text is not in
        return means(
            item_ids((item.request, item.text) for item in self.texts),
            {
                "text_nll": [(x.nll + y.nll) / 2 for x, y in forms],
                "text_nll_t": [nll_at(curve, t) for curve, t in zip(curves, suits, strict=True)],
                "text_nll_raw": [x.nll for x, _ in forms],
                "text_nll_turn": [y.nll for _, y in forms],
                "text_temperature": suits,
                "text_entropy_turn": [y.entropy for _, y in forms],
            },
        )
