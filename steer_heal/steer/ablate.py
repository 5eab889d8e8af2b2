"""Directional ablation (Arditi et al. 2024, arXiv:2406.11717): states lose what they have along the direction.

    h <- h - alpha u (u . h),   u = v / |v|,   v the mean difference

A dose of 1 takes all of it. This does not push towards a persona: it takes away what tells the two apart, and with it
whatever else states carry along that axis. Arditi et al. ablate at every layer; `steer.layers=[0.0,1.0]` does.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from steer_heal.artifacts import How
from steer_heal.steer import Method


class Ablate(Method):
    """The mean difference, taken away."""

    how: ClassVar[How] = "ablate"
    name: Literal["ablate"]

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        return (positive - negative).mean(0)
