"""Doses fixed beforehand: every prompt is answered at each of them, and the filters drop what is broken."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from steer_heal.dose import Dose, DoseSearch, Trials


class Fixed(Dose, key="steer_heal.dose.fixed.Fixed"):
    """A list of coefficients."""

    name: Literal["fixed"]
    alpha: tuple[Annotated[float, Field(ge=0)], ...] = Field(min_length=1)

    def count(self) -> int:
        return len(self.alpha)

    def find(self, trials: Trials) -> DoseSearch:
        return DoseSearch(self.alpha)
