"""Coverage of the intervals of a contrast at matched trait: python scripts/interval_coverage.py [--replicates 4000]

Seeds and items are drawn anew in every replicate, students are matched by their gates on the items drawn, and the
interval is checked against the contrast that all seeds and all items together would have. Prints the share of
replicates whose 95 % interval holds it (without a difference, and with one of three standard errors): of all of V, and
of seeds alone (*on these items*); how often a difference of 0 is taken for one; and how often that of three is found.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from steer_heal.report.stats import Matched, Point, contrast, slope

PROBES, TEXTS = 48, 24
TARGET = 0.4  # nats
FULL = 1.0  # mean trait gain at gate 1
GATES = (0.25, 0.5, 0.75, 1.0)
TOTAL = 0.008  # standard deviation of a contrast between two worlds, nats/token
Rows = np.ndarray


@dataclass(frozen=True)
class World:
    """Standard deviations: of a seed's damage, and of an item's."""

    seeds: int
    seed_sd: float
    item_sd: float

    @classmethod
    def of(cls, seeds: int, by_seeds: float, by_items: float) -> World:
        """Variance of the contrast split by_seeds : by_items, the latter half by texts and half by probes."""
        share = by_seeds / (by_seeds + by_items)
        return cls(seeds, TOTAL * np.sqrt(share * seeds), TOTAL * np.sqrt((1 - share) / 2))


def replicate(world: World, rng: np.random.Generator, difference: float) -> tuple[bool, bool, bool]:
    """Whether the interval holds the true contrast: of all of V, of seeds alone; and whether 0 is outside."""
    curve = {"ours": 0.30 + difference / TARGET**2, "control": 0.30}  # D = curve T^2 on average
    kappa = 2 * 0.30 * TARGET
    students: dict[str, list[Matched]] = {}
    for name, bend in curve.items():
        # an item reacts to a regulariser in a way of its own, in all seeds alike, and in each seed a little otherwise
        probe = rng.normal(FULL, 0, PROBES) + rng.normal(
            0, world.item_sd * np.sqrt(PROBES / 2) / kappa / TARGET, PROBES
        )
        text = rng.normal(0, world.item_sd * np.sqrt(TEXTS / 2), TEXTS)
        students[name] = [
            student(probe + rng.normal(0, 0.02, PROBES), text + rng.normal(0, 0.002, TEXTS), bend,
                    rng.normal(0, world.seed_sd / np.sqrt(2)))
            for _ in range(world.seeds)
        ]  # fmt: skip
    found = contrast(students["ours"], students["control"])
    inside = []
    for one in (found, found.on_these_items()):
        interval = one.interval()
        assert interval is not None
        inside.append(interval[0] <= difference <= interval[1])
    p = found.p()
    assert p is not None
    return inside[0], inside[1], p < 0.05


def student(probes: Rows, texts: Rows, bend: float, shift: float) -> Matched:
    """A student whose probes gain c times `probes`, and whose texts suffer bend (FULL c)^2 and c times the rest."""

    def at(c: float) -> tuple[Rows, Rows]:
        return c * probes, bend * (FULL * c) ** 2 + c / TARGET * (texts + shift)

    points = [Point(0.0, 0.0), *(Point(float(g.mean()), float(d.mean())) for g, d in map(at, GATES))]
    gains, damage = at(TARGET / probes.mean())
    return Matched(TARGET, gains, damage, slope([*points, Point(float(gains.mean()), float(damage.mean()))], TARGET))


def shares(world: World, replicates: int, difference: float, seed: int = 0) -> list[float]:
    """The three shares of `replicate` over many replicates."""
    rng = np.random.default_rng(seed)
    return [float(share) for share in np.mean([replicate(world, rng, difference) for _ in range(replicates)], axis=0)]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--replicates", type=int, default=4000)
    given = ask.parse_args()
    print("| variance, seeds : items | seeds | 95 % interval holds | of seeds alone | false alarms | finds 3 sd |")
    print("| --- | --- | --- | --- | --- | --- |")
    for by_seeds, by_items in ((4, 1), (1, 1), (1, 4)):
        for seeds in (5, 8, 12):
            world = World.of(seeds, by_seeds, by_items)
            whole, alone, alarms = shares(world, given.replicates, 0.0)
            held, _, power = shares(world, given.replicates, 3 * TOTAL, seed=1)
            print(
                f"| {by_seeds} : {by_items} | {seeds} | {whole:.1%}, {held:.1%} | {alone:.1%} | {alarms:.1%} "
                f"| {power:.0%} |"
            )


if __name__ == "__main__":
    main()
