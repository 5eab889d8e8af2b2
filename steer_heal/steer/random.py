"""A random direction, the control: its effects are those of any push of that size.

v_l = a draw from a normal distribution, of the mean difference's norm
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steer_heal.steer import Method


class Random(Method, key="steer_heal.steer.random.Random"):
    """A direction independent of the personas."""

    name: Literal["random"]
    draw: int = Field(ge=0)  # seed of the direction

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        return torch.randn(positive.shape[1:], generator=torch.Generator().manual_seed(self.draw))

    def judge(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the mean difference, so that the control uses the layers of the method it is compared with."""
        return (positive - negative).mean(0)
