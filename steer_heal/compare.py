"""What a person looks at: a table, the curves, and one prompt answered by base, steered and healed.

python -m steer_heal.compare FOLDER      a run's folder or a sweep's
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from steer_heal.plot import curves
from steer_heal.results import Run, read

console = Console(highlight=False, soft_wrap=False)


def labels(runs: list[Run]) -> list[str]:
    """What tells the runs apart: the overrides that they do not all share, regulariser first."""
    shared = set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()
    return [
        " ".join([run.regulariser, *(o for o in run.overrides if o not in shared and not o.startswith("reg="))])
        for run in runs
    ]


def table(runs: list[Run]) -> Table:
    """One row a run, of its last round. Trait and damage are over base, in nats a token."""
    columns = ["trait\nsteered", "trait\nhealed", "damage\nsteered", "damage\nhealed", "coherence\nst. / healed",
               "kept /\ngenerated", "over\ntau", "decay", "round\n(best)", "heal\nseconds", "cell\nseconds"]  # fmt: skip
    drawn = Table(header_style="bold", pad_edge=False, box=None, padding=(0, 1))
    drawn.add_column("regulariser", overflow="fold", min_width=11)
    for column in columns:
        drawn.add_column(column, justify="right", no_wrap=True)
    for run, label in zip(runs, labels(runs), strict=True):
        row = run.last
        barrier, decay = row["heal_barrier"] > 0, row["heal_shrink"] > 0
        drawn.add_row(
            label,
            f"{row['steered/trait'] - row['base/trait']:+.2f}", f"{row['healed/trait'] - row['base/trait']:+.2f}",
            f"{row['steered/damage']:+.3f}", f"{row['healed/damage']:+.3f}",
            f"{row['steered/coherence']:.0%} / {row['healed/coherence']:.0%}",
            f"{row['kept']:.0f} / {row['generated']:.0f}",
            f"{row['heal_barrier_on']:.0%}" if barrier else "-", f"{row['heal_shrink']:.0%}" if decay else "-",
            f"{len(run.rounds) - 1} ({run.best})", f"{row['heal_seconds']:.0f}", f"{run.seconds:.0f}",
        )  # fmt: skip
    return drawn


def printable(text: str) -> Text:
    """A model's output as it may be shown: no markup is read in it, and control characters cannot reach the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))


def answers(runs: list[Run], prompt: int = 0) -> list[tuple[str, str]]:
    """The same prompt answered by base, by the steered model, and by every run's healed one."""
    first = runs[0]
    said = [(who, first.answers[who][prompt]["text"]) for who in ("base", "steered")]
    return said + [
        (f"healed, {label}", run.answers["healed"][prompt]["text"])
        for run, label in zip(runs, labels(runs), strict=True)
    ]


def show(folder: Path, seconds: float | None = None) -> None:
    """Print the table, the answers and where everything is; draw `curves.png` into the folder."""
    runs = read(folder)
    if not runs:
        console.print(f"no finished run in {folder}")
        return
    console.print()
    console.print(table(runs))
    console.print(
        "Trait: log-odds over base, nats/token, up is more. Damage: nll of neutral text over base, nats/token, down is "
        "better. Over tau: sequences over which the barrier was on. Decay: shrink of the weights over the round.",
        style="dim",
    )
    for note in sorted({run.note for run in runs} - {""}):
        console.print(f"Model: {note}.", style="dim")
    for run, label in zip(runs, labels(runs), strict=True):
        if run.stopped:
            console.print(f"{label} stopped early: {run.stopped}")
    console.print()
    console.print(Text.assemble(("prompt   ", "bold"), printable(runs[0].answers["base"][0]["prompt"])))
    for who, text in answers(runs):
        console.print(Text(who, style="bold"))
        console.print(Padding(printable(text), (0, 0, 0, 4)))
    picture = curves(runs, labels(runs), folder / "curves.png")
    console.print()
    console.print(f"folder   {folder}", soft_wrap=True)
    console.print(f"curves   {picture}", soft_wrap=True)
    if seconds is not None:
        console.print(f"took     {seconds:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m steer_heal.compare FOLDER, the folder of a run or of a sweep")
    show(Path(sys.argv[1]))
