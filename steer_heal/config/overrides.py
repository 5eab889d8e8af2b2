"""Names for the cells of a sweep: by the overrides in which they differ."""

from __future__ import annotations

from collections.abc import Sequence


def differing(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    """The overrides of each cell that not all cells have, in the order given."""
    shared = set[str].intersection(*map(set, cells)) if cells else set[str]()
    return [[override for override in cell if override not in shared] for cell in cells]
