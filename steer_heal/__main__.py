"""The commands: `steer-heal VERB`, or `python -m steer_heal VERB`.

run      one run, or a sweep with -m    as python -m steer_heal.main
compare  table, curves and answers      as python -m steer_heal.compare
show     completions, kept and dropped  as python -m steer_heal.show
sweep    follow and control a sweep     as python -m steer_heal.sweep
store    list and manage results        as python -m steer_heal.store
"""

from __future__ import annotations

import runpy
import sys

from steer_heal.config.errors import nearest, refuse

MODULES = {"run": "main", "compare": "compare", "show": "show", "sweep": "sweep", "store": "store"}


def main() -> None:
    """Run the command that the first argument names with the remaining arguments, and exit with its status."""
    given = sys.argv[1:]
    if given[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0 if given else 2)
    verb = given[0]
    if verb not in MODULES:
        meant = nearest(verb, MODULES) or f" There are {', '.join(MODULES)}"
        refuse(f"{verb}: there is no such command.{meant}")
    sys.argv = [f"steer-heal {verb}", *given[1:]]
    runpy.run_module(f"steer_heal.{MODULES[verb]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
