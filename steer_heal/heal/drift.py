"""Drift of a student from its reference, position by position, over the texts that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steer_heal.artifacts import States, item_ids
from steer_heal.heal.chunked_nll import positions
from steer_heal.heal.reference import Targets
from steer_heal.lm.divergence import Aggregator, aggregate
from steer_heal.lm.score import target_ids
from steer_heal.lm.student import Student
from steer_heal.lm.tree import completion_states
from steer_heal.reg import Regulariser
from steer_heal.runtime import Runtime
from steer_heal.store import Artifact, stage
from steer_heal.system.terminal import bar

NAMES = ("kl_fwd", "kl_rev", "barrier")  # `barrier` is the regulariser's own divergence, zeros if it has none
CONTEXT = 12  # tokens shown before a position
WORST = 8  # positions shown


@dataclass(frozen=True)
class Place:
    """A completion position: its divergences in nats, the end of the text before it, and the token there."""

    kl_fwd: float
    kl_rev: float
    before: str
    token: str


@dataclass(frozen=True)
class Drift(Artifact):
    """Divergences at all completion positions, text by text: `values` [3, n] in the order of NAMES, nats."""

    values: Tensor
    lengths: tuple[int, ...]
    worst: tuple[Place, ...]  # the positions of largest drift, one per text
    ids: tuple[str, ...]  # of the texts

    def of(self, name: str) -> Tensor:
        """Return one divergence [n]."""
        return self.values[NAMES.index(name)]

    def per_text(self, name: str, how: Aggregator) -> Tensor:
        """Return one divergence, aggregated over the positions of each text, [b]."""
        return aggregate(self.of(name), self.lengths, how)

    def save(self, folder: Path) -> None:
        save_file({"values": self.values.contiguous()}, folder / "drift.safetensors")
        about = {"lengths": self.lengths, "ids": self.ids, "worst": [asdict(place) for place in self.worst]}
        (folder / "drift.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        about = json.loads((folder / "drift.json").read_text(encoding="utf-8"))
        worst = tuple(Place(**place) for place in about["worst"])
        values = load_file(folder / "drift.safetensors")["values"]
        return cls(values, tuple(about["lengths"]), worst, tuple(about["ids"]))


@stage("heal.drift.drift")
@torch.no_grad()
def drift(
    student: Student, reference: Callable[[], States], targets: Targets, reg: Regulariser, *, runtime: Runtime
) -> Drift:
    """Run the student once over all targets. Only the divergence of `reg` is used, not its penalty."""
    pairs, fixed, base = targets.pairs, reference().states, student.base
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    with student.view() as model, bar("drift", len(pairs)) as advance:
        chunk, size = runtime.positions(model.config.get_text_config().vocab_size), runtime.score_batch
        for group, hidden in completion_states(model, pairs, pad_id=base.pad_id, size=size, advance=advance):
            there = torch.cat([fixed[i] for i in group]).to(model.device)
            said = target_ids((pairs[i].completion for i in group), model.device)
            figures = positions(model, hidden, there, said, reg, chunk, True)
            values = torch.cat([figures.both, figures.d[None]]).cpu()
            for i, part in zip(group, values.split([len(pairs[i].completion) for i in group], dim=1), strict=True):
                found[i] = part
    tokenizer, by = base.tokenizer, NAMES.index("barrier" if reg.has_barrier else "kl_rev")
    farthest = sorted(range(len(pairs)), key=lambda i: -float(found[i][by].max()))[:WORST]
    worst = []
    for i in farthest:
        place = int(found[i][by].argmax())
        before = (*pairs[i].prompt, *pairs[i].completion[:place])[-CONTEXT:]
        texts = (str(tokenizer.decode(ids)) for ids in (before, pairs[i].completion[place : place + 1]))
        worst.append(Place(*found[i][:2, place].tolist(), *texts))
    ids = item_ids((json.dumps(pair.prompt), json.dumps(pair.completion)) for pair in pairs)
    return Drift(torch.cat(found, dim=1), tuple(len(pair.completion) for pair in pairs), tuple(worst), tuple(ids))
