"""A linear probe's direction (Alain & Bengio 2016, arXiv:1610.01644; for steering: Li et al. 2023, arXiv:2306.03341).

    v_l = w,  where  w, b = argmin  mean of log(1 + exp(-y (w · z + b))) + l2/2 |w|²

over the states z of both personas, y = +1 and -1, centred and divided by their root mean square norm, so that one l2
works for every layer and model. It finds what separates the personas best, even where their means differ for other
reasons: a direction in which states vary a lot within a persona gets little weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steer_heal.steer import Method

STEPS = 500  # maximum for L-BFGS; the problem is convex, and a few dozen suffice


class Logistic(Method, key="steer_heal.steer.logistic.Logistic"):
    """The normal of the plane that separates the personas."""

    name: Literal["logistic"]
    l2: float = Field(gt=0)

    def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
        return torch.stack([self._probe(positive[:, i], negative[:, i]) for i in range(positive.shape[1])])

    @torch.enable_grad()
    def _probe(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Fit the weights [d] of the probe between states [c, d]."""
        z = torch.cat([positive, negative]).double()
        z = z - z.mean(0)
        z = z / z.square().sum(-1).mean().sqrt()
        y = torch.cat([z.new_ones(len(positive)), -z.new_ones(len(negative))])
        w, b = z.new_zeros(z.shape[1], requires_grad=True), z.new_zeros(1, requires_grad=True)
        solver = torch.optim.LBFGS(
            [w, b], max_iter=STEPS, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            solver.zero_grad()
            value = torch.nn.functional.softplus(-y * (z @ w + b)).mean() + self.l2 / 2 * w.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        solver.step(loss)  # type: ignore[no-untyped-call]
        return w.detach().float()
