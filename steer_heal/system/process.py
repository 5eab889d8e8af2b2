"""Who a process is, in words that another one understands, and whether it still lives."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any


def me() -> dict[str, Any]:
    """This process, so that another one of the same machine and boot can tell whether it lives."""
    return {"host": platform.node(), "place": _place(), "pid": os.getpid(), "started": started(os.getpid())}


def describe(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def dead(owner: dict[str, Any]) -> bool:
    """Whether the owner is known to be gone. Of another machine, boot or container nothing is known."""
    if owner.get("place") != _place() or "pid" not in owner:
        return False
    return started(owner["pid"]) not in ("", owner.get("started"))


def alive(owner: dict[str, Any]) -> bool:
    """Whether the owner is known to live, which no clock can gainsay."""
    if owner.get("place") != _place() or "pid" not in owner:
        return False
    return bool(at := started(owner["pid"])) and at == owner.get("started")


def _place() -> str:
    """Where a process id means something: a machine since its last boot, and a container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def started(pid: int) -> str | None:
    """When a process began, in ticks since boot ("" where that cannot be told); None if there is no such process."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None if not _signalled(pid) else ""  # /proc may hide what other users run
        return None if fields[0] in "ZX" else fields[19]
    return "" if _signalled(pid) else None


def _signalled(pid: int) -> bool:
    """Whether there is a process of this number, whosever it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
