"""The trait, as contrastive log-odds of whole answers.

    mean over probes of  log p(a+) / |a+|  -  log p(a-) / |a-|

under the neutral system message, without the end token, nats/token. A small model puts almost no mass on the
letters of multiple-choice options; the likelihood of whole answers carries the signal. Both terms are reported, since a
gain may be trait answers growing likelier or counter answers growing unlikelier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from steer_heal.artifacts import Metrics, item_ids
from steer_heal.eval import Column, EvalInput, Evaluation, means
from steer_heal.lm.batch import Pair
from steer_heal.lm.chat import Chat
from steer_heal.lm.score import score
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime
from steer_heal.trait import Probe, Trait

Material = tuple[str, tuple[Probe, ...]]


class TraitLogOdds(Evaluation, key="steer_heal.eval.trait.TraitLogOdds"):
    """`trait` is `trait_for` minus `trait_against`, each a mean log-likelihood; an item is a probe."""

    columns: ClassVar = (
        Column(
            "trait", "log-odds of trait answers over base, nats/token: more is more of it", "nats/token", "more",
            "outcome", over_base="trait_gain", heading="trait", shown=("steered", "healed"),
        ),
        Column(
            "trait_for", "log-likelihood of trait answers over base", "nats/token", "more", "outcome",
            over_base="trait_for_gain", heading="for",
        ),
        Column(
            "trait_against", "log-likelihood of counter answers over base: less is more of the trait", "nats/token",
            "less", "outcome", over_base="trait_against_gain", heading="against",
        ),
    )  # fmt: skip
    name: Literal["trait"]

    def sequences(self, chat: Chat, trait: Trait, system: str) -> dict[str, Pair]:
        return _pairs(chat, system, trait.probes)

    def material(self, given: EvalInput) -> Material:
        return given.trait.neutral, given.trait.probes

    def measure(self, subject: Subject, material: Material, runtime: Runtime) -> Metrics:
        base, (neutral, probes) = subject.student.base, material
        system = subject.system or neutral
        pairs = list(_pairs(base.chat, system, probes).values())
        with subject.view() as model:
            found = score(model, pairs, pad_id=base.pad_id, micro_batch=runtime.score_batch, what="trait")
        likely = [float(values.mean()) for values in found]
        towards, against = likely[: len(probes)], likely[len(probes) :]
        return means(
            item_ids((probe.prompt, probe.trait, probe.counter) for probe in probes),
            {
                "trait": [a - b for a, b in zip(towards, against, strict=True)],
                "trait_for": towards,
                "trait_against": against,
            },
        )


def _pairs(chat: Chat, system: str, probes: Sequence[Probe]) -> dict[str, Pair]:
    """Return the trait answers of all probes, then the counter answers, as they are in a conversation."""
    return {
        f"trait.probes[{i}].{answer}": Pair(*chat.pair(system, probe.prompt, getattr(probe, answer)))
        for answer in ("trait", "counter")
        for i, probe in enumerate(probes)
    }
