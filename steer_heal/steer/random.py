"""A random direction: the control. What steering with it does, any push of that size does.

v_l = a draw from a normal distribution, of the mean difference's norm
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steer_heal.steer import Method


class Random(Method):
    """A direction that knows nothing of the personas."""

    name: Literal["random"]
    draw: int = Field(ge=0)  # which of them

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        return torch.randn(positive.shape[1:], generator=torch.Generator().manual_seed(self.draw))

    def judge(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The mean difference: a control is at the layers of what it is compared with."""
        return (positive - negative).mean(0)
