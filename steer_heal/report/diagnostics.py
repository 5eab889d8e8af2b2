"""What a heal's curves should look like, and whether they do, in words."""

from __future__ import annotations

from collections.abc import Sequence

from loguru import logger

from steer_heal.artifacts import Adapter, Row
from steer_heal.heal.drift import Drift
from steer_heal.reg import Barrier, Regulariser
from steer_heal.tracker.wandb import Tracker

ROWS = 20  # about as many lines of a curve in the log
HEAVY = 0.9  # a barrier that is on for more of the sequences
HELD = 2.0  # times tau up to which a barrier can be said to hold kl
SHOWN = 3  # of the worst positions, in the log
WEAK_DECAY = 0.10  # a total shrink under this is nll by another name


class CurveLog:
    """Tracks every row of a heal's curve, and shows about `ROWS` of them under a line saying what to expect."""

    def __init__(self, reg: Regulariser, steps: int, tracker: Tracker, offset: int) -> None:
        self.reg, self.tracker, self.offset = reg, tracker, offset
        self.every, self.last, self.seen = max(1, round(steps / ROWS)), steps - 1, 0

    def __call__(self, row: Row) -> None:
        """A row as it is made."""
        if self.seen == 0:
            logger.info("healing with {}: expect that {}", self.reg.name, self.reg.expectation())
            logger.info("{:>6} {:>7} {:>7} {:>7} {:>7}", "step", "nll", "kl", "loss", "gnorm")
        if row["step"] % self.every == 0 or row["step"] == self.last:
            figures = [f"{round(row[name], 3) + 0.0:7.3f}" for name in ("nll", "kl", "loss", "gnorm")]
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


def check(adapter: Adapter, reg: Regulariser) -> list[str]:
    """One sentence an expectation, each beginning with `ok` or `LOOK`."""
    curve, summary = adapter.curve, adapter.summary
    window = max(1, min(5, len(curve) // 2))
    first, last = _mean(curve[:window], "nll"), _mean(curve[-window:], "nll")
    found = [_say(last < first, f"nll went from {first:.3f} to {last:.3f}")]
    shrink = summary["shrink"]
    if summary["barrier"]:
        found.append(_on_barrier(adapter, reg, window))
    if summary["decays"]:
        weak = "" if shrink >= WEAK_DECAY else ": this *is* nll"
        found.append(_say(shrink >= WEAK_DECAY, f"the decay shrank the weights by {shrink:.1%} in all{weak}"))
    values = [row["val_nll"] for row in curve if "val_nll" in row]
    if values:
        found.append(_say(values[-1] < values[0], f"val_nll went from {values[0]:.3f} to {values[-1]:.3f}"))
    else:
        found.append("LOOK: no held-out answer passed the filters, so val_nll is not measured")
    if summary["n_too_long"]:
        found.append(f"LOOK: {summary['n_too_long']:.0f} completions had no token left within heal.max_len")
    return found


def _on_barrier(adapter: Adapter, reg: Regulariser, window: int) -> str:
    """Never fired, without cost, not held, always on, or balanced."""
    curve, on = adapter.curve, adapter.summary["barrier_on"]
    highest, last = max(row["kl"] for row in curve), _mean(curve[-window:], "kl")
    if on == 0:
        return f"LOOK: the barrier never passed tau (kl at most {highest:.3f}): this *is* nll"
    if reg.idle:
        return "LOOK: the barrier costs nothing with lam=0: this *is* nll"
    said = f"barrier on for {on:.0%} of the sequences, kl at most {highest:.3f} and {last:.3f} at the end"
    if isinstance(reg, Barrier) and reg.limit > 0 and last > HELD * reg.limit:
        return f"LOOK: not held, nll outweighs it; a higher lam would: {said}, {last / reg.limit:.1f} times tau"
    return _say(on < HEAVY, f"{'balanced' if on < HEAVY else 'always on, it outweighs nll'}: {said}")


def places(drift: Drift) -> list[str]:
    """Where a heal has come farthest from its reference: a line on all positions, then the worst in their context."""
    figures = drift.summary()
    spread = ", ".join(f"{what} {figures[f'kl_rev_{what}']:.3f}" for what in ("p50", "p95", "max"))
    shown = [f"per position, KL(student || reference): {spread} nats; worst (kl_rev, kl_fwd):"]
    return shown + [
        f"  {place.kl_rev:6.2f} {place.kl_fwd:6.2f}  {place.before[-60:]!r} -> {place.token!r}"
        for place in drift.worst[:SHOWN]
    ]


def is_nll(summary: Row) -> bool:
    """Whether a barrier never fired or costs nothing, or a decay hardly bit, so that the run is nll by another name."""
    idle_barrier = summary["heal_barrier"] and (not summary["heal_barrier_on"] or summary.get("heal_idle"))
    return bool(idle_barrier or (summary["heal_decays"] and summary["heal_shrink"] < WEAK_DECAY))


def _say(good: bool, sentence: str) -> str:
    return f"{'ok' if good else 'LOOK'}: {sentence}"


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
