"""What a heal's curves should look like, and whether they do, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loguru import logger

from steer_heal.artifacts import Adapter, Row
from steer_heal.reg import Regulariser
from steer_heal.tracking import Tracker

ROWS = 20  # about as many lines of a curve in the log
WEAK_DECAY = 0.10  # a total shrink under this is nll by another name


class CurveLog:
    """Tracks every row of a heal's curve, and shows about `ROWS` of them under a line saying what to expect."""

    def __init__(self, reg: Regulariser, steps: int, tracker: Tracker, offset: int) -> None:
        self.reg, self.tracker, self.offset = reg, tracker, offset
        self.every, self.last, self.seen = max(1, math.ceil(steps / ROWS)), steps - 1, 0

    def __call__(self, row: Row) -> None:
        """A row as it is made."""
        if self.seen == 0:
            logger.info("healing with {}: expect that {}", self.reg.name, self.reg.expectation())
            logger.info("{:>6} {:>7} {:>7} {:>7} {:>7}", "step", "nll", "kl", "loss", "gnorm")
        if row["step"] % self.every == 0 or row["step"] == self.last:
            figures = [f"{row[name]:7.3f}" for name in ("nll", "kl", "loss", "gnorm")]
            logger.info("{:>6} {}", int(row["step"]), " ".join(figures))
        self._track(row)

    def replay(self, adapter: Adapter) -> None:
        """The rows that came from the store instead."""
        if self.seen == 0:
            logger.info("heal with {}: served from the store, {} steps", self.reg.name, len(adapter.curve))
        for row in adapter.curve[self.seen :]:
            self._track(row)

    def _track(self, row: Row) -> None:
        self.seen += 1
        step = {"heal/step": self.offset + row["step"]}
        self.tracker.log(step | {f"heal/{name}": value for name, value in row.items() if name != "step"})


def check(adapter: Adapter) -> list[str]:
    """One sentence an expectation, each beginning with `ok` or `LOOK`."""
    curve, summary = adapter.curve, adapter.summary
    first, last = _mean(curve[:5], "nll"), _mean(curve[-5:], "nll")
    found = [
        _say(last < first, f"nll fell from {first:.3f} to {last:.3f}", f"nll did not fall: {first:.3f} to {last:.3f}")
    ]
    finite = all(math.isfinite(row["gnorm"]) for row in curve)
    found.append(_say(finite, "gnorm was finite throughout", "gnorm was not finite"))
    highest = max(row["kl"] for row in curve)
    if summary["barrier"]:
        on = summary["barrier_on"]
        if highest <= 0 or on == 0:
            found.append(f"LOOK: the barrier never passed tau (kl at most {highest:.3f}): this *is* nll")
        else:
            found.append(_say(on < 0.9, f"the barrier was on for {on:.0%} of the sequences, kl at most {highest:.3f}",
                              f"the barrier was on for {on:.0%} of the sequences: it outweighs nll nearly always"))  # fmt: skip
    else:
        found.append(_say(highest == 0, "kl in the loss stayed 0", "kl in the loss was not 0"))
    if 0 < summary["shrink"] < WEAK_DECAY:
        found.append(f"LOOK: the decay shrank the weights by only {summary['shrink']:.1%} in all: this *is* nll")
    elif summary["shrink"]:
        found.append(f"ok: the decay shrank the weights by {summary['shrink']:.0%} in all")
    if "val_nll" in curve[0]:
        values = [row["val_nll"] for row in curve if "val_nll" in row]
        found.append(
            _say(min(values[1:], default=values[0]) < values[0], f"val_nll went from {values[0]:.3f} to {values[-1]:.3f}",
                 f"val_nll did not fall: {values[0]:.3f} to {values[-1]:.3f}"))  # fmt: skip
    return found


def _say(good: bool, well: str, badly: str) -> str:
    return f"ok: {well}" if good else f"LOOK: {badly}"


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
