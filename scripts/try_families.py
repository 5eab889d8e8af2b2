"""Try every family of language models in transformers, tiny and random: python scripts/try_families.py [--help]

    python scripts/try_families.py                       # all of them, about half an hour on one core
    python scripts/try_families.py llama mamba           # some
    python scripts/try_families.py ~/models/mine         # a folder of your own, or a Hub id; small ones are quick
    python scripts/try_families.py --resume --write-docs # what the record lacks or has as wrong, then docs/models.md

Each is opened as the command line opens it (`model=hub model.id=FOLDER`), in a process of its own that is stopped
beyond its time or memory, and compared with plain transformers and PEFT on the same files: log-probabilities, greedy
decoding, states, steering, folding, gradients, and a whole round. It agrees, or it is refused, in one line before
anything starts, or it cannot be tried here. Anything else is wrong, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from families import compare
from families.docs import write_docs
from families.subject import Subject, Unlike, opened, targets_of
from families.tiny import FAMILIES, NOT_TRIED, put_down
from loguru import logger

from steer_heal.config import ConfigError
from steer_heal.config.errors import one_line
from steer_heal.lm.tree import room

GIGABYTE = 1 << 30


def main(argv: Sequence[str] | None = None) -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("names", nargs="*", help="families, folders or Hub ids; all families if there is none")
    ask.add_argument("--out", type=Path, default=Path("outputs/families.jsonl"), help="the record, a line a family")
    ask.add_argument("--resume", action="store_true", help="keep the record, and try what it lacks or has as wrong")
    ask.add_argument("--write-docs", action="store_true", help="write the record's summary into docs/models.md")
    ask.add_argument("--seconds", type=int, default=120, help="time for one family")
    ask.add_argument("--gigabytes", type=int, default=12, help="address space for one family")
    given = ask.parse_args(argv)
    if unknown := [
        name for name in given.names if name not in FAMILIES and "/" not in name and not Path(name).is_dir()
    ]:
        ask.error(f"{', '.join(unknown)}: neither a family of causal language models in transformers nor a folder")
    torch.set_num_threads(1)  # tiny models are quicker so, and a fork must not need the threads of its parent
    record = read(given.out) if given.resume else {}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    done = {name for name, row in record.items() if row["outcome"] != "wrong"}
    names = [name for name in given.names or FAMILIES if name not in done]
    with given.out.open("a" if given.resume else "w", encoding="utf-8") as file:
        for name in names:
            record[name] = tried(name, given.seconds, given.gigabytes * GIGABYTE)
            print(json.dumps(record[name]), file=file, flush=True)
            print(f"{name:24} {record[name]['outcome']:9} {record[name].get('said', '')}", flush=True)
    if given.write_docs:
        write_docs([record[name] for name in sorted(record)])
    wrong = [name for name in names if record[name]["outcome"] == "wrong"]
    return int(bool(wrong))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of earlier walks by family, the last of each."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["family"]: row for row in rows}


def tried(name: str, seconds: int, memory: int) -> dict[str, Any]:
    """Try one family in a fork of this process. Returns its record."""
    begun = time.monotonic()
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix="families-") as scratch:
        if not (pid := os.fork()):
            os.close(reading)
            _child(name, Path(scratch), writing, seconds, memory)
        os.close(writing)
        with open(reading, encoding="utf-8") as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
    if text:
        found: dict[str, Any] = json.loads(text)
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        found = {"outcome": "wrong", "said": f"not finished after {seconds} s"}
    else:
        found = {"outcome": "wrong", "said": f"the process died of {status}"}
    return {"family": name, **found, "seconds": round(time.monotonic() - begun, 1)}


def _child(name: str, scratch: Path, writing: int, seconds: int, memory: int) -> None:
    """Try one family within limits, write its record to the pipe, and end the process."""
    try:
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        logger.remove()
        os.write(writing, json.dumps(outcome(name, scratch)).encode())
    finally:
        os._exit(0)


def outcome(name: str, scratch: Path) -> dict[str, Any]:
    """Return what becomes of one family, folder or Hub id: `outcome`, what was `said`, and each check's distance."""
    if name in NOT_TRIED:
        return {"outcome": "not tried", "said": NOT_TRIED[name]}
    model = name
    if name in FAMILIES:
        model = str(scratch / "model")
        try:
            put_down(name, Path(model))
        except Exception as error:  # noqa: BLE001  any: it is the family's own code that cannot make its model
            return {"outcome": "not tried", "said": f"cannot be made here: {_line(error)}"}
    found = _compared(model, scratch)
    if re.search(r"\[PEFT|lora[.]target_modules", found.get("said", "")) and (targets := targets_of(model)):
        found = {**_compared(model, scratch / "chosen", targets), "options": targets, "default": found["said"]}
    return found


def _compared(model: str, scratch: Path, *options: str) -> dict[str, Any]:
    """Return the outcome of every check."""
    when = "checking"  # before anything starts
    try:
        subject = opened(model, *options)
        when = "loading"
        kind = type(subject.base.model).__name__
    except ConfigError as error:
        return {
            "outcome": "refused",
            "when": when,
            "said": one_line(error).replace(repr(model), "...").replace(model, "..."),
        }
    except Exception as error:  # noqa: BLE001  any: it is a defect, to be recorded
        return {"outcome": "wrong", "when": when, "said": f"{when}: {_line(error)}"}
    done, failed = dict[str, float](), dict[str, str]()
    checks: dict[str, Callable[[Subject], float]] = {
        **compare.CHECKS,
        "round": lambda subject: compare.one_round(subject, scratch),
    }
    for what, check in checks.items():
        try:
            done[what] = check(subject)
        except Unlike as error:
            failed[what] = str(error)
        except ConfigError as error:
            if "lora.first" not in str(error):  # of the layers that are adapted none is in the upper half
                failed[what] = one_line(error)
        except Exception as error:  # noqa: BLE001  any: it is a defect, to be recorded
            failed[what] = _line(error)
    said = {"said": "; ".join(f"{what}: {line}" for what, line in failed.items())} if failed else {}
    ran = {"tree": bool(room(subject.base.model, 100))}
    return {"outcome": "wrong" if failed else "agrees", "class": kind, **said, "checks": done, **ran}


def _line(error: Exception) -> str:
    """The error in one line, with the place where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return textwrap.shorten(f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {error}", 300)


if __name__ == "__main__":
    sys.exit(main())
