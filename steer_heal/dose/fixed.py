"""Doses fixed beforehand: every prompt is answered at each of them, and the filter keeps what is still sound."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from steer_heal.dose import Dose, Found, Trials


class Fixed(Dose):
    """A list of coefficients."""

    name: Literal["fixed"]
    alpha: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)

    def count(self) -> int:
        return len(self.alpha)

    def find(self, trials: Trials) -> Found:
        return Found(self.alpha)
