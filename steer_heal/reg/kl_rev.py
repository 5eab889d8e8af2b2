"""A barrier on KL(student || reference), the divergence that RLHF penalises (Ziegler et al. 2019, arXiv:1909.08593).

    loss = nll + lam * relu(sum_v q (log q - log p) - tau),    p: reference, q: student

Mode-seeking: it is dear where the student says what the reference finds unlikely, so nonsense is what it forbids.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from steer_heal.lm.divergence import kl_rev, kl_rev_slope
from steer_heal.reg import Barrier


class KlRev(Barrier):
    """Reverse KL."""

    name: Literal["kl_rev"]

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        return kl_rev(student, reference)

    def slope(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        return kl_rev_slope(log_q, log_p)
