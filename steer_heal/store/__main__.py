"""python -m steer_heal.store ls|show|verify|gc: list the store, verify that it is intact, and delete unused results."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from steer_heal.store import damage
from steer_heal.store.entries import Entry, entries, find, leftovers, remove, size, used_by_runs
from steer_heal.system.paths import expanded
from steer_heal.system.streams import exit_with

DAY_S = 86400.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m steer_heal.store", description=__doc__)
    parser.add_argument(
        "--store", type=_folder, default=Path("outputs/store"), help="store folder (default %(default)s)"
    )
    commands = parser.add_subparsers(required=True, metavar="ls|show|verify|gc")
    listing = commands.add_parser("ls", help="list stages with result count and size, or the results of one stage")
    listing.add_argument("stage", nargs="?", help="a stage, such as heal.heal")
    listing.set_defaults(do=_ls)
    showing = commands.add_parser("show", help="show a result's inputs, when and where it was made, and its duration")
    showing.add_argument("key", help="the result's key, or a prefix of it")
    showing.set_defaults(do=_show)
    commands.add_parser("verify", help="compare every file with its checksum").set_defaults(do=_verify)
    tidying = commands.add_parser("gc", help="list what can be deleted: leftover files, and outdated results")
    unused = "also results that no run references and that were not used for this many days"
    tidying.add_argument("--unused", type=float, metavar="DAYS", help=unused)
    tidying.add_argument("--runs", type=_folder, default=Path("outputs"), help="the runs' folder (default %(default)s)")
    tidying.add_argument("--delete", action="store_true", help="delete the listed files and results")
    tidying.set_defaults(do=_gc)
    given = parser.parse_args(arguments)
    if not given.store.is_dir():
        parser.error(f"--store {given.store.absolute()}: there is no such folder")
    if getattr(given, "unused", None) is not None and not given.runs.is_dir():
        parser.error(
            f"--runs {given.runs}: there is no such folder, and without the runs the results they reference are unknown"
        )
    given.do(given)


def _folder(given: str) -> Path:
    try:
        return Path(expanded(given))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{given}: must be {error}") from None


def _ls(given: argparse.Namespace) -> None:
    if given.stage is None:
        stages = defaultdict[str, list[Entry]](list)
        for entry in entries(given.store):
            stages[entry.stage].append(entry)
        print(f"{'stage':24} {'results':>8} {'size':>10}   last used")
        for stage, some in stages.items():
            latest = _date(max(entry.used for entry in some))
            print(f"{stage:24} {len(some):8} {_size(sum(entry.bytes for entry in some)):>10}   {latest}")
        return
    print(f"{'key':24} {'size':>10} {'took':>9}   {'made':20}   last used")
    there = 0
    for entry in entries(given.store, given.stage):
        about, there = entry.manifest, there + 1
        if not about:
            print(f"{entry.key:24} its manifest cannot be read")
            continue
        old = "   outdated" if entry.outdated else ""
        took = f"{about['seconds']:.1f} s"
        print(f"{entry.key:24} {_size(entry.bytes):>10} {took:>9}   {about['made']:20}   {_date(entry.used)}{old}")
    if not there:
        sys.exit(f"{given.stage}: there are no results of this stage")


def _show(given: argparse.Namespace) -> None:
    found = find(given.store, given.key)
    if len(found) != 1:
        problem = f"{len(found)} results match; give a longer prefix" if found else "no such result"
        sys.exit(f"{given.key}: {problem}")
    (entry,) = found
    wrong = damage(entry.folder)
    state = "intact" if wrong == "" else wrong or "it has no manifest"
    print(f"{entry.stage} {entry.key}\nfolder {entry.folder}\n{state}")
    print(json.dumps(entry.manifest, indent=1, ensure_ascii=True))


def _verify(given: argparse.Namespace) -> None:
    checked = bad = 0
    for entry in entries(given.store):
        checked += 1
        if (wrong := damage(entry.folder)) != "":
            bad += 1
            print(f"{entry.folder}: {wrong or 'it has no manifest'}")
    print(f"{checked} results, {bad} damaged" + ("; a run that needs one of these computes it again" if bad else ""))
    sys.exit(1 if bad else 0)


def _gc(given: argparse.Namespace) -> None:
    unneeded = [(path, "leftover", size(path)) for path in leftovers(given.store)]
    try:
        kept = used_by_runs(given.runs) if given.unused is not None else set[str]()
    except ValueError as error:
        sys.exit(str(error))
    for entry in entries(given.store):
        idle = time.time() - entry.used
        if not entry.manifest:
            unneeded.append((entry.folder, "unreadable", size(entry.folder)))
        elif entry.outdated:
            unneeded.append((entry.folder, "outdated", entry.bytes))
        elif given.unused is not None and entry.key not in kept and idle > given.unused * DAY_S:
            unneeded.append((entry.folder, f"unused for {idle / DAY_S:.0f} days", entry.bytes))
    for path, why, held in unneeded:
        print(f"{_size(held):>10}  {path}  {why}")
        if given.delete:
            remove(path)
    items = "item" if len(unneeded) == 1 else "items"
    total = f"{len(unneeded)} {items}, {_size(sum(held for _, _, held in unneeded))}"
    print(f"deleted {total}" if given.delete else f"would delete {total}; add --delete to do it")


def _size(held: int) -> str:
    return f"{held / 1e6:.1f} MB" if held >= 1e5 else f"{held / 1e3:.1f} kB"


def _date(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


if __name__ == "__main__":
    exit_with(main)
