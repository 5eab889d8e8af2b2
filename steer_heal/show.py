"""python -m steer_heal.show RUN: the completions of a run, kept and dropped, with scores and reasons.

RUN is the folder of a run or of a cell of a sweep; one that is still going, or has failed, shows what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from rich.text import Text

from steer_heal.config import ConfigError
from steer_heal.config.errors import refuse
from steer_heal.config.words import nearest
from steer_heal.report.completions import FOLDER, Record, counts, read
from steer_heal.sweep import NAME as SWEEP
from steer_heal.sweep import Sweep
from steer_heal.sweep.status import NAME as STATUS
from steer_heal.sweep.status import probe_status
from steer_heal.system.paths import expanded
from steer_heal.system.streams import exit_with
from steer_heal.system.terminal import escaped, stdout

MARKS = ("result.json", STATUS, FOLDER)  # a folder with one of these is a run's
NAMED = 8  # runs at most that a message names
COLOURS = {"kept": "green", "passed, not drawn": "", "dropped": "red"}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{message}; {' '.join(self.format_usage().split())}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the completions; return the exit status: 0 if there are any, 1 if not, 2 for an argument that is wrong."""
    parser = Parser(prog="python -m steer_heal.show", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="the folder of a run, or of a cell of a sweep")
    parser.add_argument("--round", type=int, metavar="N", help="only those of round N")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--kept", action="store_true", help="only those that were trained on")
    which.add_argument("--dropped", action="store_true", help="only those that failed a filter")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="only those whose prompt contains TEXT, in upper or lower case"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, in ASCII")
    given = parser.parse_args(arguments)
    try:
        folder = _run(Path(expanded(given.run)))
        rounds = read(folder)
    except ConfigError as error:
        refuse(str(error))
    if given.round is not None and given.round not in rounds and rounds:
        refuse(f"--round {given.round}: {folder} has {_listed('round', list(map(str, rounds)))}")
    chosen = [
        row
        for k, rows in rounds.items()
        for row in rows
        if given.round in (None, k)
        and (row["kept"] or not given.kept)
        and (not row["passed"] or not given.dropped)
        and (given.prompt or "").casefold() in row["prompt"].casefold()
    ]
    if given.json:
        for row in chosen:
            print(json.dumps(row))
    else:
        _page([*_head(folder, rounds), *(line for row in chosen for line in _told(row))])
        if rounds and not chosen:
            print("no completion is both in the run and asked for", file=sys.stderr)
    return 0 if chosen else 1


def _run(path: Path) -> Path:
    """The folder, if it is a run's. Raises ConfigError, which says what to give instead."""
    if (path / SWEEP).is_file():
        raise ConfigError(f"{path}: this is a sweep; give one of its cells: {path}/{_few(Sweep.open(path).cells)}")
    if path.is_dir() and any((path / mark).exists() for mark in MARKS):
        return path
    if any((path.parent / mark).exists() for mark in MARKS) and path.exists():
        raise ConfigError(f"{path}: not the folder of a run; give {path.parent}")
    if not path.is_dir():
        there = [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
        what = "a file, not the folder of a run" if path.exists() else "there is no such folder"
        raise ConfigError(f"{path}: {what}.{nearest(path.name, there)}".removesuffix("."))
    runs = sorted({one.parent.name for mark in (*MARKS, SWEEP) for one in path.glob(f"*/{mark}")})
    raise ConfigError(f"{path}: not the folder of a run{f'; in it there are {_few(runs)}' if runs else ''}")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _listed(what: str, names: Sequence[str]) -> str:
    return f"{what} {names[0]} only" if len(names) == 1 else f"{what}s {', '.join(names)}"


def _head(folder: Path, rounds: Mapping[int, Sequence[Record]]) -> Iterator[Text]:
    """The run, how it stands, and the outcome of each round."""
    status = probe_status(folder)
    yield Text(escaped(str(folder)), style="bold")
    if status.state == "running":
        yield Text(escaped(f"still running, by {status.where()}: these are the rounds so far"))
    elif status.state != "finished" and (folder / STATUS).exists():
        yield Text(escaped(f"{status.state}: {status.message}" if status.message else status.state))
    for k, rows in rounds.items():
        yield Text(f"round {k}: {counts(rows)}")
    if not rounds and (folder / "result.json").exists():
        yield Text(
            "made by an earlier version, which left its completions in the store; run it again to have them here"
        )
    elif not rounds:
        yield Text("no completions yet" if status.state in ("running", "waiting") else "no completions")
    yield Text()


def _told(row: Record) -> Iterator[Text]:
    """A completion in full, and an empty line."""
    outcome = "kept" if row["kept"] else "passed, not drawn" if row["passed"] else "dropped"
    reasons = ", ".join(_failure(failure) for failure in row["failed"])
    yield Text.assemble(
        (f"round {row['round']}, number {row['number']}, dose {row['dose']:.3g}: ", "bold"),
        (outcome, COLOURS[outcome]),
        escaped(f" for {reasons}" if reasons else ""),
    )
    scores = ", ".join(f"{name} {value:.3g}" for name, value in row["scores"].items())
    yield Text(escaped(f"scores   {scores}; {row['tokens']} tokens{'' if row['ended'] else ', cut off'}"), style="dim")
    yield Text.assemble(("prompt   ", "dim"), escaped(" ".join(row["prompt"].split("\n"))))
    width = stdout.width if stdout.is_terminal else None
    for line in escaped(row["text"]).split("\n"):
        parts = Text(line).wrap(stdout, max(20, width - 4)) if width else [Text(line)]
        for part in parts:
            yield Text.assemble("    ", part)
    yield Text()


def _failure(failure: Record) -> str:
    """A filter that failed, its score, and what that is compared with: `perplexity 412 (max 60)`."""
    limits = ", ".join(f"{name} {value:g}" for name, value in failure.items() if name not in ("filter", "score"))
    return f"{failure['filter']} {failure['score']:.3g}{f' ({limits})' if limits else ''}"


def _page(lines: Sequence[Text]) -> None:
    """Print the lines, on a terminal through $PAGER, or less."""
    if not stdout.is_terminal:
        for line in lines:
            stdout.print(line, soft_wrap=True)
        return
    os.environ.setdefault("LESS", "FRX")  # colours pass, and what fits the screen is left on it
    with stdout.capture() as caught:
        for line in lines:
            stdout.print(line, soft_wrap=True)
    pydoc.pager(caught.get())


if __name__ == "__main__":
    exit_with(main)
