"""nll and divergence at completion positions, exact over the whole vocabulary, in bounded memory.

A position's nll and divergence depend on its own state alone, and the head is frozen. So their gradients with respect
to that state, [n, d] each, are taken chunk by chunk while the logits exist, and kept instead of the logits: whatever
the aggregation and the hinge make of the values afterwards only scales each position's gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer_heal.divergence import kl_fwd, kl_rev
from steer_heal.model import head
from steer_heal.reg import Regulariser

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def positions(
    model: PreTrainedModel, hidden: Tensor, reference: Tensor, targets: Tensor, reg: Regulariser, chunk: int
) -> tuple[Tensor, Tensor]:
    """nll [n] and divergence [n] (zeros without a barrier), nats, float32, differentiable in `hidden` [n, d].

    `reference` holds the reference's states [n, d] at the same positions; the model's head serves both.
    """
    values: tuple[Tensor, Tensor] = _Positions.apply(hidden, reference, targets, model, reg, chunk)  # type: ignore[no-untyped-call]
    return values


class _Positions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, reference: Tensor, targets: Tensor, model: PreTrainedModel,
        reg: Regulariser, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        parts = []
        for h, r, t in zip(hidden.split(chunk), reference.split(chunk), targets.split(chunk), strict=True):
            with torch.enable_grad():
                state = h.detach().requires_grad_()
                logits = head(model, state)
                nll = torch.nn.functional.cross_entropy(logits, t, reduction="none")
                (slope_nll,) = torch.autograd.grad(nll.sum(), state, retain_graph=reg.has_barrier)
                d, slope_d = torch.zeros_like(nll), torch.zeros_like(slope_nll)
                if reg.has_barrier:
                    with torch.no_grad():
                        fixed = head(model, r)
                    d = reg.divergence(logits, fixed)
                    (slope_d,) = torch.autograd.grad(d.sum(), state)
            parts.append((nll.detach(), d.detach(), slope_nll, slope_d))
        nll, d, slope_nll, slope_d = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(slope_nll, slope_d)
        return nll, d

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope_nll, slope_d = ctx.saved_tensors
        slope = grads[0][:, None] * slope_nll + grads[1][:, None] * slope_d
        return slope.to(slope_nll.dtype), None, None, None, None, None


@torch.no_grad()
def both_divergences(
    model: PreTrainedModel, hidden: Tensor, reference: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """KL(reference || student) [n] and KL(student || reference) [n] at states [n, d], nats, without gradient."""
    parts = []
    for h, r in zip(hidden.split(chunk), reference.split(chunk), strict=True):
        student, fixed = head(model, h), head(model, r)
        parts.append((kl_fwd(student, fixed), kl_rev(student, fixed)))
    forward, reverse = (torch.cat(column) for column in zip(*parts, strict=True))
    return forward, reverse
