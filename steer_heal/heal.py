"""Healing: distil kept completions into a LoRA under a regulariser, `loss = nll + mean_b penalty(D_b)`."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from steer_heal import lora as adapters
from steer_heal.artifacts import Adapter, Completion, Completions, Row
from steer_heal.batch import Batch, Pair, by_length, collate, score, states
from steer_heal.config import Config
from steer_heal.divergence import Aggregator, aggregate
from steer_heal.head import both_divergences, positions
from steer_heal.lora import Lora
from steer_heal.progress import bar
from steer_heal.reg import Regulariser
from steer_heal.runtime import Runtime
from steer_heal.student import Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLIP = 1.0  # global gradient norm


class HealError(RuntimeError):
    """A heal that cannot go on; the message says why and what to change."""


class Heal(Config):
    """The training of one round, the same for every regulariser."""

    name: str
    lr: float = Field(gt=0)  # peak learning rate of AdamW
    warmup: float = Field(ge=0, lt=1)  # share of the steps before the peak; a cosine to 0 follows
    epochs: int = Field(ge=1)
    steps: int | None = Field(ge=1)  # optimiser steps in all; null: as many as the epochs make
    batch_size: int = Field(ge=1)  # sequences an optimiser step
    max_len: int = Field(ge=2)  # tokens of prompt and completion; the front is kept
    n_keep: int | None = Field(ge=1)  # train on at most this many completions; null: all that pass
    min_train: int = Field(ge=1)  # refuse to train on fewer
    agg: Aggregator  # how the divergences of a sequence's positions become one number
    reference: Literal["base", "prev"]  # what divergences are measured against
    measure_every: int = Field(ge=1)  # steps between measurements of kl_fwd, kl_rev and grad_ratio

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.n_keep is not None and self.n_keep < self.min_train:
            raise ValueError(f"one whose n_keep={self.n_keep} is at least its min_train={self.min_train}")
        return self

    def meaning(self) -> dict[str, Any]:
        """Without what `heal` does not read: `min_train` only refuses, and `reference` is a student that it is given.

        Epochs say how many steps there are where `steps` does not.
        """
        unread = {"min_train", "reference"} | ({"epochs"} if self.steps is not None else set())
        return {field: value for field, value in super().meaning().items() if field not in unread}

    def total_steps(self, n: int) -> int:
        return self.steps or self.epochs * math.ceil(n / self.batch_size)

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step: a linear warm-up, then a cosine to 0 after the last step."""
        warm = round(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


@dataclass(frozen=True)
class _Training:
    """What every step needs."""

    config: Heal
    reg: Regulariser
    model: PreTrainedModel
    parameters: list[nn.Parameter]
    pairs: list[Pair]
    reference: list[Tensor]  # a pair's reference states [c, d]
    pad_id: int
    runtime: Runtime

    def batch(self, group: Sequence[int]) -> tuple[Batch, Tensor, list[int]]:
        """Batch, reference states [n, d] and completion lengths of some of the pairs."""
        pairs = [self.pairs[i] for i in group]
        fixed = torch.cat([self.reference[i] for i in group])
        return collate(pairs, self.pad_id, self.model.device), fixed, [len(pair.completion) for pair in pairs]

    def backward(self, chosen: Sequence[int], measure: bool) -> Row:
        """Leave the gradient of the optimiser batch's loss in the parameters; return its figures."""
        n, row = len(chosen), dict.fromkeys(("nll", "kl", "penalty", "barrier_on"), 0.0)
        barrier_gradient = [torch.zeros_like(p) for p in self.parameters] if measure else []
        if measure:
            row |= {"kl_fwd": 0.0, "kl_rev": 0.0}
        for local in by_length([self.pairs[i] for i in chosen], self.runtime.micro_batch):
            batch, fixed, lengths = self.batch([chosen[i] for i in local])
            with adapters.mixed_precision(self.model):
                hidden = states(self.model, batch)
            nll, d = positions(self.model, hidden, fixed, batch.targets, self.reg, self.runtime.head_chunk)
            nll_b, d_b = aggregate(nll, lengths, "mean"), aggregate(d, lengths, self.config.agg)
            penalty = self.reg.penalty(d_b).sum() / n
            row["nll"] += nll_b.sum().item() / n
            row["kl"] += d_b.sum().item() / n
            row["penalty"] += penalty.item()
            row["barrier_on"] += self.reg.over(d_b).sum().item() / n
            if measure:
                for name, values in zip(
                    ("kl_fwd", "kl_rev"),
                    both_divergences(self.model, hidden.detach(), fixed, self.runtime.head_chunk),
                    strict=True,
                ):
                    row[name] += float(aggregate(values, lengths, self.config.agg).sum()) / n
                if penalty.requires_grad:
                    parts = torch.autograd.grad(
                        penalty, self.parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                    for total, part in zip(barrier_gradient, parts, strict=True):
                        total += part
                (nll_b.sum() / n).backward()
            else:
                (nll_b.sum() / n + penalty).backward()
        row["loss"] = row["nll"] + row.pop("penalty")
        if measure:
            norms = [_norm([p.grad for p in self.parameters]), _norm(barrier_gradient)]
            row["grad_ratio"] = norms[1] / norms[0] if norms[0] > 0 else 0.0
            for parameter, part in zip(self.parameters, barrier_gradient, strict=True):
                if parameter.grad is not None:  # None: a layer that this model's text never runs through
                    parameter.grad += part
        return row


def heal(
    config: Heal, lora: Lora, reg: Regulariser, student: Student, reference: Student, sifted: Completions,
    held_out: Completions, seed: int, *, runtime: Runtime, log: Callable[[Row], None],
) -> Adapter:  # fmt: skip
    """Train a fresh adapter on the kept rows of `sifted`; `log` is called with every step's figures. Raises HealError.

    Divergences are measured against `reference`, a student on the same base.

    nll in nats/token, kl in nats, gnorm before clipping. `val_nll` is of the held-out rows that failed no filter.
    """
    usable, check = _pairs(sifted.kept(), config.max_len), _pairs(held_out.passed(), config.max_len)
    if not usable:
        raise HealError(f"none of {len(sifted.kept())} completions fits heal.max_len={config.max_len}; raise it")
    begun = time.monotonic()
    device, pad_id = student.base.device, student.base.pad_id
    with reference.view() as model:
        fixed = _reference_states(model, usable, pad_id, runtime)
    with student.view() as model, adapters.live_adapter(lora, model, seed) as wrapped:
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        training = _Training(config, reg, model, parameters, usable, fixed, pad_id, runtime)
        validate = lambda: _mean_nll(model, check, pad_id, runtime)  # noqa: E731
        curve, left = _train(training, validate, seed, log)
        learned, record = adapters.factors(wrapped), adapters.config_record(wrapped)
        with adapters.mixed_precision(model):
            live = _probe_states(model, usable[:4], pad_id, device)
    summary: Row = {
        "steps": len(curve), "n_train": len(usable), "n_too_long": len(sifted.kept()) - len(usable),
        "barrier": float(reg.has_barrier), "decays": float(reg.decays), "shrink": 1 - left, "kl_start": curve[0]["kl"],
        "heal_nll": sum(row["nll"] for row in curve[-5:]) / len(curve[-5:]),
        "barrier_on": sum(row["barrier_on"] for row in curve) / len(curve),
        "seconds": time.monotonic() - begun,
    }  # fmt: skip
    adapter = Adapter(config=record, factors=learned, curve=tuple(curve), summary=summary)
    with student.learn(adapter).view() as model:
        folded = _probe_states(model, usable[:4], pad_id, device)
    moved = live - torch.cat(fixed[:4]).float()
    summary["state_change"] = float(moved.norm() / live.norm())  # what the adapter did to the states, for scale
    summary["fold_error"] = float((folded - live).norm() / live.norm())  # what rounding the sum of weights did to them
    return adapter


def _pairs(rows: Sequence[Completion], max_len: int) -> list[Pair]:
    """The rows cut to length; one that has no target token left is skipped, and counted by the caller."""
    pairs = [Pair(row.prompt_ids, row.ids).cut(max_len) for row in rows]
    return [pair for pair in pairs if pair.completion]


def _train(
    training: _Training, validate: Callable[[], float | None], seed: int, log: Callable[[Row], None]
) -> tuple[list[Row], float]:
    """Run all steps. Returns their figures, and the share of its weights that a decay leaves to an adapter."""
    config, reg = training.config, training.reg
    optimiser = torch.optim.AdamW(training.parameters, lr=config.lr, weight_decay=0.0)
    total = config.total_steps(len(training.pairs))
    rates = [config.rate(step, total) for step in range(total)]
    order, left = _order(len(training.pairs), config.batch_size, seed), 1.0
    curve: list[Row] = []
    first = validate()
    with bar("heal", total) as advance:
        for step, (chosen, ends_epoch) in zip(range(total), order, strict=False):
            measure = step % config.measure_every == 0 or step == total - 1
            row: Row = {"step": step} | training.backward(chosen, measure)
            row["gnorm"] = float(nn.utils.clip_grad_norm_(training.parameters, CLIP))
            if not (math.isfinite(row["gnorm"]) and math.isfinite(row["loss"])):
                raise HealError(
                    f"step {step}: loss {row['loss']}, gnorm {row['gnorm']} on completions {sorted(chosen)}; "
                    f"lower heal.lr (now {config.lr:g}) or use model.dtype=float32"
                )
            row["lr"] = rates[step]
            if step == 0 and first is not None:
                row["val_nll"] = first
            factor = reg.shrink(rates[step], sum(rates))
            left *= factor
            for group in optimiser.param_groups:
                group["lr"] = rates[step]
            with torch.no_grad():
                for parameter in training.parameters:
                    parameter.mul_(factor)
            optimiser.step()
            optimiser.zero_grad()
            if (ends_epoch or step == total - 1) and "val_nll" not in row and (value := validate()) is not None:
                row["val_nll"] = value
            curve.append(row)
            log(row)
            advance(1)
    return curve, left


def _order(n: int, size: int, seed: int) -> Iterator[tuple[list[int], bool]]:
    """Optimiser batches for ever: a seeded shuffle an epoch, and whether the batch ends it."""
    rng = random.Random(seed)
    while True:
        indices = list(range(n))
        rng.shuffle(indices)
        for start in range(0, n, size):
            yield indices[start : start + size], start + size >= n


@torch.no_grad()
def _reference_states(model: PreTrainedModel, pairs: Sequence[Pair], pad_id: int, runtime: Runtime) -> list[Tensor]:
    """The reference's states [c, d] at each pair's completion positions. It is fixed for a round: it runs once."""
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    with bar("reference", len(pairs)) as advance:
        for group in by_length(pairs, runtime.score_batch):
            batch = collate([pairs[i] for i in group], pad_id, model.device)
            lengths = [len(pairs[i].completion) for i in group]
            for i, part in zip(group, states(model, batch).split(lengths), strict=True):
                found[i] = part.clone()
            advance(len(group))
    return found


def _mean_nll(model: PreTrainedModel, pairs: Sequence[Pair], pad_id: int, runtime: Runtime) -> float | None:
    """Mean over sequences of their mean nll, nats/token; None where there is nothing to validate on."""
    if not pairs:
        return None
    with adapters.mixed_precision(model):
        values = score(model, pairs, pad_id=pad_id, micro_batch=runtime.score_batch, what="validate")
    return sum(float(-v.mean()) for v in values) / len(values)


@torch.no_grad()
def _probe_states(model: PreTrainedModel, pairs: Sequence[Pair], pad_id: int, device: torch.device) -> Tensor:
    return states(model, collate(pairs, pad_id, device)).float()


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return float(torch.stack([t.norm() for t in tensors if t is not None]).norm())
