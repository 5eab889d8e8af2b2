"""The steps of a heal: AdamW on the adapter, one optimiser batch a step, and what is watched meanwhile."""

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

from steer_heal.artifacts import Row
from steer_heal.heal.chunked_nll import positions
from steer_heal.heal.distil import Heal
from steer_heal.lm.batch import Batch, Pair, by_length, collate, shared_states, states
from steer_heal.lm.divergence import aggregate
from steer_heal.lm.frozen_blocks import resting
from steer_heal.reg import Regulariser
from steer_heal.runtime import Runtime
from steer_heal.store.partial import Partial
from steer_heal.system.signals import put_off
from steer_heal.system.terminal import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLIP = 1.0  # global gradient norm
SETTLED = 5  # steps after which a median of gnorm says something


class HealError(RuntimeError):
    """A heal that cannot go on; the message says why and what to change."""


@dataclass
class Progress:
    """How far a training has come: all that it needs to go on to the same result."""

    curve: list[Row] = field(default_factory=list)
    left: float = 1.0  # the share of its weights that a decay has left to the adapter
    seconds: float = 0.0  # of earlier attempts
    begun: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Training:
    """What every step needs."""

    config: Heal
    reg: Regulariser
    model: PreTrainedModel
    parameters: list[nn.Parameter]
    pairs: Sequence[Pair]
    reference: Sequence[Tensor]  # a pair's reference states [c, d]
    lowest: int  # the lowest adapted block
    entering: Sequence[Tensor]  # a pair's states [s, d] before it, unless it is the first of all
    pad_id: int
    runtime: Runtime

    def batch(self, group: Sequence[int]) -> tuple[Batch, Tensor, list[int]]:
        """Batch, reference states [n, d] and completion lengths of some of the pairs."""
        pairs = [self.pairs[i] for i in group]
        fixed = torch.cat([self.reference[i] for i in group]).to(self.model.device)
        return collate(pairs, self.pad_id, self.model.device), fixed, [len(pair.completion) for pair in pairs]

    def states(self, batch: Batch, group: Sequence[int]) -> Tensor:
        """States [n, d] at completion positions, by whichever way runs least."""
        if self.lowest:
            with resting(self.model, self.lowest, [self.entering[i] for i in group]):
                return states(self.model, batch)
        if self.runtime.checkpoint_blocks:  # on the way back a cache would be filled a second time
            return states(self.model, batch)
        return shared_states(self.model, batch)

    def slower(self) -> str:
        """What to change where a number is not finite."""
        finer = "" if self.model.dtype == torch.float32 else " or use model.dtype=float32"
        return f"lower heal.lr (now {self.config.lr:g}){finer}"

    def backward(self, chosen: Sequence[int], measure: bool) -> Row:
        """Leave the gradient of the optimiser batch's loss in the parameters; return its figures."""
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
                if parameter.grad is not None:  # None: a layer that this model's text never runs through
                    parameter.grad += part
        return row


