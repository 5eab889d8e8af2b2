"""Follow and steer a sweep from its folder: `python -m steer_heal.sweep status|wait|resubmit|cancel FOLDER`.

status    how each cell fares, and what became of those without a result
wait      the same, once all have ended, and the table
resubmit  run again the cells without a result, or those that are named, by the sweep's launcher; fields of it may be
          set anew, as in `resubmit FOLDER 3-wd mem_gb=64`
cancel    stop it; what was computed stays
Exit status: 0 when every cell has its result, or was submitted, 1 when some have none, 2 for what cannot be done, 130
when stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from loguru import logger

from steer_heal.config import ConfigError
from steer_heal.config.errors import nearest, refuse
from steer_heal.sweep import Sweep, launching
from steer_heal.sweep.cell import UNUSABLE, thawed
from steer_heal.sweep.launcher import launcher_of
from steer_heal.sweep.report import BUSY, concluded, listed
from steer_heal.system.signals import heed
from steer_heal.system.terminal import log_to

USAGE = "usage: python -m steer_heal.sweep status|wait|resubmit|cancel FOLDER [CELL ...] [field=value ...]"


def main(argv: Sequence[str]) -> int:
    """The command. Raises ConfigError."""
    if list(argv) in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) < 2 or argv[0] not in DEEDS:
        raise ConfigError(f"{USAGE}; FOLDER is that of a sweep")
    sweep = Sweep.open(Path(argv[1]))
    if argv[2:] and argv[0] != "resubmit":
        raise ConfigError(f"{argv[2]}: only resubmit takes more than a folder; {USAGE}")
    heed()
    log_to(None)
    return DEEDS[argv[0]](sweep, argv[2:])


def status(sweep: Sweep, _: Sequence[str]) -> int:
    return listed(sweep.folder, launcher_of(sweep).status(sweep))


def wait(sweep: Sweep, _: Sequence[str]) -> int:
    return concluded(sweep.folder, launcher_of(sweep).wait(sweep))


def resubmit(sweep: Sweep, arguments: Sequence[str]) -> int:
    """Run cells again. Cells at work or in a queue are left alone."""
    named = list(dict.fromkeys(argument for argument in arguments if argument in sweep.cells))
    fields = dict(_field(argument, sweep) for argument in arguments if argument not in named)
    how = launcher_of(sweep, fields)
    how.prepare()
    try:
        with launching(sweep.folder):
            sweep = Sweep.open(sweep.folder)  # as whoever launched last has left it
            statuses = how.status(sweep)
            if busy := [cell for cell in named if statuses[cell].state in BUSY]:
                raise ConfigError(f"{busy[0]}: it is {statuses[busy[0]].state}; wait for its end, or cancel the sweep")
            again = named or [cell for cell, s in statuses.items() if s.state not in ("finished", *BUSY)]
            if not again:
                logger.info("there is nothing to run again")
                return listed(sweep.folder, statuses)
            with suppress(*UNUSABLE):
                thawed(sweep.place(again[0]))  # takes in options from elsewhere
            sweep.wait_again(again)
            how.launch(sweep, again)
        how.follow(sweep)
    except (KeyboardInterrupt, SystemExit):
        concluded(sweep.folder, how.status(sweep))
        return 130
    statuses = how.status(sweep)
    if any(s.state in BUSY for s in statuses.values()):
        listed(sweep.folder, statuses)
        return 0
    return concluded(sweep.folder, statuses)


def _field(argument: str, sweep: Sweep) -> tuple[str, Any]:
    """A launcher's field and its value. Raises ConfigError for what is neither that nor a cell."""
    key, found, value = argument.partition("=")
    if not found:
        raise ConfigError(f"{argument}: no cell of {sweep.folder}.{nearest(argument, sweep.cells)}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{argument}: cannot be read; write field=value, a list as field=[a,b]") from None


def cancel(sweep: Sweep, _: Sequence[str]) -> int:
    launcher_of(sweep).cancel(sweep)
    logger.info("told to stop; `python -m steer_heal.sweep status {}` shows when it has", sweep.folder)
    return 0


DEEDS = {"status": status, "wait": wait, "resubmit": resubmit, "cancel": cancel}

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        refuse(str(error))
    except OSError as error:  # of the folder's own files, on a full or read-only disk
        refuse(f"{error.filename or 'FOLDER'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
