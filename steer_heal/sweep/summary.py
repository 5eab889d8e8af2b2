"""Printed summaries of a sweep: each cell's status, why cells have no result, and how to run those again."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path

from rich.table import Table

from steer_heal.config.errors import plain
from steer_heal.sweep import NAME, Sweep, archive
from steer_heal.sweep.status import BUSY, ENDED, Status
from steer_heal.system.terminal import counted, printable, stdout

ALIKE = 3  # cells that are named of those without a result for the same reason


def print_summary(folder: Path, statuses: dict[str, Status], seconds: float | None = None) -> int:
    """Print the table of results and, to stderr, the cells without one. Returns the exit status: 0 if all finished."""
    from steer_heal.report.table import show  # slow to import, and `print_status` does not need it

    show(folder, seconds=seconds)
    for line in unfinished(folder, statuses):
        print(plain(line), file=sys.stderr)
    return int(any(status.state != "finished" for status in statuses.values()))


def print_status(folder: Path, statuses: dict[str, Status]) -> int:
    """Print each cell's status and the cells that ended without a result. Returns exit status 0 if all finished."""
    drawn = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("cell", "state", "tries", "job", "where", "since (UTC)"):
        drawn.add_column(column, no_wrap=column != "where", overflow="fold")
    for cell, s in statuses.items():
        words = (cell, s.state, str(s.attempt), s.job or "", s.where(), s.ended or s.began or "")
        drawn.add_row(*map(printable, words))
    stdout.print(drawn)
    counts: Counter[str] = Counter(s.state for s in statuses.values())
    stdout.print(", ".join(f"{counts[state]} {state}" for state in (*ENDED, *BUSY) if counts[state]))
    for line in unfinished(folder, statuses):
        stdout.print(printable(line), soft_wrap=True)
    return int(any(status.state != "finished" for status in statuses.values()))


def unfinished(folder: Path, statuses: dict[str, Status]) -> list[str]:
    """Lines about cells that ended without a result: what differs in them, their folders, reasons, and the command to
    rerun them; empty if there are none. Of many with the same reason the first are named.
    """
    found = {cell: s for cell, s in statuses.items() if s.state not in ("finished", *BUSY)}
    if not found:
        return []
    sweep = Sweep.open(folder) if (folder / NAME).is_file() else None
    names = {cell: sweep.label(cell) if sweep else cell for cell in found}
    alike: dict[tuple[str, str], list[str]] = {}
    for cell, status in found.items():
        alike.setdefault((status.state, status.message), []).append(cell)
    named = {cell for cells in alike.values() for cell in cells[: len(cells) if len(cells) <= ALIKE + 1 else ALIKE]}
    width = max(len(names[cell]) for cell in named)
    have = "has" if len(found) == 1 else "have"
    lines = [f"{len(found)} of {counted(len(statuses), 'cell')} {have} no result; see log.txt and status.json there:"]
    for (state, message), cells in alike.items():
        lines += [f"  {names[cell]:{width}}  {state:11}  {message}".rstrip() for cell in cells if cell in named]
        if more := len([cell for cell in cells if cell not in named]):
            lines += [f"  and {more} more of the same"]
    copied = archive.held(folder)
    if sweep is not None and any(cell in copied or not archive.lacking(folder, cell) for cell in found):
        lines += ["to run only these again:", f"  python -m steer_heal.sweep resubmit {shlex.quote(str(folder))}"]
    return lines
