"""Follow and steer a sweep from its folder: `python -m steer_heal.sweep status|wait|resubmit|cancel FOLDER`.

status    how each cell fares, and what became of those without a result
wait      the same, once all have ended, and the table
resubmit  run again the cells without a result, or those that are named, by the sweep's launcher; fields of it may be
          set anew, as in `resubmit FOLDER 3-wd mem_gb=64`
cancel    stop it; what was computed stays
Exit status: 0 when every cell has its result, 1 when some have none, 2 for what cannot be done, 130 when stopped.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.table import Table

from steer_heal.compare import console, printable, show
from steer_heal.config import ConfigError
from steer_heal.processes import me
from steer_heal.progress import log_to
from steer_heal.refusal import nearest, refuse
from steer_heal.stopping import heed
from steer_heal.sweep import Sweep, told, unfinished
from steer_heal.sweep.launcher import launcher_of
from steer_heal.sweep.status import Status

USAGE = "usage: python -m steer_heal.sweep status|wait|resubmit|cancel FOLDER [CELL ...] [field=value ...]"


def main(argv: Sequence[str]) -> int:
    """The command. Raises ConfigError."""
    if len(argv) < 2 or argv[0] not in DEEDS:
        raise ConfigError(f"{USAGE}; FOLDER is that of a sweep")
    sweep = Sweep.open(Path(argv[1]))
    if argv[2:] and argv[0] != "resubmit":
        raise ConfigError(f"{argv[2]}: only resubmit takes more than a folder; {USAGE}")
    heed()
    log_to(None)
    return DEEDS[argv[0]](sweep, argv[2:])


def status(sweep: Sweep, _: Sequence[str]) -> int:
    return report(sweep, launcher_of(sweep).status(sweep))


def wait(sweep: Sweep, _: Sequence[str]) -> int:
    statuses = launcher_of(sweep).wait(sweep)
    show(sweep.folder)
    return report(sweep, statuses)


def resubmit(sweep: Sweep, arguments: Sequence[str]) -> int:
    """Run cells again. Cells at work or in a queue are left alone."""
    fields = {key: yaml.safe_load(value) for key, found, value in (a.partition("=") for a in arguments) if found}
    named = [argument for argument in arguments if "=" not in argument]
    for cell in named:
        if cell not in sweep.cells:
            raise ConfigError(f"{cell}: no cell of {sweep.folder}.{nearest(cell, sweep.cells)}")
    how = launcher_of(sweep, fields)
    how.prepare()
    statuses = how.status(sweep)
    busy = [cell for cell in named if statuses[cell].state in ("waiting", "running")]
    if busy:
        raise ConfigError(f"{busy[0]}: it is {statuses[busy[0]].state}; cancel the sweep first")
    again = named or [c for c, s in unfinished(statuses).items() if s.state not in ("waiting", "running")]
    if not again:
        return report(sweep, statuses)
    sweep.change(owner=me())
    sweep.wait_again(again)
    how.run(sweep, again)
    statuses = how.status(sweep)
    if any(s.state not in ("waiting", "running") for s in statuses.values()):
        show(sweep.folder)
    return report(sweep, statuses)


def cancel(sweep: Sweep, _: Sequence[str]) -> int:
    launcher_of(sweep).cancel(sweep)
    return 0


def report(sweep: Sweep, statuses: dict[str, Status]) -> int:
    """Print how the cells fare; the exit status that goes with it."""
    drawn = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("cell", "state", "tries", "job", "where", "since (UTC)"):
        drawn.add_column(column, no_wrap=column != "where")
    for cell, s in statuses.items():
        since = s.ended or s.began or ""
        drawn.add_row(printable(cell), s.state, str(s.attempt), s.job or "", printable(s.where()), since)
    console.print(drawn)
    counts = Counter(s.state for s in statuses.values())
    console.print(", ".join(f"{n} {state}" for state, n in counts.items()))
    ended = {cell: s for cell, s in statuses.items() if s.state not in ("waiting", "running")}
    for line in told(sweep.folder, ended):
        console.print(printable(line), soft_wrap=True)
    if counts["interrupted"]:
        return 130
    return 0 if counts["finished"] == len(statuses) else 1


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
