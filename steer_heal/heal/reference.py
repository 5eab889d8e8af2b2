"""The ids that a heal trains on and the reference's states there: fixed for a round and shared by all its cells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from steer_heal.artifacts import Completion, States
from steer_heal.lm.batch import Pair
from steer_heal.lm.student import Student
from steer_heal.lm.tree import states_of_each
from steer_heal.runtime import Runtime
from steer_heal.store import stage


@dataclass(frozen=True)
class Targets:
    """Prompts and completions as ids, truncated to a maximum length."""

    pairs: tuple[Pair, ...]

    @classmethod
    def of(cls, rows: Sequence[Completion], max_len: int) -> Self:
        """Build from completions, skipping those with no target token left within `max_len`."""
        cut = (Pair(row.prompt_ids, row.ids).cut(max_len) for row in rows)
        return cls(tuple(pair for pair in cut if pair.completion))

    @property
    def fingerprint(self) -> str:
        """A hash of the ids."""
        return hashlib.sha256(json.dumps([[p.prompt, p.completion] for p in self.pairs]).encode()).hexdigest()[:24]


@stage("heal.reference.reference_states")
def reference_states(reference: Student, targets: Targets, *, runtime: Runtime) -> States:
    """Run the reference once over all targets."""
    base = reference.base
    with reference.view() as model:
        found = states_of_each(
            model, targets.pairs, pad_id=base.pad_id, size=runtime.score_batch, what="reference"
        )  # fmt: skip
    return States(states=tuple(found))
