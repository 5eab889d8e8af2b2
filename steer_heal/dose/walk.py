"""As strong as the text can bear: the highest dose at which a share of the answers still passes the filters.

    alpha = max { a :  mean over prompts x of  P(an answer to x, steered at a, passes)  >=  target }

Found by doubling or halving from 1 and then bisecting. Every trial answers each training prompt equally often and draws
by the same numbers, so that doses differ in nothing else. Answers are then made at shares of the dose found: weak ones
are sound and strong ones tell more.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from steer_heal.dose import Search, Trials


class Walk(Search):
    """By survival of the filters."""

    filters: ClassVar[bool] = True
    figure: ClassVar[str] = "survival"
    name: Literal["walk"]
    target: float = Field(gt=0, le=1)  # share of the answers that must pass every filter

    def measure(self, trials: Trials, dose: float) -> float:
        return trials.survival(dose, self.samples)

    def passes(self, value: float) -> bool:
        return value >= self.target
