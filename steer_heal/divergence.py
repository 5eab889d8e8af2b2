"""Divergences between next-token distributions, per position, and how a sequence's positions become one number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Aggregator = Literal["mean", "rmse", "p95", "max"]


def kl_fwd(student: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || student) [n] of logits [n, v], nats: mass-covering, dear where the student drops a choice."""
    log_q, log_p = student.log_softmax(-1), reference.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_rev(student: Tensor, reference: Tensor) -> Tensor:
    """KL(student || reference) [n] of logits [n, v], nats: mode-seeking, dear where the student invents a choice."""
    log_q, log_p = student.log_softmax(-1), reference.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


_AGGREGATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "rmse": lambda x: torch.linalg.vector_norm(x) / len(x) ** 0.5,  # unlike sqrt, its gradient at 0 is 0, not NaN
    "p95": lambda x: torch.quantile(x, 0.95),
    "max": torch.max,
}


def aggregate(values: Tensor, lengths: Sequence[int], how: Aggregator) -> Tensor:
    """One number a sequence [b] from values [n] that stand sequence after sequence."""
    return torch.stack([_AGGREGATORS[how](part) for part in values.split(list(lengths))])
