"""python -m steer_heal.compare FOLDER: the table, the curves and the answers of a run or a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from steer_heal.config import ConfigError
from steer_heal.config.errors import refuse
from steer_heal.report.table import show
from steer_heal.sweep import NAME as SWEEP
from steer_heal.sweep import Sweep
from steer_heal.sweep.launcher import launcher_of
from steer_heal.sweep.status import BUSY
from steer_heal.sweep.summary import unfinished
from steer_heal.system.paths import expanded
from steer_heal.system.streams import exit_with
from steer_heal.system.terminal import counted, log_to, printable, stdout

USAGE = "usage: python -m steer_heal.compare FOLDER, the folder of a run or of a sweep"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and draw; return the exit status: 0 if there is a finished run, 1 if not, 2 if there is no such folder."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(given) != 1 or given[0].startswith("-"):
        refuse(USAGE)
    try:
        folder = Path(expanded(given[0]))
    except ValueError as error:
        refuse(f"{given[0]}: must be {error}")
    if not folder.is_dir():
        refuse(f"{given[0]}: there is no such folder; give the folder of a run or of a sweep")
    log_to(None)
    try:
        found = show(folder)
        for line in _without_result(folder):
            stdout.print(printable(line), soft_wrap=True)
    except ConfigError as error:
        refuse(str(error))
    return 0 if found else 1


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
