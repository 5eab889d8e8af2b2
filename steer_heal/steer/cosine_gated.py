"""The mean difference, added the more a state lacks it (after the cosine gate of Lee et al. 2024, arXiv:2409.05907).

    h <- h + alpha g(h) v,   g(h) = (1 - cos(h - m, v)) / 2,   m the mean state of both personas

A state that already points towards the positive persona gets nothing, one at a right angle gets half, and one that
points away gets all of it. Lee et al. switch a vector on above a threshold of similarity to another vector; here the
vector is its own condition and the gate needs no threshold. States of ordinary text are at about a right angle, so a
dose has about half of its effect with mean_diff.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from steer_heal.lm.hooks import Operation
from steer_heal.steer import Method


class Gate(Operation, name="gate"):
    """h <- h + alpha (1 - cos(h - m, v)) / 2 v."""

    needs_centre: ClassVar[bool] = True

    def __init__(self, coefficient: Tensor, direction: Tensor, centre: Tensor | None, dtype: torch.dtype) -> None:
        assert centre is not None
        self.shift, self.unit, self.centre = (coefficient * direction).to(dtype), direction / direction.norm(), centre

    def __call__(self, h: Tensor) -> Tensor:
        away = h.float() - self.centre
        cosine = (away @ self.unit) / away.norm(dim=-1).clamp(min=1e-12)  # [b, s]
        changed: Tensor = h + ((1 - cosine) / 2)[..., None].to(h.dtype) * self.shift
        return changed


class CosineGated(Method, key="steer_heal.steer.cosine_gated.CosineGated"):
    """The mean difference behind a gate."""

    operation: ClassVar[type[Operation]] = Gate
    name: Literal["cosine_gated"]

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        return (positive - negative).mean(0)
