"""Plots: the curves of a sweep in one figure, and the drift of a run's positions."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from steer_heal.eval import Column
from steer_heal.heal.drift import Drift
from steer_heal.report.replicates import frontier
from steer_heal.report.run_folder import Run, columns, figure
from steer_heal.report.styles import COLOURS, INK, Style, styled

GRID, GREY = "#dddddd", "#777777"


STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
         "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.titlesize": 10,
         "axes.titlelocation": "left", "axes.titleweight": "bold"}  # fmt: skip
ACROSS, WIDTH = 4, 15  # panels in a row; inches
TAUS, SAME = 8, 3  # at most: taus that are named, lines about runs that coincide
NOTE = 170  # letters a line below the picture
Entry = tuple[Line2D, str]  # of the legend
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


def curves(runs: Sequence[Run], labels: Sequence[str], path: Path) -> Path:
    """Draw nll, kl and gnorm over the steps, trait against damage, and a panel for each further outcome and damage.

    Lines that coincide are drawn once, and named below the picture by the runs' labels.
    """
    others = [c for c in columns(list(runs)) if c.role != "diagnostic" and (c.over_base or c.name) not in TRADED]
    below, styles = math.ceil(len(others) / ACROSS), styled(runs, labels)
    colours, ways = _legend(styles)
    across = max(1, int(WIDTH / (0.75 + 0.075 * max(len(name) for _, name in colours + ways))))  # inches an entry
    if len(entries := colours + ways) > across and ways:  # each kind begins a row
        entries = colours + [(Line2D([], [], alpha=0), "")] * (-len(colours) % across) + ways
    across = min(across, len(entries))
    by_row = [entry for k in range(across) for entry in entries[k::across]]  # a legend is filled column by column
    height = 3.6 + 2.9 * below + 0.2 * math.ceil(len(entries) / across)
    with plt.rc_context(STYLE):
        drawing, panels = plt.subplots(1 + below, ACROSS, figsize=(WIDTH, height), layout="constrained", squeeze=False)
        axes = panels.flatten()
        _lines(axes[0], styles, "nll", "nll of the kept text", "nats/token")
        _lines(axes[1], styles, "kl_rev", "KL(student ‖ reference), measured", "nats")
        _taus(axes[1], styles)
        _lines(axes[2], styles, "gnorm", "gradient norm before clipping", "")
        _trade(axes[3], styles)
        for k, (ax, column) in enumerate(zip(axes[ACROSS:], others, strict=False)):
            _cells(ax, styles, column, named=k == 0)
        for ax in axes[ACROSS + len(others) :]:
            ax.set_axis_off()
        handles, names = zip(*by_row, strict=True)
        drawing.legend(handles, names, loc="outside upper center", ncols=across, frameon=False)
        drawing.supxlabel(_plain(_notes(styles)), fontsize=8)
        drawing.savefig(path, dpi=120)
        plt.close(drawing)
    return path


def _legend(styles: Sequence[Style]) -> tuple[list[Entry], list[Entry]]:
    """Legend entries of the colours, and of lines and markers; those whose lines are all hidden say so."""
    drawn = [style for style in styles if not style.same_as]
    colours, ways = dict[str, Entry](), dict[int, Entry]()
    for style in styles:
        hidden = " (hidden)" if all(s.colour != style.colour for s in drawn) else ""
        colours.setdefault(style.colour, (Line2D([], [], color=style.colour, lw=2), _plain(style.named) + hidden))
        if style.variant:
            hidden = " (hidden)" if all(s.way != style.way for s in drawn) else ""
            line = Line2D([], [], color=GREY, lw=style.lw, ls=style.ls, marker=style.marker, ms=4)
            ways.setdefault(style.way, (line, _plain(style.variant) + hidden))
    return list(colours.values()), list(ways.values())


def _notes(styles: Sequence[Style]) -> str:
    """Lines below the picture: which runs hide behind others, and which look alike."""
    behind: dict[str, list[str]] = {}
    for style in styles:
        if style.same_as:
            behind.setdefault(style.same_as, [style.same_as]).append(style.label)
    notes = []
    if behind:
        told = "; ".join(" = ".join(labels) for labels in behind.values())
        lines = textwrap.wrap(f"lines that coincide are drawn once: {told}", NOTE)
        notes += lines[:SAME] if len(lines) <= SAME else [*lines[: SAME - 1], f"{lines[SAME - 1]} ..."]
    looks = Counter((style.colour, style.way) for style in styles)
    if any(n > 1 for n in looks.values()):
        notes.append("cells of the same colour, line and marker differ in their seed at most")
    return "\n".join(notes)


def _cells(ax: Axes, styles: Sequence[Style], column: Column, named: bool) -> None:
    """Draw a figure of each run's last round: healed in its colour, steered a cross, base a line; `named`: say so."""
    first = styles[0].run.headline
    for i, style in enumerate(styles):
        for who, marker, colour in (("steered", "x", INK), ("healed", style.marker, style.colour)):
            if (value := figure(style.run.headline, who, column)) is not None:
                ax.scatter([i], [value], zorder=2, marker=marker, color=colour)
    base = 0.0 if column.over_base else figure(first, "base", column)
    if base is not None:
        ax.axhline(base, color=INK, lw=0.8, ls="--")
    if named and base is not None:
        ax.annotate("base", (1, base), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                    ha="right")  # fmt: skip
        if (steered := figure(first, "steered", column)) is not None:
            ax.annotate("steered", (0, steered), xytext=(7, 4), textcoords="offset points")
    aim = {"more": ", more is better", "less": ", less is better"}.get(column.better, "")
    ax.set(title=_plain(column.over_base or column.name), ylabel=f"{column.unit}{aim}", xticks=[])
    ax.set_xlim(-0.7, len(styles) - 0.3)


