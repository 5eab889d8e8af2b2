"""The training steps of a heal: AdamW on the adapter, one optimiser batch per step, with checks and metrics."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from loguru import logger
from safetensors.torch import load, save
from torch import Tensor, nn

from steer_heal.artifacts import RoundFailed, Row
from steer_heal.heal.chunked_nll import positions
from steer_heal.heal.distil import Heal
from steer_heal.lm.batch import Batch, Pair, by_length, collate, shared_states, states
from steer_heal.lm.divergence import aggregate
from steer_heal.lm.frozen_blocks import Frozen, skip_blocks
from steer_heal.reg import Regulariser
from steer_heal.runtime import Runtime
from steer_heal.store.checkpoint import Checkpoint
from steer_heal.system.signals import defer
from steer_heal.system.terminal import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLIP = 1.0  # global gradient norm
DWARFS = 1e6  # times the nll: a penalty that leaves nothing of it in the gradient, and soon no finite norm
SETTLED = 5  # steps after which the median of gnorm is meaningful


class HealError(RoundFailed):
    """A heal that cannot continue; the message says why and what to change."""


@dataclass
class Progress:
    """The progress of a training: all that is needed to resume it to the same result."""

    curve: list[Row] = field(default_factory=list)
    left: float = 1.0  # the share of the adapter's weights that decay has left
    seconds: float = 0.0  # of earlier attempts
    begun: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Training:
    """The inputs that every step needs."""

    config: Heal
    reg: Regulariser
    model: PreTrainedModel
    parameters: list[nn.Parameter]
    pairs: Sequence[Pair]
    reference: Sequence[Tensor]  # each pair's reference states [c, d]
    frozen: Frozen | None  # the blocks below the adapter, if they are skipped
    pad_id: int
    runtime: Runtime

    def batch(self, group: Sequence[int]) -> tuple[Batch, Tensor, list[int]]:
        """Return batch, reference states [n, d] and completion lengths of some of the pairs."""
        pairs = [self.pairs[i] for i in group]
        fixed = torch.cat([self.reference[i] for i in group]).to(self.model.device)
        return collate(pairs, self.pad_id, self.model.device), fixed, [len(pair.completion) for pair in pairs]

    def states(self, batch: Batch, group: Sequence[int]) -> Tensor:
        """Return states [n, d] at completion positions, by the path that runs the least."""
        if self.frozen is not None:
            with skip_blocks(self.model, self.frozen, group):
                return states(self.model, batch)
        if self.runtime.checkpoint_blocks:  # recomputation in the backward pass would fill a cache twice
            return states(self.model, batch)
        return shared_states(self.model, batch)

    def way_out(self, row: Row) -> str:
        """What to change after a step's number that is not finite: lam if its penalty dwarfs the nll."""
        lam = self.reg.key_fields().get("lam")
        if lam and row["loss"] - row["nll"] > DWARFS * row["nll"]:
            return f"the penalty of lam={lam:g} dwarfs the nll of {row['nll']:.3g}: lower lam"
        return self.slower()

    def slower(self) -> str:
        """Advice for states that are not finite: what to change."""
        finer = "" if self.model.dtype == torch.float32 else " or use model.dtype=float32"
        return f"lower heal.lr (now {self.config.lr:g}){finer}"

    def backward(self, chosen: Sequence[int], measure: bool) -> Row:
        """Accumulate the gradient of the optimiser batch's loss in the parameters; return the batch's metrics."""
        n, row = len(chosen), dict.fromkeys(("nll", "kl", "penalty", "barrier_on"), 0.0)
        barrier_gradient = [torch.zeros_like(p) for p in self.parameters] if measure else []
        if measure:
            row |= {"kl_fwd": 0.0, "kl_rev": 0.0}
        chunk = self.runtime.positions(self.model.config.get_text_config().vocab_size)
        for local in by_length([self.pairs[i] for i in chosen], self.runtime.micro_batch):
            batch, fixed, lengths = self.batch([chosen[i] for i in local])
            hidden = self.states(batch, [chosen[i] for i in local])
            found = positions(self.model, hidden, fixed, batch.targets, self.reg, chunk, measure)
            nll_b, d_b = aggregate(found.nll, lengths, "mean"), aggregate(found.d, lengths, self.config.agg)
            penalty = self.reg.penalty(d_b).sum() / n
            row["nll"] += nll_b.sum().item() / n
            row["kl"] += d_b.sum().item() / n
            row["penalty"] += penalty.item()
            row["barrier_on"] += self.reg.over(d_b).sum().item() / n
            if measure:
                for name, values in zip(("kl_fwd", "kl_rev"), found.both, strict=True):
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
                if parameter.grad is not None:  # None: a layer that text never runs through in this model
                    parameter.grad += part
        return row


