"""The picture of a sweep: what tells its cells apart, on made-up runs of the shapes that sweeps have."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.made_up import made_up
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from steer_heal.report import plots
from steer_heal.report.plots import curves
from steer_heal.report.run_folder import Run
from steer_heal.report.styles import styled
from steer_heal.report.table import labels

REGS = ("nll", "kl_fwd", "kl_rev", "wd")


def cell(reg: str, *overrides: str, tau: float | None = None, like: str = "", steps: int = 6) -> Run:
    """A run whose curve is that of its name, or of `like`; kl is measured at every other step."""
    level = sum(map(ord, like or reg + "".join(overrides))) / 1000
    heal = [
        {"step": float(i), "nll": 2 + level * math.exp(-i), "gnorm": level} | ({} if i % 2 else {"kl_rev": level * i})
        for i in range(steps)
    ]
    run = made_up(reg)
    return dataclasses.replace(run, overrides=(f"reg={reg}", *overrides), regulariser=reg, tau=tau, heal=heal)


@dataclasses.dataclass
class Drawn:
    """What a picture holds."""

    legend: list[str]
    note: str
    kl: Axes
    boxes: dict[str, Any]  # in pixels, of the legend and of the highest panel


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from runs to what was drawn of them."""
    seen: list[Figure] = []
    monkeypatch.setattr(plots.plt, "close", seen.append)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # half of the time; whole runs write pictures

    def drawn(runs: list[Run]) -> Drawn:
        curves(runs, labels(runs), tmp_path / "curves.png")
        figure = seen.pop()
        figure.draw_without_rendering()
        (legend,) = figure.legends
        boxes = {"legend": legend.get_window_extent(), "panel": figure.axes[0].get_tightbbox(), "figure": figure.bbox}
        names = [text.get_text() for text in legend.get_texts() if text.get_text()]
        note = figure._supxlabel.get_text() if figure._supxlabel else ""  # type: ignore[attr-defined]
        return Drawn(names, note, figure.axes[1], boxes)

    return drawn


def lines(ax: Axes) -> list[Line2D]:
    """The curves of a panel, without the lines across it."""
    return [line for line in ax.lines if len(line.get_xdata()) != 2]  # type: ignore[arg-type]


def taus(ax: Axes) -> dict[float, Line2D]:
    return {float(line.get_ydata()[0]): line for line in ax.lines if len(line.get_xdata()) == 2}  # type: ignore[arg-type,index]


def test_a_regulariser_has_one_colour_whatever_else_differs() -> None:
    runs = [cell(reg, f"seed={seed}") for reg in REGS for seed in (0, 1, 2)]
    styles = styled(runs, labels(runs))
    assert len({(s.run.regulariser, s.colour) for s in styles}) == len({s.colour for s in styles}) == 4
    assert len({(s.colour, s.ls, s.marker) for s in styles}) == 12, "two cells look alike"


def test_of_one_regulariser_the_first_difference_has_the_colour() -> None:
    runs = [cell("kl_rev", f"seed={seed}", f"lora=r{r}") for seed in (0, 1) for r in (4, 8, 16, 32, 64, 128)]
    styles = styled(runs, labels(runs))
    assert [s.named for s in styles[:2]] == ["lora=r4", "lora=r8"], "the seed, a replicate, took the colour"
    assert len({s.colour for s in styles}) == 6


@pytest.mark.parametrize(
    "runs",
    [
        [cell(reg, f"seed={seed}") for reg in REGS for seed in (0, 1, 2)],
        [
            cell(r, f"lam={lam}", f"tau={t}", f"seed={s}")
            for r in REGS
            for lam in (1, 2, 3)
            for t in (1, 2)
            for s in (0, 1)
        ],
        [cell("kl_rev", f"lam={i / 10}") for i in range(36)],
        [cell("kl_rev", f"steer.path=/a/long/path/to/some/vector-{i:03d}.safetensors") for i in range(30)],
    ],
    ids=["4 x 3 seeds", "48 cells", "36 strengths", "30 long names"],
)
def test_the_legend_stands_above_the_panels(draw: Any, runs: list[Run]) -> None:
    """Reference: the boxes in pixels; names that are not cut off at the picture's edges, each once."""
    found = draw(runs)
    legend, panel, whole = (found.boxes[name] for name in ("legend", "panel", "figure"))
    assert legend.y0 >= panel.y1 - 1, "the legend covers a panel"
    assert legend.x0 >= 0, "it is cut off"
    assert legend.x1 <= whole.x1, "it is cut off"
    assert panel.height > 200, "the panels have no room"
    assert len(found.legend) == len(set(found.legend)), found.legend


def test_lines_that_coincide_are_drawn_once_and_named(draw: Any) -> None:
    """Reference: nll at any lam, and a barrier that never fires, are one curve."""
    runs = [cell("nll", f"lam={lam}", like="nll") for lam in (1, 2)] + [cell("kl_rev", "lam=1", like="nll")]
    found = draw([*runs, cell("wd", "lam=1"), cell("wd", "lam=2")])
    assert len(lines(found.kl)) == 3
    assert found.legend == ["nll", "kl_rev (hidden)", "wd", "lam=1", "lam=2"]
    assert "nll lam=1 = nll lam=2 = kl_rev lam=1" in found.note.replace("\n", " ")
    assert draw([cell("nll"), cell("wd")]).note == "", "nothing coincides"


def test_every_tau_is_drawn_as_its_cells_are(draw: Any) -> None:
    """Reference: one of two regularisers in ink, those of one in its colour, one far above as words."""
    runs = [cell("kl_fwd", "seed=0", tau=0.3), cell("kl_rev", "seed=0", tau=0.3), cell("kl_rev", "seed=1", tau=0.4)]
    found = draw([*runs, cell("kl_fwd", "seed=1", tau=99.0), cell("nll", "seed=0")])
    drawn = taus(found.kl)
    assert drawn.keys() == {0.3, 0.4}, "a tau is missing"
    colours = {s.run.regulariser: s.colour for s in styled(runs, labels(runs))}
    assert drawn[0.4].get_color() == colours["kl_rev"]
    assert drawn[0.3].get_color() not in colours.values()
    said = [text.get_text() for text in found.kl.texts]
    assert "tau 99: above" in said, said


def test_measured_steps_have_dots(draw: Any) -> None:
    (line,) = lines(draw([cell("kl_rev")]).kl)
    assert line.get_marker() == "."
    assert list(line.get_xdata()) == [0, 2, 4]  # type: ignore[arg-type]
