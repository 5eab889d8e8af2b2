"""Healing: distil kept completions into a LoRA under a regulariser, `loss = nll + mean_b penalty(D_b)`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer_heal import lora as adapters
from steer_heal.artifacts import Adapter, Completions, Row, States
from steer_heal.heal.distil import Heal
from steer_heal.heal.reference import Targets
from steer_heal.heal.training import HealError, Progress, Training, train
from steer_heal.lm.attention import short_sequences
from steer_heal.lm.batch import Pair, collate, states
from steer_heal.lm.frozen_blocks import freeze, training_blocks
from steer_heal.lm.score import score
from steer_heal.lm.student import Student
from steer_heal.lora import Lora
from steer_heal.reg import Regulariser
from steer_heal.runtime import Runtime
from steer_heal.store import stage
from steer_heal.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Heal", "HealError", "heal"]

PROBED = 4  # sequences on which the folded weights are compared with the live adapter


@stage("heal.heal")
def heal(
    config: Heal, lora: Lora, reg: Regulariser, student: Student, reference: Callable[[], States],
    filtered: Completions, held_out: Completions, seed: int, *, runtime: Runtime, log: Callable[[Row], None],
    checkpoint: Checkpoint | None = None,
) -> Adapter:  # fmt: skip
    """Train a fresh adapter on the kept rows of `filtered`, calling `log` with every step's metrics. Raises HealError.

    Divergences are measured against the states that `reference` returns for `Targets.of` these rows.
    An earlier attempt that `checkpoint` holds is resumed, to the same result.

    nll in nats/token, kl in nats, gnorm before clipping. `val_nll` is that of held-out rows that failed no filter.
    """
    usable, check = (Targets.of(rows, config.max_len).pairs for rows in (filtered.kept(), held_out.passed()))
    if not usable:
        raise HealError(f"none of {len(filtered.kept())} completions fits heal.max_len={config.max_len}; raise it")
    student.base.check_pristine()
    progress, pad_id, fixed = Progress(), student.base.pad_id, reference().states
    with (
        student.view() as model,
        training_blocks(model, runtime),
        adapters.live_adapter(lora, model, seed) as wrapped,
    ):
        before = _probe_states(model, usable[:PROBED], pad_id)  # B is 0: the student as it was
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        lowest = lora.lowest(model)
        frozen = freeze(model, usable, lowest, pad_id, runtime.score_batch) if lowest else None
        training = Training(config, reg, model, parameters, usable, fixed, frozen, pad_id, runtime)
        validate = lambda: _mean_nll(model, check, pad_id, runtime)  # noqa: E731
        try:
            train(training, progress, validate, seed, log, checkpoint)
        except HealError as error:
            if checkpoint is None or not progress.curve:
                raise
            good = Adapter(adapters.config_record(wrapped), adapters.factors(wrapped), tuple(progress.curve), {})
            raise HealError(f"{error}. The last good adapter is in {checkpoint.keep(good)}") from None
        learned, record = adapters.factors(wrapped), adapters.config_record(wrapped)
        live = _probe_states(model, usable[:PROBED], pad_id)
    if not _has_signal(live):  # no further step ran to notice it
        raise HealError(f"the last step left states that are not finite, or all 0; {training.slower()}")
    curve = progress.curve
    summary: Row = {
        "steps": len(curve), "n_train": len(usable), "n_too_long": len(filtered.kept()) - len(usable),
        "barrier": float(reg.has_barrier), "idle": float(reg.is_noop), "decays": float(reg.decays),
        "shrink": 1 - progress.left, "kl_start": curve[0]["kl"],
        "heal_nll": sum(row["nll"] for row in curve[-5:]) / len(curve[-5:]),
        "barrier_on": sum(row["barrier_on"] for row in curve) / len(curve),
        "seconds": progress.seconds + time.monotonic() - progress.begun,
    }  # fmt: skip
    adapter = Adapter(config=record, factors=learned, curve=tuple(curve), summary=summary)
    with student.learn(adapter).view() as model, short_sequences(model):
        folded = _probe_states(model, usable[:PROBED], pad_id)
    if not _has_signal(folded):
        raise HealError(f"added to the weights, the adapter gives states not finite, or all 0; {training.slower()}")
    figures = {"delta_norm": adapter.norm()} | _fold_figures(before, live, folded)
    return replace(adapter, summary=summary | figures)


def _mean_nll(model: PreTrainedModel, pairs: Sequence[Pair], pad_id: int, runtime: Runtime) -> float | None:
    """Return the mean over sequences of their mean nll, nats/token; None if there is nothing to validate on."""
    if not pairs:
        return None
    values = score(model, pairs, pad_id=pad_id, micro_batch=runtime.score_batch, what="validate")
    return sum(float(-v.mean()) for v in values) / len(values)


def _fold_figures(before: Tensor, live: Tensor, folded: Tensor) -> Row:
    """Return how far a round moved the states, and what of that the rounded weights give, from states [n, d].

    `fold_projection` is 1 if nothing is lost on average, `fold_error` the distance relative to the change.
    """
    learned, applied = live - before, folded - before
    change = float(learned.norm())
    return {
        "state_change": change / float(before.norm()),
        "fold_error": float((applied - learned).norm()) / change if change else 0.0,
        "fold_projection": float((applied * learned).sum()) / change**2 if change else 1.0,
    }


def _has_signal(states: Tensor) -> bool:
    """Return True if states are finite and not all 0: where squares overflow, a norm layer makes every state 0."""
    return bool(states.isfinite().all() and states.any())


@torch.no_grad()
def _probe_states(model: PreTrainedModel, pairs: Sequence[Pair], pad_id: int) -> Tensor:
    return states(model, collate(pairs, pad_id, model.device)).float()
