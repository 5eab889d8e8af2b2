"""What a person looks at: a table, the curves, and one prompt answered by base, steered and healed.

python -m steer_heal.compare FOLDER      a run's folder or a sweep's
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from steer_heal.config.errors import refuse
from steer_heal.report.diagnostics import is_nll
from steer_heal.report.plots import curves
from steer_heal.report.run_folder import Run, read
from steer_heal.system.console import console, printable
from steer_heal.tracker.wandb import Tracker

LEGEND = """\
trait     log-odds of trait answers over base, nats/token: more is more of it
damage    nll of neutral text over base, nats/token: less is better
coherent  share of healed answers that neither loop nor fall apart; it leans on
          base's perplexity, so it helps the eye and is no verdict
kept      completions trained on, of those generated
over tau  share of sequences on which the barrier was on
decay     share of the adapter's weights that decay took over the round
=nll      the barrier never fired, or the decay took under a tenth
dose, KL  where cells differ in them: the mean dose of what was learned from, and the
          95th percentile of KL(steered || unsteered) over positions, nats
secs      of the cell: the first one also computes what all of them share, and
          what the store held cost nothing"""


def labels(runs: list[Run]) -> list[str]:
    """What tells the runs apart: the overrides that they do not all share, regulariser first."""
    shared = set.intersection(*(set(run.overrides) for run in runs))
    return [
        " ".join([run.regulariser, *(_told(o, run) for o in run.overrides if o not in shared and o[:4] != "reg=")])
        for run in runs
    ]


def _told(override: str, run: Run) -> str:
    """An override, with what a tau that was settled on the way came to."""
    settled = run.tau is not None and override.startswith(("tau=p", "tau=auto"))
    return f"{override} ({run.tau:.3g})" if settled else override


def twins(runs: list[Run]) -> list[list[str]]:
    """Labels of the runs that mean the same, such as nll at two values of lam."""
    groups: dict[str, list[str]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        groups.setdefault(run.cell, []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def table(runs: list[Run]) -> Table:
    """One row a run, of its best round. Trait and damage are over base, in nats a token."""
    columns = ["trait\nsteered", "\nhealed", "damage\nsteered", "\nhealed", "coher-\nent", "\nkept", "over\ntau",
               "\ndecay", "\nsecs"]  # fmt: skip
    drawn = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("\nregulariser", overflow="fold", min_width=8)
    for column in columns:
        drawn.add_column(column, justify="right", no_wrap=True)
    several = any(len(run.rounds) > 1 for run in runs)
    dosed = len({_dose(run) for run in runs}) > 1  # where all are steered as strongly, it tells nothing apart
    if dosed:
        drawn.add_column("\ndose", justify="right", no_wrap=True)
        drawn.add_column("\nKL", justify="right", no_wrap=True)
    if several:
        drawn.add_column("best\nround", justify="right", no_wrap=True)
    for run, label in zip(runs, labels(runs), strict=True):
        row = run.headline
        cells = [f"{row[f'{who}/trait'] - row['base/trait']:+.2f}" for who in ("steered", "healed")]
        cells += [f"{row[f'{who}/damage']:+.3f}" for who in ("steered", "healed")]
        cells += [f"{row['healed/coherence']:.0%}", f"{row['kept']:.0f}/{row['generated']:.0f}"]
        named = "=nll" if is_nll(row) else ""
        cells += [f"{row['heal_barrier_on']:.0%}{named}" if row["heal_barrier"] else "-"]
        cells += [f"{row['heal_shrink']:.0%}{named}" if row["heal_decays"] else "-", f"{run.seconds:.0f}"]
        cells += _dose(run) if dosed else []
        drawn.add_row(printable(label), *cells, *([f"{run.best} of 0-{len(run.rounds) - 1}"] if several else []))
    return drawn


def _dose(run: Run) -> tuple[str, str]:
    """The mean dose of what was learned from, and what it came to in nats, as the table shows them."""
    return f"{run.headline['dose']:.2f}", f"{run.headline['steered/kl_p95']:.2f}"


def answers(runs: list[Run], prompt: int = 0) -> list[tuple[str, str]]:
    """The same prompt answered by base, by every other steered model, and by every run's healed one."""
    named = list(zip(labels(runs), runs, strict=True))
    steered: dict[str, str] = {}  # what was said -> the first of those who say it
    for label, run in named:
        steered.setdefault(run.answers["steered"][prompt]["text"], label)
    said = [("base", runs[0].answers["base"][prompt]["text"])]
    said += [(f"steered, {label}" if len(steered) > 1 else "steered", text) for text, label in steered.items()]
    return said + [(f"healed, {label}", run.answers["healed"][prompt]["text"]) for label, run in named]


def track(folder: Path, tracker: Tracker) -> None:
    """Hand a finished run's curves and answers to its tracker."""
    runs = read(folder)
    tracker.image("curves", curves(runs, labels(runs), folder / "curves.png"))
    said = runs[0].answers
    columns = ["prompt", *said]
    rows = zip(*([answer["text"] for answer in given] for given in said.values()), strict=True)
    prompts = [answer["prompt"] for answer in said["base"]]
    tracker.table("answers", columns, [[prompt, *row] for prompt, row in zip(prompts, rows, strict=True)])


def show(folder: Path, seconds: float | None = None) -> bool:
    """Print the table, the answers and where everything is; draw `curves.png` into the folder.

    Returns whether there was a finished run.
    """
    runs = read(folder)
    if not runs:
        console.print(f"no finished run in {folder}")
        return False
    console.print()
    console.print(table(runs))
    console.print(LEGEND, style="dim")
    for note in sorted({run.note for run in runs} - {""}):
        console.print(printable(f"Model: {note}."), style="dim")
    for same in twins(runs):
        console.print(printable(f"the same cell, computed once: {'; '.join(same)}"), style="dim")
    for run, label in zip(runs, labels(runs), strict=True):
        if run.stopped:
            console.print(printable(f"{label} stopped early, {run.stopped}"))
    console.print()
    console.print(Text.assemble(("prompt   ", "bold"), printable(runs[0].answers["base"][0]["prompt"])))
    for who, text in answers(runs):
        console.print(Text.assemble((printable(who).plain, "bold")))
        console.print(Padding(printable(" ".join(text.split())), (0, 0, 0, 4)))
    try:
        picture = str(curves(runs, labels(runs), folder / "curves.png"))
    except OSError as error:  # a full disk; the results are there, and what else is to be said comes after this
        picture = f"cannot be written: {error.strerror or error}"
    console.print()
    console.print(Text(f"folder   {folder}"), soft_wrap=True)
    console.print(Text(f"curves   {picture}"), soft_wrap=True)
    if seconds is not None:
        console.print(f"took     {seconds:.0f} s")
    return True


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        refuse("usage: python -m steer_heal.compare FOLDER, the folder of a run or of a sweep")
    if not Path(sys.argv[1]).is_dir():
        refuse(f"{sys.argv[1]}: there is no such folder; give that of a run or of a sweep")
    sys.exit(0 if show(Path(sys.argv[1])) else 1)
