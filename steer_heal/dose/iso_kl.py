"""Equal strength for every vector: the dose at which steering moves next-token distributions by a number of nats.

    alpha = max { a :  95th percentile over positions of  KL(student steered at a || student)  <=  target }

over the positions of the student's answers when steered at a. A dose in norms means different things for different
directions, layers and models; this one means the same for all, in the unit of the barrier's tau. The 95th percentile is
used instead of the mean, since the few positions that are pushed farthest are what breaks a text.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from steer_heal.dose import Search, Trials


class IsoKl(Search, key="steer_heal.dose.iso_kl.IsoKl"):
    """Search by divergence from the unsteered student."""

    figure: ClassVar[str] = "kl_p95"
    name: Literal["iso_kl"]
    target: float = Field(gt=0)  # nats

    def measure(self, trials: Trials, dose: float) -> float:
        return trials.divergence(dose, self.samples)

    def passes(self, value: float) -> bool:
        return value <= self.target
