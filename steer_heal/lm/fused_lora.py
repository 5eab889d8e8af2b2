"""Run a linear layer and its LoRA as one matrix product; PEFT's forward makes five passes over [b, s, out].

One product also rounds once. In bfloat16 PEFT rounds the layer's output and then adds the low-rank part to it: what is
under half a step of the output vanishes, so a weak adapter acts less in training than once it is added to the weights.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import peft


class _LoraLinear(torch.autograd.Function):
    """x W' + b + scaling (x A') B' of x [n, in], A [r, in], B [out, r], with gradients in x, A, B.

    `wide` [out, in + r] holds W, and room for scaling B. A and B are float32 and multiply in x's dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, wide: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        a = a.to(x.dtype)
        inner = x @ a.T
        wide[:, x.shape[1] :] = scaling * b
        ctx.save_for_backward(x, a, b.to(x.dtype), inner)
        ctx.wide, ctx.scaling = wide, scaling  # not saved: B is written into it again, with the same values
        return nn.functional.linear(torch.cat([x, inner], dim=1), wide, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, inner = ctx.saved_tensors
        grad = grads[0]
        back = (grad @ b).mul_(ctx.scaling)
        to_a, to_b = back.T @ x, (grad.T @ inner).mul_(ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (grad @ ctx.wide[:, : x.shape[1]]).addmm_(back, a)
        return to_x, None, None, to_a, to_b, None  # autograd casts to_a and to_b to A's and B's dtype


def fuse(wrapped: peft.PeftModel) -> None:
    """Give every adapted plain linear layer the fused forward. Others, such as quantised ones, keep PEFT's.

    A layer's weight moves into a wider tensor: the caller puts the original back (`steer_heal.lm.base.restored`).
    """
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    for layer in wrapped.modules():
        if isinstance(layer, Linear):
            base: Any = layer.get_base_layer()
            if type(base) in (nn.Linear, Conv1D) and not (base._forward_hooks or base._forward_pre_hooks):
                turned = isinstance(base, Conv1D)
                weight = base.weight.data.T if turned else base.weight.data  # [out, in]
                n_in, r = weight.shape[1], layer.r["default"]
                wide = weight.new_empty(weight.shape[0], n_in + r)
                wide[:, :n_in] = weight
                inside = wide[:, :n_in]
                base.weight = nn.Parameter(inside.T if turned else inside, requires_grad=False)
                layer.forward = partial(_forward, layer, base, wide)  # type: ignore[method-assign]


def _forward(layer: Any, base: Any, wide: Tensor, x: Tensor) -> Tensor:
    flat: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x.flatten(0, -2), wide, base.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight,
        layer.scaling["default"],
    )  # fmt: skip
    return flat.view(*x.shape[:-1], flat.shape[1])  # a view made here may be added to in place, as Llama 4 does