def train(
    training: Training, progress: Progress, validate: Callable[[], float | None], seed: int,
    log: Callable[[Row], None], checkpoint: Checkpoint | None,
) -> None:  # fmt: skip
    """Run all steps, resuming from `checkpoint` if it holds any.

    Raises HealError for a step that must not be taken. The parameters are then restored to their values before the last
    step that was taken, the last for which loss and gradient are known to be good.
    """
    config, reg, runtime = training.config, training.reg, training.runtime
    optimiser = torch.optim.AdamW(training.parameters, lr=config.lr, weight_decay=0.0, fused=True)
    total = config.total_steps(len(training.pairs))
    rates = [config.rate(step, total) for step in range(total)]
    order, curve = _order(len(training.pairs), config.batch_size, seed), progress.curve
    last_good = [parameter.detach().clone() for parameter in training.parameters]
    if checkpoint is not None and (saved := checkpoint.load()) is not None:
        _restore(saved, progress, training.parameters, last_good, optimiser)
        logger.info("resuming at step {} of {}", len(curve), total)
        for done in curve:
            log(done)
            next(order)
    first = validate() if not curve else None
    with bar("heal", total) as advance, defer() as stop:
        advance(len(curve))
        for step in range(len(curve), total):
            chosen, ends_epoch = next(order)
            measure = step % config.measure_every == 0 or step == total - 1
            row: Row = {"step": step} | training.backward(chosen, measure)
            row["gnorm"] = float(nn.utils.clip_grad_norm_(training.parameters, CLIP))
            if wrong := _wrong(row, curve, chosen, training):
                _put_back(last_good, training.parameters)
                raise HealError(wrong)
            row["lr"] = rates[step]
            if step == 0 and first is not None:
                row["val_nll"] = first
            factor = reg.decay_factor(rates[step], sum(rates))
            progress.left *= factor
            for group in optimiser.param_groups:
                group["lr"] = rates[step]
            with torch.no_grad():
                for parameter, before in zip(training.parameters, last_good, strict=True):
                    before.copy_(parameter)
                    parameter.mul_(factor)
            optimiser.step()
            optimiser.zero_grad()
            if (ends_epoch or step == total - 1) and "val_nll" not in row and (value := validate()) is not None:
                row["val_nll"] = value
                if not math.isfinite(value):
                    _put_back(last_good, training.parameters)
                    raise HealError(f"step {step}: val_nll is {value} after it; {training.way_out(row)}")
            curve.append(row)
            log(row)
            advance(1)
            due = checkpoint is not None and step < total - 1 and checkpoint.age() >= runtime.checkpoint_seconds
            if checkpoint is not None and (due or stop):
                checkpoint.save(_saved(progress, training.parameters, last_good, optimiser))
            if stop:
                break


def _wrong(row: Row, curve: Sequence[Row], chosen: Sequence[int], training: Training) -> str:
    """Return why a step must not be taken and what to change, or "". A gradient too small to be clipped passes."""
    config = training.config
    where = f"step {row['step']:.0f}: loss {row['loss']:.4g}, gnorm {row['gnorm']:.4g} on completions {sorted(chosen)}"
    if not (math.isfinite(row["gnorm"]) and math.isfinite(row["loss"])):
        return f"{where}; {training.way_out(row)}"
    usual = statistics.median(earlier["gnorm"] for earlier in curve) if len(curve) >= SETTLED else math.inf
    if row["gnorm"] > max(config.max_gnorm * usual, CLIP) and usual > 0:
        return (
            f"{where}: gnorm is {row['gnorm'] / usual:.1f} times its median so far, {usual:.3g}; "
            f"lower heal.lr (now {config.lr:g}) or lam, or raise heal.max_gnorm (now {config.max_gnorm:g})"
        )
    return ""


@torch.no_grad()
def _put_back(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _saved(
    progress: Progress, parameters: Sequence[nn.Parameter], last_good: Sequence[Tensor],
    optimiser: torch.optim.Optimizer,
) -> bytes:  # fmt: skip
    """Serialise progress, parameters, last good parameters and AdamW's moments: a line of JSON, then safetensors."""
    tensors = {f"parameter.{i}": p.detach().contiguous() for i, p in enumerate(parameters)}
    tensors |= {f"sound.{i}": value.contiguous() for i, value in enumerate(last_good)}
    for i, parameter in enumerate(parameters):
        for name, value in optimiser.state[parameter].items():
            tensors[f"{name}.{i}"] = value.contiguous()
    seconds = progress.seconds + time.monotonic() - progress.begun
    about = {"curve": progress.curve, "left": progress.left, "seconds": seconds}
    return json.dumps(about, allow_nan=False).encode() + b"\n" + bytes(save(tensors))


def _restore(
    data: bytes, progress: Progress, parameters: Sequence[nn.Parameter], last_good: Sequence[Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """Restore what `_saved` serialised."""
    line, _, packed = data.partition(b"\n")
    tensors, about = load(packed), json.loads(line)
    _put_back([tensors.pop(f"parameter.{i}") for i in range(len(parameters))], parameters)
    _put_back([tensors.pop(f"sound.{i}") for i in range(len(last_good))], last_good)
    for name, value in tensors.items():
        kind, _, i = name.rpartition(".")
        parameter = parameters[int(i)]
        # `step` too: a fused AdamW keeps its step count on the device, as Optimizer.load_state_dict also does
        optimiser.state[parameter][kind] = value.to(parameter.device)
    progress.curve.extend(about["curve"])
    progress.left, progress.seconds = about["left"], about["seconds"]


def _order(n: int, size: int, seed: int) -> Iterator[tuple[list[int], bool]]:
    """Yield optimiser batches endlessly from one seeded shuffle per epoch, each with True if it ends its epoch."""
    rng = random.Random(seed)
    while True:
        indices = list(range(n))
        rng.shuffle(indices)
        for start in range(0, n, size):
            yield indices[start : start + size], start + size >= n


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return float(torch.stack([t.norm() for t in tensors if t is not None]).norm())
