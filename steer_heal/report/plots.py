"""Plots: the curves of a sweep in one figure, and the drift of a run's positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from steer_heal.eval import Column
from steer_heal.heal.drift import Drift
from steer_heal.report.run_folder import Run, columns, figure

INK, GRID = "#222222", "#dddddd"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]  # Okabe & Ito


STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
         "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.titlesize": 10,
         "axes.titlelocation": "left", "axes.titleweight": "bold"}  # fmt: skip
ACROSS = 4  # panels in a row
TRADED = ("trait_gain", "damage")  # drawn against each other
FAINT = 1e-4  # nats; positions that diverge less are drawn at this value


def drift_histograms(drifts: Sequence[Drift], taus: Sequence[float | None], path: Path) -> Path:
    """Draw the distribution of all positions' divergences after each round, one panel per round."""
    with plt.rc_context(STYLE):
        n = len(drifts)
        drawing, axes = plt.subplots(1, n, figsize=(1 + 4 * n, 3.4), layout="constrained", sharey=True, squeeze=False)
        for k, (ax, drift, tau) in enumerate(zip(axes[0], drifts, taus, strict=True)):
            both = {name: drift.of(name) for name in ("kl_fwd", "kl_rev")}
            low = max(FAINT, min(float(values.quantile(0.01)) for values in both.values()))  # smaller ones count there
            top = max(10 * low, *(float(values.max()) for values in both.values()))
            bins = torch.logspace(math.log10(low), math.log10(top), 50).tolist()
            for (name, values), colour in zip(both.items(), COLOURS, strict=False):
                ax.hist(values.clamp(min=low).tolist(), bins, histtype="step", color=colour, lw=1.4, label=name)
            if tau is not None and tau > FAINT:
                ax.axvline(tau, color=INK, lw=0.8, ls="--", label="tau (of a sequence)")
            ax.set(xscale="log", title=f"round {k}: divergence per position", xlabel="nats", ylabel="positions")
            ax.legend(frameon=False)
        drawing.savefig(path, dpi=120)
        plt.close(drawing)
    return path


def curves(runs: list[Run], labels: list[str], path: Path) -> Path:
    """Draw nll, kl and gnorm over the steps, trait against damage, and a panel for each further outcome and damage."""
    others = [c for c in columns(runs) if c.role != "diagnostic" and (c.over_base or c.name) not in TRADED]
    below = math.ceil(len(others) / ACROSS)
    with plt.rc_context(STYLE):
        drawing, panels = plt.subplots(
            1 + below, ACROSS, figsize=(15, 3.6 + 2.9 * below), layout="constrained", squeeze=False
        )
        axes = panels.flatten()
        _lines(axes[0], runs, "nll", "nll of the kept text", "nats/token")
        _lines(axes[1], runs, "kl_rev", "KL(student ‖ reference), measured", "nats")
        taus, top = sorted({run.tau for run in runs if run.tau is not None}), axes[1].get_ylim()[1]
        axes[1].set_ylim(top=max([top, *(1.1 * tau for tau in taus if tau < 2 * top)]))  # one far above is not shown
        for k, tau in enumerate(taus):  # labels side by side, since lines may lie close together
            axes[1].axhline(tau, color=INK, lw=0.8, ls="--")
            axes[1].annotate(f"tau {tau:.3g}", (0, tau), xytext=(2 + 60 * (k % 3), 2), textcoords="offset points")
        _lines(axes[2], runs, "gnorm", "gradient norm before clipping", "")
        _trade(axes[3], runs)
        for k, (ax, column) in enumerate(zip(axes[ACROSS:], others, strict=False)):
            _cells(ax, runs, column, named=k == 0)
        for ax in axes[ACROSS + len(others) :]:
            ax.set_axis_off()
        handles = [plt.Line2D([], [], color=_colour(i), lw=2) for i in range(len(runs))]
        drawing.legend(
            handles,
            [label.replace("$", r"\$") for label in labels],
            loc="outside upper center",
            ncols=min(6, len(runs)),
            frameon=False,
        )
        drawing.savefig(path, dpi=120)
        plt.close(drawing)
    return path


def _cells(ax: Axes, runs: list[Run], column: Column, named: bool) -> None:
    """Draw a figure of each run's last round: healed as a dot, steered as a cross, base as a line; `named`: say so."""
    for i, run in enumerate(runs):
        row = run.headline
        for who, marker, colour in (("steered", "x", INK), ("healed", "o", _colour(i))):
            if (value := figure(row, who, column)) is not None:
                ax.scatter([i], [value], zorder=2, marker=marker, color=colour)
    base = 0.0 if column.over_base else figure(runs[0].headline, "base", column)
    if base is not None:
        ax.axhline(base, color=INK, lw=0.8, ls="--")
    if named and base is not None:
        ax.annotate("base", (-0.65, base), xytext=(0, 3), textcoords="offset points")
        if (steered := figure(runs[0].headline, "steered", column)) is not None:
            ax.annotate("steered", (0, steered), xytext=(7, 4), textcoords="offset points")
    aim = {"more": ", more is better", "less": ", less is better"}.get(column.better, "")
    ax.set(title=(column.over_base or column.name).replace("$", r"\$"), ylabel=f"{column.unit}{aim}", xticks=[])
    ax.set_xlim(-0.7, len(runs) - 0.3)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _lines(ax: Axes, runs: list[Run], name: str, title: str, unit: str) -> None:
    for i, run in enumerate(runs):
        rows = [row for row in run.heal if name in row]
        ax.plot([row["step"] for row in rows], [row[name] for row in rows], color=_colour(i), lw=1.4)
    ax.set(title=title, xlabel="step", ylabel=unit)
    ax.set_ylim(bottom=0 if name != "nll" else None)


def _trade(ax: Axes, runs: list[Run]) -> None:
    """Draw one path per run: from the steered to the healed model of each round."""
    ax.scatter([0], [0], marker="s", color=INK, zorder=3)
    ax.annotate("base", (0, 0), xytext=(5, 4), textcoords="offset points")
    for i, run in enumerate(runs):
        for row in run.rounds:
            x = [row["steered/damage"], row["healed/damage"]]
            y = [row[f"{who}/trait"] - row["base/trait"] for who in ("steered", "healed")]
            ax.plot(x, y, color=_colour(i), lw=0.8, ls=":", zorder=1)
            ax.scatter(x[:1], y[:1], marker="x", color=INK, zorder=2)
            ax.scatter(x[1:], y[1:], color=_colour(i), zorder=3)
    first = runs[0].rounds[0]
    ax.annotate("steered", (first["steered/damage"], first["steered/trait"] - first["base/trait"]),
                xytext=(-6, -12), textcoords="offset points", ha="right")  # fmt: skip
    ax.locator_params(axis="x", nbins=5)
    ax.set(title="trait against damage", xlabel="damage over base, nats/token", ylabel="trait over base, nats/token")
