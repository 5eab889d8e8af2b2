"""Identification of a process for other processes, and checks that it is still alive."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any


def current_process() -> dict[str, Any]:
    """Identify this process, so that another one on the same machine and boot can check that it is alive."""
    return {"host": platform.node(), "place": _place(), "pid": os.getpid(), "started": started(os.getpid())}


def describe(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def dead(owner: dict[str, Any]) -> bool:
    """True if the owner is known to be gone. Nothing is known about another machine, boot or container."""
    if owner.get("place") != _place() or "pid" not in owner:
        return False
    return started(owner["pid"]) not in ("", owner.get("started"))


def alive(owner: dict[str, Any]) -> bool:
    """True if the owner is known to be alive, whatever the clocks say."""
    if owner.get("place") != _place() or "pid" not in owner:
        return False
    return bool(at := started(owner["pid"])) and at == owner.get("started")


def _place() -> str:
    """The scope in which a process id is unique: a machine since its last boot, and a container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def started(pid: int) -> str | None:
    """Start time of a process in ticks since boot ("" if it cannot be determined); None if there is no such process."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None if not _signalled(pid) else ""  # /proc may hide other users' processes
        return None if fields[0] in "ZX" else fields[19]
    return "" if _signalled(pid) else None


def _signalled(pid: int) -> bool:
    """True if a process with this id exists, whichever user owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
