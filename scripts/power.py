"""Which difference would so many seeds see? python scripts/power.py FOLDER... [--against nll]

Of each row of a comparison that is compared with the control: the smallest difference of damage at matched trait that
is found with a power of 80 % (two-sided, 5 %, one row), from the variances that the finished runs show, with other
numbers of seeds and the same numbers of probes and texts.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from steer_heal.report.comparison import compared
from steer_heal.report.replicates import gathered
from steer_heal.report.stats import detectable

SEEDS = (3, 5, 8, 12, 20)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folders", nargs="+", type=Path)
    ask.add_argument("--against")
    given = ask.parse_args()
    print("| row | sd over seeds | se of items |", " | ".join(f"{n} seeds" for n in SEEDS), "|")
    print("|", " | ".join(["---"] * (3 + len(SEEDS))), "|")
    for found in compared(gathered(given.folders), against=given.against):
        for line in found.lines:
            if line.contrast is None or line.contrast.seeds is None:
                continue
            spread = math.sqrt(line.contrast.seeds.variance * (line.contrast.seeds.df + 1))
            items = math.sqrt(sum(part.variance for part in line.contrast.items))
            cells = " | ".join(f"{detectable(line.contrast, n):.4f}" for n in SEEDS)
            print(f"| {line.row.label} | {spread:.4f} | {items:.4f} | {cells} |")


if __name__ == "__main__":
    main()
