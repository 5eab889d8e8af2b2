"""A barrier on KL(reference || student).

    loss = nll + lam * relu(sum_v p (log p - log q) - tau),    p: reference, q: student

Mass-covering: it is costly where the student drops a choice that the reference keeps open, which
preserves diversity.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from steer_heal.lm.divergence import kl_fwd, kl_fwd_value_and_grad
from steer_heal.reg import Barrier


class KlFwd(Barrier, key="steer_heal.reg.kl_fwd.KlFwd"):
    """Forward KL."""

    name: Literal["kl_fwd"]

    def divergence(self, student: Tensor, reference: Tensor) -> Tensor:
        return kl_fwd(student, reference)

    def value_and_grad(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        return kl_fwd_value_and_grad(log_q, log_p)
