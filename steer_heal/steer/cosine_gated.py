"""The mean difference, as strongly as a state lacks it (after the gate by cosine of Lee et al. 2024, arXiv:2409.05907).

    h <- h + alpha g(h) v,   g(h) = (1 - cos(h - m, v)) / 2,   m the mean state of both personas

A state that already points the way of the positive persona gets nothing, one at a right angle to it half, one that
points the other way all. Lee et al. switch a vector on above a threshold of similarity to another one; here the vector
is its own condition and the gate has no threshold to choose. States of ordinary text are about at a right angle, so a
dose does about half of what it does to mean_diff.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from steer_heal.artifacts import How
from steer_heal.steer import Method


class CosineGated(Method):
    """The mean difference behind a gate."""

    how: ClassVar[How] = "gate"
    name: Literal["cosine_gated"]

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        return (positive - negative).mean(0)
