"""Run a linear layer and its LoRA in one step, instead of PEFT's forward with its five passes over [b, s, out]."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import peft


class _LoraLinear(torch.autograd.Function):
    """x W' + b + scaling (x A') B' of x [..., in], W [out, in], A [r, in], B [out, r], with gradients in x, A, B.

    A and B are float32 and multiply in x's dtype; the low-rank product is added to the layer's output in place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        flat, a, b = x.flatten(0, -2), a.to(x.dtype), b.to(x.dtype)
        inner = flat @ a.T
        out = nn.functional.linear(flat, weight, bias).addmm_(inner, b.T, alpha=scaling)
        ctx.save_for_backward(flat, weight, a, b, inner)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, inner = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        back = (grad @ b).mul_(ctx.scaling)
        to_a, to_b = back.T @ flat, (grad.T @ inner).mul_(ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (grad @ weight).addmm_(back, a).view(*grads[0].shape[:-1], weight.shape[1])
        return to_x, None, None, to_a, to_b, None  # autograd casts to_a and to_b to A's and B's dtype


def fuse(wrapped: peft.PeftModel) -> None:
    """Give every adapted plain linear layer the fused forward. Others, such as quantised ones, keep PEFT's."""
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    for layer in wrapped.modules():
        if isinstance(layer, Linear):
            base = layer.get_base_layer()
            if type(base) in (nn.Linear, Conv1D) and not (base._forward_hooks or base._forward_pre_hooks):
                transposed = isinstance(base, Conv1D)
                layer.forward = partial(_forward, layer, base, transposed)  # type: ignore[method-assign]


def _forward(layer: Any, base: Any, transposed: bool, x: Tensor) -> Tensor:
    found: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, base.weight.T if transposed else base.weight, base.bias,
        layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"],
    )  # fmt: skip
    return found
