"""No regulariser: plain sequence-level distillation (Kim & Rush 2016, arXiv:1606.07947), the control.

    loss = nll

A barrier or a decay has to do better than this.
"""

from __future__ import annotations

from typing import Literal

from steer_heal.reg import Regulariser


class Nll(Regulariser, key="steer_heal.reg.nll.Nll"):
    """The likelihood of the kept completions and nothing else."""

    name: Literal["nll"]

    def expectation(self) -> str:
        return "nll falls; kl, the divergence in the loss, stays 0; the measured kl_fwd and kl_rev rise freely"
