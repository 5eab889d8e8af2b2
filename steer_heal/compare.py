"""python -m steer_heal.compare FOLDER: the table, the curves and the answers of a run or a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from steer_heal.config import ConfigError
from steer_heal.config.errors import refuse
from steer_heal.report.table import show
from steer_heal.system.paths import expanded
from steer_heal.system.streams import exit_with

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
    try:
        return 0 if show(folder) else 1
    except ConfigError as error:
        refuse(str(error))


if __name__ == "__main__":
    exit_with(main)
