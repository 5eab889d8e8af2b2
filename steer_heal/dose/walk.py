"""As strong as the text can bear: the highest dose at which a share of the answers still passes the filters.

    alpha = max { a :  mean over prompts x of  P(an answer to x, steered at a, passes)  >=  target }

Found by doubling or halving from 1 and then bisecting. Every trial answers each training prompt equally often and with
the same random numbers, so that doses differ in nothing else. Answers are then generated at shares of the dose found:
at low doses more of them pass the filters, at high doses they show more of the trait.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from steer_heal.dose import Search, Trials


class Walk(Search, key="steer_heal.dose.walk.Walk"):
    """Search by the share of answers that pass the filters."""

    filters: ClassVar[bool] = True
    figure: ClassVar[str] = "survival"
    name: Literal["walk"]
    target: float = Field(gt=0, le=1)  # share of the answers that must pass every filter

    def measure(self, trials: Trials, dose: float) -> float:
        return trials.pass_rate(dose, self.samples)

    def passes(self, value: float) -> bool:
        return value >= self.target
