"""Checks that a heal's curves look as they should, in words."""

from __future__ import annotations

from steer_heal.artifacts import Adapter, Row
from steer_heal.heal.drift import Drift
from steer_heal.lm.kl import SPREAD, spread
from steer_heal.reg import WEAK_DECAY, Regulariser, mean_of, sentence

FOLD_BIAS = 0.1  # of the change of states, by which the rounded weights may fall short of the adapter or go beyond it
SHOWN = 3  # of the worst positions, in the log


def diagnose(adapter: Adapter, reg: Regulariser) -> list[str]:
    """One sentence for each expectation, beginning with `ok` or `warning`."""
    curve, summary = adapter.curve, adapter.summary
    window = max(1, min(5, len(curve) // 2))
    first, last = mean_of(curve[:window], "nll"), mean_of(curve[-window:], "nll")
    found = [sentence(last < first, f"nll went from {first:.3f} to {last:.3f}"), *reg.diagnose(curve, summary)]
    values = [row["val_nll"] for row in curve if "val_nll" in row]
    if values:
        found.append(sentence(values[-1] < values[0], f"val_nll went from {values[0]:.3f} to {values[-1]:.3f}"))
    else:
        found.append(sentence(False, "no held-out answer passed the filters, so val_nll is not measured"))
    carried = summary["fold_projection"]
    told = f"added to the weights, the adapter moves states {carried:.2f} times as far as at work"
    found.append(sentence(abs(carried - 1) < FOLD_BIAS, told))
    if summary["n_too_long"]:
        found.append(sentence(False, f"{summary['n_too_long']:.0f} completions had no token left within heal.max_len"))
    return found


def worst_positions(drift: Drift) -> list[str]:
    """One line on the spread over all positions, then the positions farthest from the reference, in context."""
    figures = spread(drift.of("kl_rev"), "kl_rev")
    over = ", ".join(f"{name} {figures[f'kl_rev_{name}']:.3f}" for name in SPREAD)
    shown = [f"per position, KL(student || reference): {over} nats; worst (kl_rev, kl_fwd):"]
    return shown + [
        f"  {place.kl_rev:6.2f} {place.kl_fwd:6.2f}  {place.before[-60:]!r} -> {place.token!r}"
        for place in drift.worst[:SHOWN]
    ]


def is_nll(row: Row) -> bool:
    """True if a round's barrier never fired or costs nothing, or its decay hardly acted: it is nll in all but name.

    `row` holds the figures of the round, as `Round.row` names them.
    """
    free_barrier = row["heal_barrier"] and (not row["heal_barrier_on"] or row.get("heal_idle"))
    return bool(free_barrier or (row["heal_decays"] and row["heal_shrink"] < WEAK_DECAY))
