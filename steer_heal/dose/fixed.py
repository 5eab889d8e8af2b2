"""Doses fixed beforehand: every prompt is answered at each of them, and the filter keeps what is still sound."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from steer_heal.dose import Dose


class Fixed(Dose):
    """A list of coefficients."""

    name: Literal["fixed"]
    alpha: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)

    def alphas(self) -> tuple[float, ...]:
        return self.alpha
