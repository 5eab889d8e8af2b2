"""Compute nll and divergence at completion positions, exact over the whole vocabulary, in bounded memory.

A position's nll and divergence depend on its own state alone, and the head is frozen. So their gradients with respect
to that state, [n, d] each, are computed chunk by chunk while the logits exist, and kept instead of the logits: the
aggregation and the hinge that follow only scale each position's gradient.

The gradients in the logits have a closed form (q - onehot for nll, q the student's probabilities), so each chunk takes
only a few passes, and autograd is needed only to propagate them back through the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steer_heal.lm.base import head
from steer_heal.lm.divergence import kl_both
from steer_heal.lm.score import even
from steer_heal.reg import Regulariser

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Positions(NamedTuple):
    """Values at n positions, nats, float32."""

    nll: Tensor  # [n], differentiable
    d: Tensor  # [n], the regulariser's divergence, differentiable; zeros without a barrier
    both: Tensor  # [2, n], KL(reference || student) and KL(student || reference); zeros unless measured


def positions(
    model: PreTrainedModel, hidden: Tensor, reference: Tensor, targets: Tensor, reg: Regulariser, chunk: int,
    measure: bool = False,
) -> Positions:  # fmt: skip
    """Return nll and divergence at the states `hidden` [n, d], differentiable in them; with `measure`, also both KLs.

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
        grad_nll, grad_d = torch.empty_like(hidden), torch.zeros_like(hidden)
        for here in even(n, chunk):
            with torch.enable_grad():
                state = hidden[here].detach().requires_grad_()
                logits = head(model, state)
            log_q = logits.detach().log_softmax(-1)
            if reg.has_barrier or measure:
                log_p = head(model, reference[here]).log_softmax(-1)
                if measure:
                    both[:, here] = kl_both(log_q, log_p)
                if reg.has_barrier:
                    d[here], slope = reg.value_and_grad(log_q, log_p)
                    if ctx.needs_input_grad[0]:
                        (grad_d[here],) = torch.autograd.grad(logits, state, slope, retain_graph=True)
                    del slope
                del log_p
            where = targets[here, None]
            nll[here] = -log_q.gather(-1, where)[:, 0]
            if ctx.needs_input_grad[0]:
                q = log_q.exp_()
                q.scatter_add_(-1, where, q.new_full(where.shape, -1))
                (grad_nll[here],) = torch.autograd.grad(logits, state, q)
        ctx.save_for_backward(grad_nll, grad_d)
        ctx.mark_non_differentiable(both)
        return nll, d, both

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_nll, grad_d = ctx.saved_tensors
        slope = grads[0][:, None] * grad_nll + grads[1][:, None] * grad_d
        return slope.to(grad_nll.dtype), None, None, None, None, None, None
