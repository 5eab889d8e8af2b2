"""Divergences between next-token distributions, per position, and their aggregation to one number per sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Aggregator = Literal["mean", "rmse", "p95", "max"]


def kl_fwd(student: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || student) [n] of logits [n, v], nats: mass-covering, costly where the student drops a choice."""
    log_q, log_p = student.log_softmax(-1), reference.log_softmax(-1)
    return _dot(log_p.exp(), log_p - log_q)


def kl_rev(student: Tensor, reference: Tensor) -> Tensor:
    """KL(student || reference) [n] of logits [n, v], nats: mode-seeking, costly where the student adds a choice."""
    log_q, log_p = student.log_softmax(-1), reference.log_softmax(-1)
    return _dot(log_q.exp(), log_q - log_p)


def kl_fwd_value_and_grad(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return `kl_fwd` [n] of log-probabilities [n, v], and its gradient q - p [n, v] in the student's logits.

    Overwrites log_p.
    """
    p = log_p.exp()
    d = _dot(p, log_p.sub_(log_q))
    return d, torch.exp(log_q, out=log_p).sub_(p)


def kl_rev_value_and_grad(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return `kl_rev` [n] of log-probabilities [n, v], and its gradient q (log q - log p - D) [n, v] in student logits.

    Overwrites log_p.
    """
    q, surplus = log_q.exp(), torch.sub(log_q, log_p, out=log_p)
    d = _dot(q, surplus)
    return d, surplus.sub_(d[:, None]).mul_(q)


def kl_both(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return `kl_fwd` and `kl_rev` [2, n] of the student's and the reference's log-probabilities [n, v]."""
    surplus = log_q - log_p
    return torch.stack([-_dot(log_p.exp(), surplus), _dot(log_q.exp(), surplus)])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum a b over v [n], for [n, v], without holding their product in memory."""
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]


_AGGREGATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "rmse": lambda x: torch.linalg.vector_norm(x) / len(x) ** 0.5,  # unlike sqrt, its gradient at 0 is 0, not NaN
    "p95": lambda x: torch.quantile(x, 0.95),
    "max": torch.max,
}


def aggregate(values: Tensor, lengths: Sequence[int], how: Aggregator) -> Tensor:
    """Return one number per sequence [b] from values [n], concatenated sequence after sequence."""
    return torch.stack([_AGGREGATORS[how](part) for part in values.split(list(lengths))])
