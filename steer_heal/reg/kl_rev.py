"""A barrier on KL(student || reference).

    loss = nll + lam * relu(sum_v q (log q - log p) - tau),    p: reference, q: student

Mode-seeking: it is costly where the student says what the reference finds unlikely, which forbids nonsense. It is
measured at the positions of the kept texts, which the steered model wrote. RLHF penalises the same divergence, but on
the student's own samples (Ziegler et al. 2019, arXiv:1909.08593).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from steer_heal.lm.divergence import kl_rev, kl_rev_value_and_grad
from steer_heal.reg import Barrier


class KlRev(Barrier, key="steer_heal.reg.kl_rev.KlRev"):
    """Reverse KL."""

    name: Literal["kl_rev"]

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        return kl_rev(student, reference)

    def value_and_grad(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        return kl_rev_value_and_grad(log_q, log_p)
