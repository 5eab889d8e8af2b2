"""The cores that this process may use: by its affinity and by the CPU quotas of its control group and its parents."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
CONTROLLERS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")  # names under which version 1 mounts the controller


def cores() -> int:
    """The number of cores that this process may keep busy, at least 1; a part of a core counts as one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, quotas())]))


def quotas() -> Iterator[float]:
    """Yield each CPU limit on this process's control group and its parents, in cores."""
    if sys.platform != "linux":
        return
    places = dict[str, str]()
    with suppress(OSError):
        for line in (PROC / "self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, place = line.split(":", 2)
            places |= dict.fromkeys([controllers, *controllers.split(",")], place.lstrip("/"))
    for folder in _upwards(CGROUPS, places.get("", "")):
        limit = _words(folder / "cpu.max")  # version 2: quota or max, then the period
        if len(limit) == 2 and limit[0] != "max":
            yield int(limit[0]) / int(limit[1])
    for name in CONTROLLERS:
        for folder in _upwards(CGROUPS / name, places.get("cpu", "")):
            quota, period = (_words(folder / f"cpu.cfs_{field}_us") for field in ("quota", "period"))
            if quota and period and int(quota[0]) > 0:  # -1: unlimited
                yield int(quota[0]) / int(period[0])


def _upwards(root: Path, place: str) -> list[Path]:
    """The folder of a control group and those of its parents, up to `root`.

    A container may see its own group as the root, so that the name given by the kernel leads nowhere.
    """
    here = root / place
    return [folder for folder in (here, *here.parents) if folder.is_relative_to(root)]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []
