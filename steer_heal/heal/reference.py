"""The ids that a heal trains on and the reference's states there: fixed for a round and shared by all its cells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steer_heal.artifacts import Completion
from steer_heal.lm.attention import short_sequences
from steer_heal.lm.batch import Pair, by_length, collate, shared_states
from steer_heal.lm.student import Student
from steer_heal.runtime import Runtime
from steer_heal.store import Artifact, stage
from steer_heal.system.terminal import bar


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


@dataclass(frozen=True)
class ReferenceStates(Artifact):
    """A reference's post-final-norm states [c, d] at the completion positions of every pair, in the model's dtype."""

    states: tuple[Tensor, ...]

    def save(self, folder: Path) -> None:
        save_file({"states": torch.cat(self.states).cpu().contiguous()}, folder / "states.safetensors")
        (folder / "lengths.json").write_text(json.dumps([len(part) for part in self.states]), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        whole = load_file(folder / "states.safetensors")["states"]
        return cls(states=whole.split(json.loads((folder / "lengths.json").read_text(encoding="utf-8"))))


@stage("heal.reference.reference_states")
@torch.no_grad()
def reference_states(reference: Student, targets: Targets, *, runtime: Runtime) -> ReferenceStates:
    """Run the reference once over all targets."""
    pairs = targets.pairs
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    with reference.view() as model, short_sequences(model), bar("reference", len(pairs)) as advance:
        for group in by_length(pairs, runtime.score_batch):
            batch = collate([pairs[i] for i in group], reference.base.pad_id, model.device)
            lengths = [len(pairs[i].completion) for i in group]
            for i, part in zip(group, shared_states(model, batch).cpu().split(lengths), strict=True):
                found[i] = part.clone()
            advance(len(group))
    return ReferenceStates(states=tuple(found))
