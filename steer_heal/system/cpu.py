"""The cores that this process may use: by its affinity and by the CPU quotas of its control group and its parents."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from steer_heal.system import control_groups

MOUNTS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")  # names under which version 1 mounts the controller


def cores() -> int:
    """The number of cores that this process may keep busy, at least 1; a part of a core counts as one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, quotas())]))


def quotas() -> Iterator[float]:
    """Yield each CPU limit on this process's control group and its parents, in cores."""
    if sys.platform != "linux":
        return
    for folder in control_groups.folders("", ""):
        limit = _words(folder / "cpu.max")  # version 2: quota or max, then the period
        if len(limit) == 2 and limit[0] != "max":
            yield int(limit[0]) / int(limit[1])
    for name in MOUNTS:
        for folder in control_groups.folders(name, "cpu"):
            quota, period = (_words(folder / f"cpu.cfs_{field}_us") for field in ("quota", "period"))
            if quota and period and int(quota[0]) > 0:  # -1: unlimited
                yield int(quota[0]) / int(period[0])


def _words(path: Path) -> list[str]:
    return " ".join(control_groups.lines(path)).split()
