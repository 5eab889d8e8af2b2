"""nll and divergence at completion positions, exact over the whole vocabulary, in bounded memory.

A position's nll and divergence depend on its own state alone, and the head is frozen. So their gradients with respect
to that state, [n, d] each, are taken chunk by chunk while the logits exist, and kept instead of the logits: whatever
the aggregation and the hinge make of the values afterwards only scales each position's gradient.

In the logits the gradients are known in closed form (q - onehot for nll, q the student's probabilities), so a chunk is
gone over a few times, and autograd only takes them back through whatever the head does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steer_heal.lm.divergence import kl_both
from steer_heal.model import head
from steer_heal.reg import Regulariser

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Positions(NamedTuple):
    """Figures of n positions, nats, float32."""

    nll: Tensor  # [n], differentiable
    d: Tensor  # [n], the regulariser's divergence, differentiable; zeros without a barrier
    both: Tensor  # [2, n], KL(reference || student) and KL(student || reference); zeros unless measured


def positions(
    model: PreTrainedModel, hidden: Tensor, reference: Tensor, targets: Tensor, reg: Regulariser, chunk: int,
    measure: bool = False,
) -> Positions:  # fmt: skip
    """nll and divergence at the states `hidden` [n, d], differentiable in them; with `measure`, both divergences.

    `reference` holds the reference's states [n, d] at the same positions; the model's head serves both.
    """
    return Positions(*_Positions.apply(hidden, reference, targets, model, reg, chunk, measure))  # type: ignore[no-untyped-call]


class _Positions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, reference: Tensor, targets: Tensor, model: PreTrainedModel,
        reg: Regulariser, chunk: int, measure: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        n = len(hidden)
        nll, d, both = (hidden.new_zeros(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))
        slope_nll, slope_d = torch.empty_like(hidden), torch.zeros_like(hidden)
        for here in _even(n, chunk):
            with torch.enable_grad():
                state = hidden[here].detach().requires_grad_()
                logits = head(model, state)
            log_q = logits.detach().log_softmax(-1)
            if reg.has_barrier or measure:
                log_p = head(model, reference[here]).log_softmax(-1)
                if measure:
                    both[:, here] = kl_both(log_q, log_p)
                if reg.has_barrier:
                    d[here], slope = reg.slope(log_q, log_p)
                    if ctx.needs_input_grad[0]:
                        (slope_d[here],) = torch.autograd.grad(logits, state, slope, retain_graph=True)
                    del slope
                del log_p
            where = targets[here, None]
            nll[here] = -log_q.gather(-1, where)[:, 0]
            if ctx.needs_input_grad[0]:
                q = log_q.exp_()
                q.scatter_add_(-1, where, q.new_full(where.shape, -1))
                (slope_nll[here],) = torch.autograd.grad(logits, state, q)
        ctx.save_for_backward(slope_nll, slope_d)
        ctx.mark_non_differentiable(both)
        return nll, d, both

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope_nll, slope_d = ctx.saved_tensors
        slope = grads[0][:, None] * slope_nll + grads[1][:, None] * slope_d
        return slope.to(slope_nll.dtype), None, None, None, None, None, None


def _even(n: int, chunk: int) -> list[slice]:
    """n positions in parts of at most `chunk` and like size: a pass of few reads the head's weights all the same."""
    size = math.ceil(n / math.ceil(n / chunk))
    return [slice(start, start + size) for start in range(0, n, size)]


@torch.no_grad()
def both_divergences(model: PreTrainedModel, hidden: Tensor, reference: Tensor, chunk: int) -> Tensor:
    """KL(reference || student) and KL(student || reference) [2, n] at states [n, d], nats, without gradient."""
    parts = [
        kl_both(head(model, h).log_softmax(-1), head(model, r).log_softmax(-1))
        for h, r in zip(hidden.split(chunk), reference.split(chunk), strict=True)
    ]
    return torch.cat(parts, dim=1)
