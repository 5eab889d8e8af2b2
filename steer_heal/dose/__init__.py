"""How strongly to steer. A dose is a multiple of the vector's raw norm per layer."""

from __future__ import annotations

from steer_heal.config import Config


class Dose(Config):
    """Subclasses set `name` and implement `alphas`."""

    name: str

    def alphas(self) -> tuple[float, ...]:
        """The coefficients at which every prompt is answered."""
        raise NotImplementedError(type(self))