def train(
    training: Training, progress: Progress, validate: Callable[[], float | None], seed: int,
    log: Callable[[Row], None], partial: Partial | None,
) -> None:  # fmt: skip
    """Run all steps, from where `partial` has them.

    Raises HealError for a step that must not be taken; the parameters are then as they were before the last step that
    was, which is the last time that loss and gradient were seen to be sound.
    """
    config, reg, runtime = training.config, training.reg, training.runtime
    optimiser = torch.optim.AdamW(training.parameters, lr=config.lr, weight_decay=0.0, fused=True)
    total = config.total_steps(len(training.pairs))
    rates = [config.rate(step, total) for step in range(total)]
    order, curve = _order(len(training.pairs), config.batch_size, seed), progress.curve
    sound = [parameter.detach().clone() for parameter in training.parameters]
    if partial is not None and (saved := partial.load()) is not None:
        _restore(saved, progress, training.parameters, sound, optimiser)
        logger.info("going on at step {} of {}", len(curve), total)
        for done in curve:
            log(done)
            next(order)
    first = validate() if not curve else None
    with bar("heal", total) as advance, put_off() as stop:
        advance(len(curve))
        for step in range(len(curve), total):
            chosen, ends_epoch = next(order)
            measure = step % config.measure_every == 0 or step == total - 1
            row: Row = {"step": step} | training.backward(chosen, measure)
            row["gnorm"] = float(nn.utils.clip_grad_norm_(training.parameters, CLIP))
            if wrong := _wrong(row, curve, chosen, training):
                _put_back(sound, training.parameters)
                raise HealError(wrong)
            row["lr"] = rates[step]
            if step == 0 and first is not None:
                row["val_nll"] = first
            factor = reg.shrink(rates[step], sum(rates))
            progress.left *= factor
            for group in optimiser.param_groups:
                group["lr"] = rates[step]
            with torch.no_grad():
                for parameter, before in zip(training.parameters, sound, strict=True):
                    before.copy_(parameter)
                    parameter.mul_(factor)
            optimiser.step()
            optimiser.zero_grad()
            if (ends_epoch or step == total - 1) and "val_nll" not in row and (value := validate()) is not None:
                row["val_nll"] = value
                if not math.isfinite(value):
                    _put_back(sound, training.parameters)
                    raise HealError(f"step {step}: val_nll is {value} after it; {training.slower()}")
            curve.append(row)
            log(row)
            advance(1)
            due = partial is not None and step < total - 1 and partial.age() >= runtime.checkpoint_seconds
            if partial is not None and (due or stop):
                partial.save(_saved(progress, training.parameters, sound, optimiser))
            if stop:
                break


def _wrong(row: Row, curve: Sequence[Row], chosen: Sequence[int], training: Training) -> str:
    """Why a step must not be taken and what to change, or nothing. A gradient too small to be clipped is let be."""
    config = training.config
    where = f"step {row['step']:.0f}: loss {row['loss']:.4g}, gnorm {row['gnorm']:.4g} on completions {sorted(chosen)}"
    if not (math.isfinite(row["gnorm"]) and math.isfinite(row["loss"])):
        return f"{where}; {training.slower()}"
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
    progress: Progress, parameters: Sequence[nn.Parameter], sound: Sequence[Tensor], optimiser: torch.optim.Optimizer
) -> bytes:
    """Progress, parameters, those seen to be sound, and AdamW's moments: a line of JSON, then safetensors."""
    tensors = {f"parameter.{i}": p.detach().contiguous() for i, p in enumerate(parameters)}
    tensors |= {f"sound.{i}": value.contiguous() for i, value in enumerate(sound)}
    for i, parameter in enumerate(parameters):
        for name, value in optimiser.state[parameter].items():
            tensors[f"{name}.{i}"] = value.contiguous()
    seconds = progress.seconds + time.monotonic() - progress.begun
    about = {"curve": progress.curve, "left": progress.left, "seconds": seconds}
    return json.dumps(about, allow_nan=False).encode() + b"\n" + bytes(save(tensors))


def _restore(
    data: bytes, progress: Progress, parameters: Sequence[nn.Parameter], sound: Sequence[Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """Put what `_saved` wrote back where it was."""
    line, _, packed = data.partition(b"\n")
    tensors, about = load(packed), json.loads(line)
    _put_back([tensors.pop(f"parameter.{i}") for i in range(len(parameters))], parameters)
    _put_back([tensors.pop(f"sound.{i}") for i in range(len(sound))], sound)
    for name, value in tensors.items():
        kind, _, i = name.rpartition(".")
        parameter = parameters[int(i)]
        # `step` too: a fused AdamW counts where it computes, which Optimizer.load_state_dict keeps to as well
        optimiser.state[parameter][kind] = value.to(parameter.device)
    progress.curve.extend(about["curve"])
    progress.left, progress.seconds = about["left"], about["seconds"]


def _order(n: int, size: int, seed: int) -> Iterator[tuple[list[int], bool]]:
    """Optimiser batches for ever: a seeded shuffle an epoch, and whether the batch ends it."""
    rng = random.Random(seed)
    while True:
        indices = list(range(n))
        rng.shuffle(indices)
        for start in range(0, n, size):
            yield indices[start : start + size], start + size >= n


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return float(torch.stack([t.norm() for t in tensors if t is not None]).norm())
