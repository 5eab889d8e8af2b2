"""No matching: students are measured whole, and compare in trait and damage at once."""

from __future__ import annotations

from typing import Literal

from steer_heal.match import Frontier, Gates, Match


class NoMatch(Match, key="steer_heal.match.none.NoMatch"):
    """Leaves frontier and matched point out."""

    name: Literal["none"]

    def target(self, steered_gain: float) -> None:
        return None

    def find(self, gates: Gates, target: float) -> Frontier:
        raise AssertionError("there is no target to match at")
