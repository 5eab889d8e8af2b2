"""Which persona base takes a model's own answers for: the unit of `kept_trait`, whose zero is base's own answers."""

from __future__ import annotations

from typing import ClassVar, Literal

from steer_heal.artifacts import Completions, Metrics, answer_ids
from steer_heal.eval import Column, EvalInput, Evaluation, means
from steer_heal.lm.batch import Pair, score
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime

Material = tuple[str, str, Completions]


class PersonaLogOdds(Evaluation, key="steer_heal.eval.persona.PersonaLogOdds"):
    """log p(answer | positive persona) - log p(answer | negative persona), under base; an item is an answer."""

    columns: ClassVar = (
        Column("answers_trait", "log-odds of the personas for the model's own answers", "nats/token", circular="base"),
    )
    name: Literal["persona"]

    def material(self, given: EvalInput) -> Material:
        return given.trait.positive, given.trait.negative, given.answers

    def measure(self, subject: Subject, material: Material, runtime: Runtime) -> Metrics:
        positive, negative, answers = material
        base, rows = subject.student.base, answers.rows
        pairs = [
            Pair(base.chat.prompt(persona, row.prompt), row.ids) for persona in (positive, negative) for row in rows
        ]
        with subject.student.pristine().view() as model:
            found = score(model, pairs, pad_id=base.pad_id, micro_batch=runtime.score_batch, what="persona")
        split = zip(found[: len(rows)], found[len(rows) :], strict=True)
        return means(answer_ids(rows), {"answers_trait": [float((a - b).mean()) for a, b in split]})
