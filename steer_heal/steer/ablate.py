"""Directional ablation (Arditi et al. 2024, arXiv:2406.11717): remove the states' component along the direction.

    h <- h - alpha u (u . h),   u = v / |v|,   v the mean difference

A dose of 1 removes it completely. This does not push towards a persona: it removes what distinguishes the two, along
with anything else states carry on that axis. Arditi et al. ablate at every layer, as `steer.layers=[0.0,1.0]` does.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from steer_heal.lm.hooks import Operation
from steer_heal.steer import Method


class Remove(Operation, name="ablate"):
    """h <- h - alpha u (u . h)."""

    def __init__(self, coefficient: Tensor, direction: Tensor, centre: Tensor | None, dtype: torch.dtype) -> None:
        self.coefficient, self.unit = coefficient, direction / direction.norm()

    def __call__(self, h: Tensor) -> Tensor:
        wide = h.float()
        without: Tensor = wide - self.coefficient * (wide @ self.unit)[..., None] * self.unit
        return without.to(h.dtype)


class Ablate(Method, key="steer_heal.steer.ablate.Ablate"):
    """The mean difference, ablated."""

    operation: ClassVar[type[Operation]] = Remove
    name: Literal["ablate"]

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        return (positive - negative).mean(0)
