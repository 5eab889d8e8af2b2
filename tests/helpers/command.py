"""The command as a user starts it, in a process of its own, or in a fork of one that has everything imported."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from helpers.faults import Children

ENDS_S = 300  # far above what any of them takes: it tells a hang from a slow machine


def run(folder: Path, *arguments: str, module: str = "main", **environ: str) -> subprocess.CompletedProcess[str]:
    """`python -m steer_heal.<module> <arguments>` in a folder, its output caught."""
    env, command = _prepared(module, arguments, environ)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=ENDS_S, check=False)


def begin(folder: Path, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
    """The same, left running, its output thrown away."""
    env, command = _prepared("main", arguments, environ)
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def forked(folder: Path, *arguments: str, module: str = "main", **environ: str) -> subprocess.CompletedProcess[str]:
    """The same as `run`, but without imports, which take most of a small command's time."""
    env, command = _prepared(module, arguments, environ)
    fork = _parent()
    errors = fork.output.with_name("errors.txt")
    errors.unlink(missing_ok=True)
    code = fork.end(fork.begin(folder, module, *arguments, environ=env, errors=errors))
    return subprocess.CompletedProcess(command, code, fork.output.read_text(), errors.read_text())


@cache
def _parent() -> Children:
    """Start it once; it ends with the process that started it."""
    root = tempfile.mkdtemp(prefix="forks-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return Children(Path(root))


def _prepared(module: str, arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    colour = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "HYDRA_FULL_ERROR", "COLUMNS")
    plain = {name: value for name, value in os.environ.items() if name not in colour}
    return plain | {"OMP_NUM_THREADS": "1"} | dict(environ), [sys.executable, "-m", f"steer_heal.{module}", *arguments]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def result(folder: Path) -> dict[str, Any]:
    """A run's result.json."""
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return loaded
