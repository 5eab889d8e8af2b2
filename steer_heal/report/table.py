"""A comparison of runs: a table, the curves, and one prompt answered by base, steered and healed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from steer_heal.artifacts import Row
from steer_heal.config.overrides import differing
from steer_heal.eval import Column, Who
from steer_heal.report import comparison, comparison_table
from steer_heal.report.diagnostics import is_nll
from steer_heal.report.plots import curves
from steer_heal.report.run_folder import Run, columns, figure, read
from steer_heal.system.terminal import printable, stdout
from steer_heal.tracker import Tracker

LEGEND = {  # of the columns that are no evaluation's
    "passed": "completions that pass every filter, of those generated",
    "kept": "those of them trained on: heal.n_keep at most",
    "over tau": "share of sequences on which the barrier was on",
    "decay": "share of the adapter's weights that decay took over the round",
    "=nll": "the barrier never fired, or the decay took under a tenth",
    "dose, KL": "if cells differ in them: the mean dose of the training data, and the\n"
    "          95th percentile of KL(steered || unsteered) over positions, nats",
    "secs": "of the cell, all attempts: the first one also computes what all of them share",
}


def labels(runs: list[Run]) -> list[str]:
    """Labels that distinguish the runs: the overrides that they do not all share, regulariser first."""
    own = differing([run.overrides for run in runs])
    return [
        " ".join([run.regulariser, *(_shown(o, run) for o in overrides if o[:4] != "reg=")])
        for run, overrides in zip(runs, own, strict=True)
    ]


def _shown(override: str, run: Run) -> str:
    """An override, followed by tau in nats if the run fixed it from a percentile."""
    fixed = run.tau is not None and override.startswith(("tau=p", "tau=auto"))
    return f"{override} ({run.tau:.3g})" if fixed else override


def twins(runs: list[Run]) -> list[list[str]]:
    """Labels of equivalent runs, grouped, such as nll at two values of lam."""
    groups: dict[str, list[str]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        groups.setdefault(run.cell, []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def table(runs: list[Run]) -> Table:
    """One row per run, of its last round: the evaluations' figures, then what became of the data and the heal."""
    drawn = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("\nregulariser", overflow="fold", min_width=8)
    shown = [(column, who) for column in columns(runs) for who in column.models_shown]
    for column, who in shown:
        drawn.add_column(printable(_heading(column, who)).plain, justify="right", no_wrap=True)
    for heading in ("\npassed", "\nkept", "over\ntau", "\ndecay", "\nsecs"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    dosed = len({_dose(run.rounds[0]) for run in runs}) > 1  # later rounds differ by what was kept
    if dosed:
        drawn.add_column("\ndose", justify="right", no_wrap=True)
        drawn.add_column("\nKL", justify="right", no_wrap=True)
    for run, label in zip(runs, labels(runs), strict=True):
        row = run.headline
        cells = [_told(figure(row, who, column), column) for column, who in shown]
        passed = f"{row['passed']:.0f}" if "passed" in row else "-"  # an older version did not write it
        cells += [f"{passed}/{row['generated']:.0f}", f"{row['kept']:.0f}"]
        named = "=nll" if is_nll(row) else ""
        cells += [f"{row['heal_barrier_on']:.0%}{named}" if row["heal_barrier"] else "-"]
        cells += [f"{row['heal_shrink']:.0%}{named}" if row["heal_decays"] else "-", f"{run.seconds:.0f}"]
        cells += _dose(row) if dosed else []
        drawn.add_row(printable(label), *cells)
    return drawn


def legend(runs: list[Run]) -> str:
    """One line for each of the table's columns that needs one."""
    named = {c.label.replace("-\n", "").replace("\n", " "): c for c in columns(runs)}
    own = {name: column.about for name, column in named.items() if column.models_shown}
    lines = {**own, **LEGEND}
    return "\n".join(f"{printable(name).plain:9} {printable(about).plain}" for name, about in lines.items())


def _heading(column: Column, who: Who) -> str:
    """Two lines: the label, and whose figure it is where several are shown."""
    if len(column.models_shown) == 1:
        return column.label if "\n" in column.label else f"\n{column.label}"
    return f"{column.label if who == column.models_shown[0] else ''}\n{who}"


def _told(value: float | None, column: Column) -> str:
    """A figure as the table shows it; damage is small, and has a digit more."""
    if value is None:
        return "-"
    if column.over_base:
        return f"{value:+.3f}" if column.role == "damage" else f"{value:+.2f}"
    return f"{value:.0%}" if column.unit == "share" else f"{value:.3g}"


def rounds_shown(runs: list[Run]) -> list[str]:
    """A sentence on which round stands in the table, if there are several."""
    last = sorted({len(run.rounds) - 1 for run in runs})
    if last == [0]:
        return []
    if len(last) == 1:
        return [f"Each run's last round is shown, round {last[0]} of 0-{last[0]}."]
    named = (f"round {len(run.rounds) - 1} of {label}" for run, label in zip(runs, labels(runs), strict=True))
    return [f"Each run's last round is shown: {', '.join(named)}."]


def best_rounds(runs: list[Run]) -> list[str]:
    """A sentence for each run whose best round, by one exchange rate, is not its last: to look at, not to report."""
    return [
        f"{label}: round {run.best} of 0-{len(run.rounds) - 1} has the highest trait minus damage, nat for nat; chosen "
        "after the fact among equals, it is exploratory"
        for run, label in zip(runs, labels(runs), strict=True)
        if run.best != len(run.rounds) - 1
    ]


def _dose(row: Row) -> tuple[str, str]:
    """Mean dose of the training data and the KL that it amounts to in nats, as the table shows them."""
    kl = row.get("steered/kl_p95")
    return f"{row['dose']:.2f}", "-" if kl is None else f"{kl:.2f}"


def answers(runs: list[Run], prompt: int = 0) -> list[tuple[str, str]]:
    """The same prompt answered by base, by each distinct steered model, and by every run's healed one."""
    named = list(zip(labels(runs), runs, strict=True))
    steered: dict[str, str] = {}  # text -> label of the first run that gave it
    for label, run in named:
        steered.setdefault(run.answers["steered"][prompt]["text"], label)
    said = [("base", runs[0].answers["base"][prompt]["text"])]
    said += [(f"steered, {label}" if len(steered) > 1 else "steered", text) for text, label in steered.items()]
    return said + [(f"healed, {label}", run.answers["healed"][prompt]["text"]) for label, run in named]


def track(folder: Path, tracker: Tracker) -> None:
    """Send a finished run's curves and answers to its tracker."""
    runs = read(folder)
    tracker.image("curves", curves(runs, labels(runs), folder / "curves.png"))
    said = runs[0].answers
    heads = ["prompt", *said]
    rows = zip(*([answer["text"] for answer in given] for given in said.values()), strict=True)
    prompts = [answer["prompt"] for answer in said["base"]]
    tracker.table("answers", heads, [[prompt, *row] for prompt, row in zip(prompts, rows, strict=True)])


def show_comparison(runs: list[Run], by: Sequence[str] = (), against: str | None = None) -> None:
    """Print a comparison for each basis that the runs have; of several, say in what they differ."""
    made = comparison.compared(runs, by, against)
    keys = dict.fromkeys(key for found in made for key in found.basis)
    told = {key: [found.basis.get(key, "not recorded") for found in made] for key in keys}
    if differ := [key for key, values in told.items() if len(set(values)) > 1]:
        apart = "Compared apart, since figures of different " + ", ".join(differ)
        lacking = any("not recorded" in told[key] for key in differ)
        stdout.print(f"\n{apart} have no zero in common{' (an older version recorded less)' if lacking else ''}:")
    for found in made:
        stdout.print()
        stdout.print(comparison_table.rendered(found, stdout))
        for line in comparison_table.notes(found):
            stdout.print(printable(line), style="dim", soft_wrap=True)
    stdout.print("\n".join(f"{name:9} {about}" for name, about in comparison_table.LEGEND.items()), style="dim")


def show(folder: Path, seconds: float | None = None, by: Sequence[str] = (), against: str | None = None) -> bool:
    """Print comparison, table, answers and paths; draw `curves.png` into the folder.

    Return True if there is a finished run.
    """
    runs = read(folder)
    if not runs:
        stdout.print(f"no finished run in {folder}")
        return False
    show_comparison(runs, by, against)
    stdout.print()
    stdout.print(table(runs))
    stdout.print(legend(runs), style="dim")
    for line in rounds_shown(runs):
        stdout.print(printable(line), style="dim")
    for note in sorted({run.note for run in runs} - {""}):
        stdout.print(printable(f"Model: {note}."), style="dim")
    if made := sorted({run.code or "an earlier version" for run in runs}):
        several = "; figures of different versions may not compare" if len(made) > 1 else ""
        stdout.print(printable(f"Made by steer_heal {', '.join(made)}{several}."), style="dim")
    for same in twins(runs):
        stdout.print(printable(f"the same cell, computed once: {'; '.join(same)}"), style="dim")
    for run, label in zip(runs, labels(runs), strict=True):
        if run.stopped:
            stdout.print(printable(f"{label} stopped early, {run.stopped}"))
    for line in best_rounds(runs):
        stdout.print(printable(line), style="dim")
    stdout.print()
    stdout.print(Text.assemble(("prompt   ", "bold"), printable(runs[0].answers["base"][0]["prompt"])))
    for who, text in answers(runs):
        stdout.print(Text.assemble((printable(who).plain, "bold")))
        stdout.print(Padding(printable(" ".join(text.split())), (0, 0, 0, 4)))
    try:
        picture = str(curves(runs, labels(runs), folder / "curves.png"))
    except OSError as error:  # such as a full disk; the results exist, and the rest is still printed
        picture = f"cannot be written: {error.strerror or error}"
    stdout.print()
    stdout.print(Text(f"folder   {folder}"), soft_wrap=True)
    stdout.print(Text(f"curves   {picture}"), soft_wrap=True)
    if seconds is not None:
        stdout.print(f"took     {seconds:.0f} s")
    return True
