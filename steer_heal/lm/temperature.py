"""Likelihood of text at other temperatures: how much of a loss is misplaced confidence, which one scalar takes away.

The nll of a text is a smooth function of log T. It is evaluated at nodes in the pass that scores the text, so that a
temperature can be fitted and applied afterwards without another pass (temperature scaling: Guo et al. 2017,
arXiv:1706.04599).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from steer_heal.lm.base import head
from steer_heal.lm.batch import Pair
from steer_heal.lm.score import parts, target_ids
from steer_heal.lm.tree import completion_states
from steer_heal.system.terminal import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = -1e4  # nats under the likeliest token; exp is 0 there
WIDEST = 4.0  # temperatures from 1 / WIDEST to WIDEST
# x in [-1, 1]; T = WIDEST ** x. Evenly spaced: 1 / T doubles every CHAINS nodes, so that a square gives the next exp.
# And in the middle of the range, where temperatures lie, the polynomial is truer than one through Chebyshev's nodes.
N_NODES, CHAINS = 13, 3
NODES = np.linspace(-1, 1, N_NODES)
TINY = 1e-19  # least number that is squared: the square of a smaller one is too slow to multiply


@dataclass(frozen=True)
class Scored:
    """One completion, means over its tokens: nll at T = 1 (nats/token), entropy (nats), nll at the nodes."""

    nll: float
    entropy: float
    at_nodes: tuple[float, ...]


@torch.no_grad()
def score_tempered(
    model: PreTrainedModel, pairs: Sequence[Pair], *, pad_id: int, micro_batch: int, what: str
) -> list[Scored]:
    """Score each completion given its prompt, at all temperatures at once."""
    found: list[Scored | None] = [None] * len(pairs)
    with bar(what, len(pairs)) as advance:
        for group, hidden in completion_states(model, pairs, pad_id=pad_id, size=micro_batch, advance=advance):
            targets = target_ids((pairs[i].completion for i in group), hidden.device)
            found_here = [_tempered(head(model, hidden[part]), targets[part]) for part in parts(model, hidden)]
            values = torch.cat(found_here).double().cpu()
            lengths = [len(pairs[i].completion) for i in group]
            for i, part in zip(group, values.split(lengths), strict=True):
                nll, entropy, *nodes = part.mean(0).tolist()
                found[i] = Scored(nll, entropy, tuple(nodes))
    return [one for one in found if one is not None]


def _tempered(logits: Tensor, targets: Tensor) -> Tensor:
    """Return [n, 2 + k] from logits [n, v], overwritten: nll, entropy, and nll at each node's temperature."""
    logits -= logits.amax(-1, keepdim=True)
    logits.clamp_(min=LEAST)  # a head may mask tokens by -inf, which times a weight of 0 would be no number
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    weights = logits.exp()
    total = weights.sum(-1)
    entropy = total.log() - torch.linalg.vecdot(weights, logits) / total
    at_nodes: dict[int, Tensor] = {}
    for chain in range(CHAINS):
        first = N_NODES - 1 - chain  # the highest temperature
        torch.mul(logits, WIDEST ** -NODES[first], out=weights).exp_()
        for node in range(first, -1, -CHAINS):
            if node != first:
                weights.clamp_(min=TINY).square_()
            at_nodes[node] = weights.sum(-1).log() - chosen * WIDEST ** -NODES[node]
    return torch.stack([total.log() - chosen, entropy, *(at_nodes[node] for node in range(N_NODES))], dim=1)


def best_temperature(curves: Sequence[Sequence[float]]) -> float:
    """Return the temperature at which the mean over texts of their nll is least, from their nll at the nodes."""
    mean = _coefficients(np.mean(curves, axis=0))
    turning = chebyshev.chebroots(chebyshev.chebder(mean))
    inside = turning[(abs(turning.imag) < 1e-9) & (abs(turning.real) <= 1)].real
    x = min([-1.0, 1.0, *inside.tolist()], key=lambda at: float(chebyshev.chebval(at, mean)))
    return float(WIDEST**x)


def nll_at(curve: Sequence[float], temperature: float) -> float:
    """Return a text's nll at a temperature, nats/token, from its nll at the nodes."""
    return float(chebyshev.chebval(math.log(temperature, WIDEST), _coefficients(np.asarray(curve))))


def _coefficients(values: np.ndarray) -> np.ndarray:
    """Return the Chebyshev coefficients of the polynomial through values [k] at the nodes."""
    return np.linalg.solve(chebyshev.chebvander(NODES, N_NODES - 1), values)
