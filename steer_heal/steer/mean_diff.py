"""Difference of means (Marks & Tegmark 2023, arXiv:2310.06824; Rimsky et al. 2023, arXiv:2312.06681).

    v_l = mean over contexts x of  h_l(positive persona + x) - h_l(negative persona + x)

What the two personas have in common cancels; the remainder, averaged over many topics, is what distinguishes them.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from steer_heal.steer import Method


class MeanDiff(Method, key="steer_heal.steer.mean_diff.MeanDiff"):
    """The mean difference, unchanged."""

    name: Literal["mean_diff"]

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        return (positive - negative).mean(0)
