"""Follow and control a sweep from its folder: `python -m steer_heal.sweep status|wait|resubmit|cancel FOLDER`.

status    print each cell's status, and the reason for each cell that ended without a result
wait      wait until all cells have ended, then print the table of results and the cells without one
resubmit  run the cells without a result, or only the named ones, again with the sweep's launcher; its fields can be
          changed, as in `resubmit FOLDER 3-wd mem_gb=64`; a cell whose folder was deleted is made again
cancel    stop the sweep; computed results are kept
Exit status: 0 if every cell has a result or was submitted, 1 if some have none, 2 if the command is invalid or
cannot be executed, 130 if stopped.
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
from steer_heal.config.errors import refuse
from steer_heal.config.words import nearest
from steer_heal.sweep import Sweep, archive, launching
from steer_heal.sweep.cell import UNUSABLE, load_cell
from steer_heal.sweep.launcher import launcher_of
from steer_heal.sweep.status import BUSY
from steer_heal.sweep.summary import print_status, print_summary
from steer_heal.system.paths import expanded
from steer_heal.system.signals import install_handlers
from steer_heal.system.streams import exit_with
from steer_heal.system.terminal import log_to

USAGE = "usage: python -m steer_heal.sweep status|wait|resubmit|cancel FOLDER [CELL ...] [field=value ...]"


def main(argv: Sequence[str]) -> int:
    """Run a command and return its exit status. Raises ConfigError for an invalid one."""
    if list(argv) in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) < 2 or argv[0] not in COMMANDS:
        raise ConfigError(f"{USAGE}; FOLDER is the folder of a sweep")
    sweep = Sweep.open(_folder(argv[1]))
    if argv[2:] and argv[0] != "resubmit":
        raise ConfigError(f"{argv[2]}: only resubmit takes more than a folder; {USAGE}")
    install_handlers()
    log_to(None)
    return COMMANDS[argv[0]](sweep, argv[2:])


def _folder(given: str) -> Path:
    try:
        return Path(expanded(given))
    except ValueError as error:
        raise ConfigError(f"{given}: must be {error}") from None


def status(sweep: Sweep, _: Sequence[str]) -> int:
    """Print each cell's status."""
    return print_status(sweep.folder, launcher_of(sweep).status(sweep))


def wait(sweep: Sweep, _: Sequence[str]) -> int:
    """Wait until all cells have ended, then print the summary."""
    return print_summary(sweep.folder, launcher_of(sweep).wait(sweep))


def resubmit(sweep: Sweep, arguments: Sequence[str]) -> int:
    """Run the named cells, or all without a result, again. Raises ConfigError if a named one is running or queued."""
    named = list(dict.fromkeys(argument for argument in arguments if argument in sweep.cells))
    fields = dict(_field(argument, sweep) for argument in arguments if argument not in named)
    launcher = launcher_of(sweep, fields)
    launcher.prepare()
    try:
        with launching(sweep.folder):
            sweep = Sweep.open(sweep.folder)  # another process may have changed it in the meantime
            statuses = launcher.status(sweep)
            if busy := [cell for cell in named if statuses[cell].state in BUSY]:
                state = statuses[busy[0]].state
                raise ConfigError(f"{sweep.label(busy[0])} is {state}; wait for it to end, or cancel the sweep")
            again = named or [cell for cell, s in statuses.items() if s.state not in ("finished", *BUSY)]
            if not again:
                logger.info("there is nothing to run again")
                return print_status(sweep.folder, statuses)
            if not (again := _restored(sweep, again)):
                return print_status(sweep.folder, statuses)
            with suppress(*UNUSABLE):
                load_cell(sweep.place(again[0]))  # adopts options from outside the package
            sweep.wait_again(again)
            launcher.launch(sweep, again)
        launcher.follow(sweep)
    except (KeyboardInterrupt, SystemExit):
        print_summary(sweep.folder, launcher.status(sweep))
        return 130
    statuses = launcher.status(sweep)
    if any(s.state in BUSY for s in statuses.values()):
        print_status(sweep.folder, statuses)
        return 0
    return print_summary(sweep.folder, statuses)


def _restored(sweep: Sweep, cells: Sequence[str]) -> list[str]:
    """The cells that can be run: those whose configuration is there, or could be made again from the sweep's copy."""
    found = []
    for cell in cells:
        there = sweep.place(cell).is_dir()
        if lacked := archive.lacking(sweep.folder, cell):
            lacked = [part for part in archive.restore(sweep.folder, cell) if part != archive.PARTS[-1]]
            what = f"{', '.join(lacked)} of it is missing" if there else "its folder is missing"
            if lacked:
                logger.warning("{}: {}; {}", sweep.label(cell), what, sweep.anew(cell))
                continue
            logger.info("{}: made again as the sweep began it", sweep.label(cell))
        found.append(cell)
    return found


def _field(argument: str, sweep: Sweep) -> tuple[str, Any]:
    """Split `field=value` into a launcher's field and its value. Raises ConfigError for anything else."""
    key, found, value = argument.partition("=")
    if not found:
        raise ConfigError(f"{argument}: not a cell of {sweep.folder}.{nearest(argument, sweep.cells)}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{argument}: cannot be read; write field=value, a list as 'field=[a,b]'") from None


def cancel(sweep: Sweep, _: Sequence[str]) -> int:
    """Ask the sweep to stop, and return without waiting for it."""
    launcher_of(sweep).cancel(sweep)
    logger.info("asked the sweep to stop; `python -m steer_heal.sweep status {}` shows when it has", sweep.folder)
    return 0


COMMANDS = {"status": status, "wait": wait, "resubmit": resubmit, "cancel": cancel}


def _main() -> int:
    try:
        return main(sys.argv[1:])
    except ConfigError as error:
        refuse(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:  # the sweep's own files cannot be written, as on a full or read-only disk
        refuse(f"{error.filename or 'FOLDER'}: {error.strerror}")


if __name__ == "__main__":
    exit_with(_main)
