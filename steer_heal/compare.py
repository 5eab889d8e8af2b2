"""python -m steer_heal.compare RUN_OR_SWEEP...: one table over any number of runs, sweeps and folders of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from steer_heal.config import ConfigError
from steer_heal.config.errors import plain, refuse
from steer_heal.report.comparison import compared
from steer_heal.report.comparison_table import as_csv, as_json
from steer_heal.report.explain import explained
from steer_heal.report.replicates import gathered
from steer_heal.report.table import show, show_comparison
from steer_heal.sweep import NAME as SWEEP
from steer_heal.sweep import Sweep
from steer_heal.sweep.launcher import launcher_of
from steer_heal.sweep.status import BUSY
from steer_heal.sweep.summary import unfinished
from steer_heal.system.paths import expanded
from steer_heal.system.streams import exit_with
from steer_heal.system.terminal import counted, log_to, printable, stdout


class Parser(argparse.ArgumentParser):
    """argparse, but one line on an error."""

    def error(self, message: str) -> None:  # type: ignore[override]
        refuse(f"{message}; {' '.join(self.format_usage().split())}")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Exits with status 2 for arguments that are not understood."""
    ask = Parser("python -m steer_heal.compare", description=__doc__)
    ask.add_argument("folders", nargs="+", metavar="FOLDER", help="of a run, of a sweep, or one that holds several")
    ask.add_argument(
        "--by", metavar="KEYS", help="group rows by these settings, such as reg,lam, and average over others"
    )
    ask.add_argument("--against", metavar="ROW", help="the control: a row's label, or settings; nll if not given")
    form = ask.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print numbers as JSON")
    form.add_argument("--csv", action="store_true", help="print numbers as CSV")
    form.add_argument(
        "--explain", nargs=2, metavar=("ROW", "COLUMN"), help="print the store entries behind a figure, and commands"
    )
    return ask.parse_args(list(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and draw; return the exit status: 0 if there is a finished run, 1 if not, 2 if there is no such folder."""
    given = parsed(sys.argv[1:] if arguments is None else arguments)
    folders = [_folder(name) for name in given.folders]
    by = given.by.split(",") if given.by else []
    log_to(None)
    try:
        alone = len(folders) == 1 and _is_one(folders[0])
        if alone and not (given.json or given.csv or given.explain):
            found = show(folders[0], by=by, against=given.against)
            for line in _without_result(folders[0]):
                stdout.print(printable(line), soft_wrap=True)
            return 0 if found else 1
        runs = gathered(folders)
        if given.explain:
            print("\n".join(plain(line) for line in explained(compared(runs, by, given.against), *given.explain)))
        elif given.json or given.csv:
            made = compared(runs, by, given.against)
            print(as_json(made) if given.json else as_csv(made), end="" if given.csv else "\n")
        elif runs:
            show_comparison(runs, by, given.against)
        else:
            stdout.print("no finished run there")
    except ConfigError as error:
        refuse(str(error))
    return 0 if runs else 1


def _folder(name: str) -> Path:
    try:
        folder = Path(expanded(name))
    except ValueError as error:
        refuse(f"{name}: must be {error}")
    if not folder.is_dir():
        refuse(f"{name}: there is no such folder; give the folder of a run or of a sweep")
    return folder


def _is_one(folder: Path) -> bool:
    """True for the folder of a run or of a sweep, or of a run that has no result."""
    return any((folder / name).is_file() for name in ("result.json", SWEEP, "status.json"))


def _without_result(folder: Path) -> list[str]:
    """Lines about the cells of a sweep that the table lacks; none for the folder of a run."""
    if not (folder / SWEEP).is_file():
        return []
    sweep = Sweep.open(folder)
    statuses = launcher_of(sweep).status(sweep)
    busy = sum(status.state in BUSY for status in statuses.values())
    lines = [f"{busy} of {counted(len(statuses), 'cell')} still waiting or running"] if busy else []
    return lines + unfinished(folder, statuses)


if __name__ == "__main__":
    exit_with(main)
