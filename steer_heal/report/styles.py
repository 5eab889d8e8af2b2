"""How the runs of a picture are told apart: by colour, and by line and marker.

The colour is the regulariser where there are several, otherwise the first override that differs. Line and marker are
what is left: the values of the other overrides in which runs differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

from steer_heal.report.run_folder import Run

INK = "#222222"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]  # Okabe & Ito
LINES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3))]
MARKERS = ["o", "^", "s", "D", "v", "P", "X", "<", ">", "p", "*", "h"]
REPLICATE = "seed"  # cells that differ in it alone look alike where there are more variants than lines


@dataclass(frozen=True)
class Style:
    """A run and how it is drawn."""

    run: Run
    label: str  # of the run, as in the table
    named: str  # what the colour stands for
    variant: str  # what line and marker stand for; empty if the colour says it all
    colour: str
    way: int  # of the variant: lines and markers are taken in turn, and lines grow thinner each time they begin anew
    same_as: str  # label of the earlier run whose lines are the same; empty if they are its own

    @property
    def ls(self) -> Any:
        return LINES[self.way % len(LINES)]

    @property
    def lw(self) -> float:
        return max(0.6, 1.4 - 0.4 * (self.way // len(LINES)))

    @property
    def marker(self) -> str:
        return MARKERS[self.way % len(MARKERS)]


def styled(runs: Sequence[Run], labels: Sequence[str]) -> list[Style]:
    """The runs in their order, each with its style."""
    settings = [_settings(run) for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    differ = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    by = min(differ, key=lambda key: (key != "reg", key == REPLICATE), default="reg")  # the seed last
    named = [_named(one, [by]) or run.regulariser for one, run in zip(settings, runs, strict=True)]
    others = [key for key in differ if key != by]
    variants = [_named(one, others) for one in settings]
    if len(set(variants)) > len(LINES) and REPLICATE in others:
        variants = [_named(one, [key for key in others if key != REPLICATE]) for one in settings]
    colours, ways = list(dict.fromkeys(named)), list(dict.fromkeys(variants))
    palette = COLOURS if len(colours) <= len(COLOURS) else _ramp(len(colours))
    found, lines = list[Style](), dict[Any, str]()
    for run, label, name, variant in zip(runs, labels, named, variants, strict=True):
        drawn = tuple(tuple(row.get(figure) for figure in ("step", "nll", "kl_rev", "gnorm")) for row in run.heal)
        colour, way = palette[colours.index(name)], ways.index(variant)
        found.append(Style(run, label, name, variant, colour, way, lines.get(drawn, "")))
        if drawn:
            lines.setdefault(drawn, label)
    return found


def _settings(run: Run) -> dict[str, str]:
    """The overrides by key, and the regulariser, which a preset may have chosen."""
    split = (override.lstrip("+").partition("=") for override in run.overrides)
    return {"reg": run.regulariser} | {key: value for key, _, value in split if key != "reg"}


def _named(settings: dict[str, str], keys: Sequence[str]) -> str:
    return " ".join(settings[key] if key == "reg" else f"{key}={settings[key]}" for key in keys if key in settings)


def _ramp(n: int) -> list[str]:
    """As many colours from dark to light."""
    ramp = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(ramp(0.95 * i / (n - 1))) for i in range(n)]
