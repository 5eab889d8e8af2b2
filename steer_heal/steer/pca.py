"""First principal direction of the differences (Zou et al. 2023, arXiv:2310.01405).

    v_l = argmax over unit u of  sum over contexts x of ( u · ( h_l(positive + x) - h_l(negative + x) ) )²

The differences are not centred, since their mean is the signal; Zou et al. achieve the same by giving them random
signs. Unlike the mean, this weights a context by the squared distance between its personas. A principal direction has
no sign, so it takes the mean difference's, and its norm too.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from steer_heal.steer import Method


class Pca(Method, key="steer_heal.steer.pca.Pca"):
    """The direction along which the differences are largest."""

    name: Literal["pca"]

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        differences = (positive - negative).transpose(0, 1)  # [l, c, d]
        first: Tensor = torch.linalg.svd(differences.double(), full_matrices=False).Vh[:, 0]  # [l, d]
        mean = differences.double().mean(1)
        return (first * (first * mean).sum(-1, keepdim=True).sign()).float()
