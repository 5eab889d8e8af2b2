"""Stochastic rounding to bfloat16: a number lies between two neighbours and becomes either, so that the mean is exact.

A learned change is often smaller than half the distance between neighbouring weights. Rounding to nearest then drops it
entirely, and drops most of a weak adapter (Gupta et al. 2015, arXiv:1502.02551).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

LOW_BITS = 16  # bits of a float32 that bfloat16 lacks
HALF = 1 << (LOW_BITS - 1)


def round_to(exact: Tensor, dtype: torch.dtype, name: str, seed: int) -> Tensor:
    """Round float32 `exact` (overwritten) to `dtype`: stochastically to bfloat16, to nearest to anything else.

    The noise depends on `name` and `seed` and not on the values. So a weight is a step function of whatever is added to
    it, with a step at the same place for everything that shares the name and the seed; and a number that bfloat16 holds
    exactly stays as it is.
    """
    if dtype != torch.bfloat16:
        return exact.to(dtype)
    broken = exact.isnan()  # noise could carry such a number's bits over the sign, to a plain zero
    bits = exact.contiguous().view(torch.int32)  # sign and magnitude: adding to the bits adds to the magnitude
    bits.view(-1).add_(noise(bits.numel(), name, seed, bits.device)).add_(HALF)
    rounded = bits.bitwise_right_shift_(LOW_BITS).to(torch.int16).view(torch.bfloat16)
    return rounded.masked_fill_(broken, torch.nan)


def noise(n: int, name: str, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return `n` uniform integers in [-2^15, 2^15), int16; `HALF` more is what is added to a number's low bits."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    drawn = torch.empty(n // 4 + 1, dtype=torch.int64, device=device)
    return drawn.random_(-(2**63), None, generator=generator).view(torch.int16)[:n]  # four numbers from each draw
