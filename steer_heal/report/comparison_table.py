"""A comparison as a table for a terminal, as JSON and as CSV: the same cells, once as text and once as numbers."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from steer_heal.config.errors import plain
from steer_heal.report.comparison import CLOSE, SEED, Comparison, Line
from steer_heal.report.replicates import PRIMARY, Replicates, settings
from steer_heal.report.run_folder import Run
from steer_heal.report.stats import LEVEL, MIN_SEEDS, NEGLIGIBLE, Estimate
from steer_heal.system.terminal import counted, printable

WORDS = 11  # letters that a column of words has at least
HEADINGS = ("", "n", "trait", "for", "against", "damage", "at T*", "vs control", "gate", "verdict", "secs")
LEGEND = {
    "n": "seeds: rows are grouped by all that differs but the seed",
    "trait": "log-odds of trait answers over base, nats/token, ± its 95 % interval (of one seed: for other items\n"
    "          only); for, against: its two terms",
    "damage": "nll of neutral text over base, nats/token, ± its 95 % interval",
    "at T*": "damage at the gate where each student has gained T* (match.at) of the trait: what rows compare by",
    "vs": "that less the control's, same seeds, with an interval for other seeds, probes and texts (95 % for all\n"
    "          rows together); †: for other seeds on these items (95 %)",
    "gate": "c of W0 + c * delta at T*, the mean over seeds",
    "verdict": f"better, worse: p < {LEVEL:g} after Holm; negligible, equivalent: within ±{NEGLIGIBLE:g} nats/token;\n"
    f"          within noise: neither; none under {MIN_SEEDS} seeds; not robust: damage_t or one form's damage says\n"
    "          otherwise",
    "secs": "of a cell, the mean: the first one also computes what all of them share",
}  # fmt: skip


def rendered(found: Comparison, console: Console) -> RenderableType:
    """A table, or where the terminal is too narrow for it, a block of lines for each row."""
    rows = [*_models(found), *(_row(line, found) for line in found.lines)]
    headings = [f"vs {found.control}" if name == "vs control" and found.control else name for name in HEADINGS]
    widths = [
        max(len(line) for cell in column for line in cell.splitlines() or [""])
        for column in zip(headings, *rows, strict=True)
    ]
    wraps = [name in ("", "verdict") for name in HEADINGS]
    least = [min(width, WORDS) if wrap else width for width, wrap in zip(widths, wraps, strict=True)]
    if sum(least) + len(least) > console.width:
        return Group(*(block for row in rows for block in _block(headings, row)))
    drawn = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width, wrap in zip(headings, least, wraps, strict=True):
        left = wrap or name.startswith("vs")
        drawn.add_column(Text(name), justify="left" if left else "right", no_wrap=not wrap, min_width=width)
    for row in rows:
        drawn.add_row(*(printable(cell) for cell in row))
    return drawn


def _block(headings: list[str], row: list[str]) -> Iterator[Text]:
    yield Text(printable(row[0]).plain, style="bold")
    for name, cell in zip(headings[1:], row[1:], strict=True):
        for i, part in enumerate(cell.splitlines()):
            if part.strip():
                yield Text(f"  {name if not i else '':10} {printable(part.strip()).plain}", overflow="fold")


def _models(found: Comparison) -> list[list[str]]:
    """Rows of base and, over it, of what was steered or prompted, over seeds."""
    zero = found.runs[0].headline
    names = ("trait", "trait_for", "trait_against", PRIMARY)
    rows = [_padded("base", "", *(f"{zero[f'base/{n}']:.3f}" if f"base/{n}" in zero else "-" for n in names))]
    for label, runs in _teachers(found).items():
        figures = []
        for name in names:
            if any(f"{who}/{name}" not in run.headline for run in runs for who in ("base", "steered")):
                figures.append("-")  # an older version did not write it
                continue
            mean = sum(run.headline[f"steered/{name}"] - run.headline[f"base/{name}"] for run in runs) / len(runs)
            figures.append(_signed(mean, 3 if name == PRIMARY else 2))
        rows.append(_padded(label, str(len({settings(run).get(SEED, "0") for run in runs})), *figures))
    return rows


def _teachers(found: Comparison) -> dict[str, list[Run]]:
    """The steered models, by what steered them; several of one kind are told apart by the rows that they taught."""
    taught: dict[tuple[str, frozenset[float]], list[Replicates]] = {}
    for line in found.lines:  # equal figures are the same model
        own = frozenset(run.headline["steered/trait"] for run in line.row.runs)
        taught.setdefault((_kind(line.row.runs[0]), own), []).append(line.row)
    kinds = Counter(kind for kind, _ in taught)
    told: dict[str, list[Run]] = {}
    for (kind, _), rows in taught.items():
        label = kind if kinds[kind] == 1 else f"{kind}: {', '.join(row.label for row in rows)}"
        told[label] = list({run.headline["steered/trait"]: run for run in rows[0].runs}.values())
    return told


def _kind(run: Run) -> str:
    teacher = run.teacher or settings(run).get("steer", "")
    usual = {"prompt": "persona as prompt", "mean_diff": "steered", "": "steered"}
    return usual.get(teacher, f"steered, {teacher}")


def _padded(*cells: str) -> list[str]:
    return [*cells, *[""] * (len(HEADINGS) - len(cells))]


def _row(line: Line, found: Comparison) -> list[str]:
    row = line.row
    return [
        row.label, str(row.n), _told(line.trait, 2), _told(line.trait_for, 2, False),
        _told(line.trait_against, 2, False), _told(line.damage, 3), _told(line.at_target, 3, False),
        _against(line, found.compared), "-" if row.gate is None else f"{row.gate:.2f}", _verdict(line, found),
        f"{row.seconds:.0f}",
    ]  # fmt: skip


def _verdict(line: Line, found: Comparison) -> str:
    return "control" if line.is_control else str(line.verdict or "-")


def _told(figure: Estimate | None, digits: int, spread: bool = True) -> str:
    if figure is None:
        return "-"
    interval = figure.interval() if spread else None
    half = f" ±{(interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
    return _signed(figure.value, digits) + half


def _against(line: Line, family: int) -> str:
    """The contrast with its interval for all rows together, and below it the one on these items."""
    if line.contrast is None:
        return "-"
    told = _signed(line.contrast.value, 3)
    if line.contrast.seeds is None:
        return told
    whole = line.contrast.interval(1 - LEVEL / max(1, family))
    items = line.contrast.on_these_items().interval()
    assert whole is not None
    assert items is not None
    ends = ["[" + ", ".join(_signed(end, 3) for end in interval) + "]" for interval in (whole, items)]
    return f"{told} {ends[0]}\n       {ends[1]} †"


def _signed(value: float, digits: int) -> str:
    """A number with its sign; 0 is +0."""
    return f"{value + 0.0:+.{digits}f}"


def notes(found: Comparison) -> list[str]:
    """Lines below the table: on which basis, at which T*, how many rows share the error of 5 %, and what is lacking."""
    told = [f"base: {found.basis.get('model', '')}"]
    targets = sorted(
        {round(run.headline["matched/target"], 3) for run in found.runs if "matched/target" in run.headline}
    )
    if targets:
        spread = f"{targets[0]:g}" if len(targets) == 1 else f"{targets[0]:g} to {targets[-1]:g}"
        told.append(f"T*: {spread} nats/token over base{'' if len(targets) == 1 else ', by seed or steering'}")
    if found.control and found.compared:
        told.append(f"against {found.control}: {counted(found.compared, 'row')} in Holm's family")
    if found.left_out:
        runs = counted(found.left_out, "run")
        told.append(f"left out: {runs} with the settings and the seed of an earlier one, and other figures")
    return told + _advice(found)


def _advice(found: Comparison) -> list[str]:
    """What to run for what was not measured, or not at the same T*."""
    lacking = [run for run in found.runs if "matched/target" not in run.headline]
    if lacking:
        command = shlex.join(["python", "-m", "steer_heal.main", *lacking[0].overrides, "match=gate", "match.at=0.3"])
        return [
            f"{len(lacking)} of {len(found.runs)} runs were not measured at matched trait; all but that comes from the "
            f"store, T* being nats/token of your choice: {command}"
        ]
    targets: dict[str, set[float]] = {}
    for run in found.runs:
        targets.setdefault(settings(run).get(SEED, "0"), set()).add(run.headline["matched/target"])
    several = [sorted(some) for some in targets.values() if max(some) - min(some) > CLOSE]
    if not several:
        return []
    least, most = several[0][0], several[0][-1]
    return [
        f"runs of a seed have several T*, such as {least:.3g} and {most:.3g}: to compare them, give all the same in "
        f"nats, such as match.at={min(some[0] for some in several):.2g}; all but the gates comes from the store"
    ]


def records(found: Comparison) -> list[dict[str, Any]]:
    """The rows as numbers: of each figure its value and the ends of its interval, None where there is none."""
    return [_record(line, found) for line in found.lines]


def _record(line: Line, found: Comparison) -> dict[str, Any]:
    record: dict[str, Any] = {"row": plain(line.row.label), "seeds": line.row.n}
    figures = {"trait": line.trait, "trait_for": line.trait_for, "trait_against": line.trait_against,
               "damage": line.damage, "damage_at_target": line.at_target}  # fmt: skip
    for name, figure in figures.items():
        record |= _numbers(name, figure, figure.interval() if figure else None)
    told = line.contrast
    record |= _numbers(
        "contrast", told, told.interval(1 - LEVEL / max(1, found.compared)) if told and told.seeds else None
    )
    items = told.on_these_items().interval() if told else None
    record |= {"contrast_items_low": items[0] if items else None, "contrast_items_high": items[1] if items else None}
    return record | {
        "p_holm": line.adjusted, "gate": line.row.gate, "control": line.control.label if line.control else None,
        "verdict": _verdict(line, found), "seconds": line.row.seconds,
        "runs": [str(run.folder) for run in line.row.runs],
    }  # fmt: skip


def _numbers(name: str, figure: Estimate | None, interval: tuple[float, float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {name: figure.value if figure else None, f"{name}_low": low, f"{name}_high": high}


def as_json(comparisons: list[Comparison]) -> str:
    """A list of comparisons, each with its basis and its rows."""
    told = [{"basis": found.basis, "control": found.control, "rows": records(found)} for found in comparisons]
    return json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False)


def as_csv(comparisons: list[Comparison]) -> str:
    """One line a row; runs are left out. The first column numbers the comparisons, which share no zero."""
    lines = [
        {"comparison": i} | {name: value for name, value in record.items() if name != "runs"}
        for i, found in enumerate(comparisons)
        for record in records(found)
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, lines[0].keys() if lines else ["comparison"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
