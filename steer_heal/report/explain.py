"""What a figure of a comparison was made of: the store's entries, and the command that makes it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from steer_heal.config import ConfigError
from steer_heal.report.comparison import Comparison
from steer_heal.report.run_folder import Run

# Column -> the ends of the purposes of its entries, `{k}` being the round shown.
SOURCES = {
    "trait": ("base, trait", "round {k}, healed, trait"),
    "damage": ("base, damage", "round {k}, healed, damage"),
    "at T*": ("base, trait", "base, damage", "round {k}, gate *, trait", "round {k}, gate *, damage"),
}
ALIKE = {"for": "trait", "against": "trait", "vs": "at T*", "gate": "at T*", "verdict": "at T*", "at": "at T*"}


def explained(comparisons: Sequence[Comparison], row: str, column: str) -> list[str]:
    """Lines for every run of a row, and of its control for what is told against it: folder, command, entries by key.

    Raises ConfigError for a row or a column that there is not.
    """
    lines = [line for found in comparisons for line in found.lines if line.row.label == row]
    if not lines:
        there = ", ".join(dict.fromkeys(line.row.label for found in comparisons for line in found.lines))
        raise ConfigError(f"--explain {row!r}: there is no such row; there are {there}")
    wanted = "at T*" if column.startswith("vs ") else ALIKE.get(column, column)
    if wanted not in SOURCES:
        raise ConfigError(f"--explain {row!r} {column!r}: must be one of {', '.join([*SOURCES, *ALIKE])}")
    runs = [run for line in lines for run in line.row.runs]
    if column.startswith("vs") or column == "verdict":
        runs += [run for line in lines if line.control for run in line.control.runs]
    return [said for run in runs for said in _of_run(run, SOURCES[wanted])]


def _of_run(run: Run, sources: Sequence[str]) -> list[str]:
    used: dict[str, str] = json.loads((run.folder / "result.json").read_text(encoding="utf-8")).get("used", {})
    ends = [source.format(k=len(run.rounds) - 1).split("*") for source in sources]
    entries = [
        f"  {key}  {purpose}"
        for key, purposes in used.items()
        for purpose in purposes.split("; ")
        if purpose.startswith("eval.evaluate: ") and any(_fits(purpose.partition(": ")[2], end) for end in ends)
    ]
    command = shlex.join(["python", "-m", "steer_heal.main", *run.overrides])
    return [str(run.folder), f"  {command}", *(entries or ["  its result names no entries of the store"])]


def _fits(place: str, end: list[str]) -> bool:
    """True for a place in the run that is `end`, or begins and ends as its two parts do."""
    return place == end[0] if len(end) == 1 else place.startswith(end[0]) and place.endswith(end[-1])