def _plain(text: str) -> str:
    """Text that is not read as mathematics."""
    return text.replace("$", r"\$")


def _lines(ax: Axes, styles: Sequence[Style], name: str, title: str, unit: str) -> None:
    """Draw a figure over the steps; one that is not measured at every step has a dot where it is."""
    for style in (s for s in styles if not s.same_as):
        rows = [row for row in style.run.heal if name in row]
        dots = "." if len(rows) < len(style.run.heal) else ""
        steps, values = [row["step"] for row in rows], [row[name] for row in rows]
        ax.plot(steps, values, color=style.colour, lw=style.lw, ls=style.ls, marker=dots, ms=5)
    ax.set(title=title, xlabel="step", ylabel=unit)
    ax.set_ylim(bottom=0 if name != "nll" else None)


def _taus(ax: Axes, styles: Sequence[Style]) -> None:
    """Draw every tau, in the colour and manner of its cells if they share one; those far above stand at the top."""
    of: dict[float, list[Style]] = {}
    for style in styles:
        if style.run.tau is not None:
            of.setdefault(style.run.tau, []).append(style)
    top = ax.get_ylim()[1]
    top = max([top, *(1.1 * tau for tau in of if tau < 2 * top)])
    ax.set_ylim(top=top)
    above = [f"{tau:.3g}" for tau in sorted(of) if tau > top]
    for k, tau in enumerate(tau for tau in sorted(of) if tau <= top):
        colours, ways = {s.colour for s in of[tau]}, {s.ls for s in of[tau]}
        colour = colours.pop() if len(colours) == 1 else INK
        ax.axhline(tau, color=colour, lw=0.8, ls=ways.pop() if len(ways) == 1 and len(of) > 1 else "--",
                   zorder=1.8)  # fmt: skip
        if k < TAUS:  # labels side by side, since lines may lie close together
            ax.annotate(
                f"tau {tau:.3g}", (0, tau), xytext=(2 + 46 * (k % 4), 2), textcoords="offset points", color=colour
            )
    if above:
        told = ", ".join(above[:TAUS]) + (" ..." if len(above) > TAUS else "")
        ax.annotate(f"tau {told}: above", (1, 1), xytext=(-2, -10), xycoords="axes fraction", ha="right",
                    textcoords="offset points")  # fmt: skip


def _trade(ax: Axes, styles: Sequence[Style]) -> None:
    """Draw each round from the steered to the healed model, and the last student's frontier back to base, with T*."""
    ax.scatter([0], [0], marker="s", color=INK, zorder=3)
    ax.annotate("base", (0, 0), xytext=(5, 4), textcoords="offset points")
    for style in styles:
        for row in style.run.rounds:
            x = [row["steered/damage"], row["healed/damage"]]
            y = [row[f"{who}/trait"] - row["base/trait"] for who in ("steered", "healed")]
            ax.plot(x, y, color=style.colour, lw=0.8, ls=":", zorder=1)
            ax.scatter(x[:1], y[:1], marker="x", color=INK, zorder=2)
            ax.scatter(x[1:], y[1:], color=style.colour, marker=style.marker, zorder=3)
        if style.run.frontier:
            path = frontier(style.run)
            x, y = ([point[name] for point in path] for name in ("damage", "trait"))
            ax.plot(x, y, color=style.colour, lw=style.lw, ls=style.ls)
            target = style.run.headline["matched/target"]
            ax.axhline(target, color=GREY, lw=0.6, ls="--", zorder=0)
    first = styles[0].run.rounds[0]
    ax.annotate("steered", (first["steered/damage"], first["steered/trait"] - first["base/trait"]),
                xytext=(-6, -12), textcoords="offset points", ha="right")  # fmt: skip
    ax.locator_params(axis="x", nbins=5)
    ax.set(title="trait against damage", xlabel="damage over base, nats/token", ylabel="trait over base, nats/token")
