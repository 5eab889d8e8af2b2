"""The command as a user starts it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENDS_S = 300  # far above what any of them takes: it tells a hang from a slow machine


def run(folder: Path, *arguments: str, module: str = "main", **environ: str) -> subprocess.CompletedProcess[str]:
    """`python -m steer_heal.<module> <arguments>` in a folder, its output caught."""
    colour = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "HYDRA_FULL_ERROR", "COLUMNS")
    env = {name: value for name, value in os.environ.items() if name not in colour} | {"OMP_NUM_THREADS": "1"} | environ
    command = [sys.executable, "-m", f"steer_heal.{module}", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=ENDS_S, check=False)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def result(folder: Path) -> dict[str, Any]:
    """A run's result.json."""
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return loaded
