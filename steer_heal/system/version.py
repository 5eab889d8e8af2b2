"""Which code made a result: the version, and the commit where the package comes from a repository."""

from __future__ import annotations

import functools
import json
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("steer_heal", "hydra_plugins", "conf")  # a new file there is a change too


@functools.cache
def code_version() -> dict[str, str | bool | None]:
    """Return `version`, `commit` and `dirty` (the code differs from it); the last two are None where unknown."""
    version = metadata.version("steer_heal")
    if _git("rev-parse", "--show-toplevel") == str(ROOT):  # not the repository of somebody whose .venv this lies in
        tracked = _git("status", "--porcelain", "--untracked-files=no")
        added = _git("status", "--porcelain", "--untracked-files=normal", "--", *CODE)
        dirty = None if tracked is None or added is None else bool(tracked or added)
        return {"version": version, "commit": _git("rev-parse", "HEAD"), "dirty": dirty}
    return {"version": version, "commit": _installed_commit(), "dirty": None}


def told(code: dict[str, str | bool | None]) -> str:
    """Such as `0.1.0 (1e22425, with changes)`."""
    parts = [str(code["commit"])[:7]] if code.get("commit") else []
    parts += ["with changes"] if code.get("dirty") else []
    return f"{code['version']} ({', '.join(parts)})" if parts else str(code["version"])


def _git(*arguments: str) -> str | None:
    """Return a git command's output; None without git, or where the package does not lie in a repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _installed_commit() -> str | None:
    """Return the commit that pip recorded when it installed from a repository."""
    text = metadata.distribution("steer_heal").read_text("direct_url.json")
    commit = json.loads(text).get("vcs_info", {}).get("commit_id") if text else None
    return commit if isinstance(commit, str) else None
