"""Peak memory of a call, for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


def risen(run: Callable[[], object]) -> float:
    """Peak GB of memory of a call above what the process held before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1e9


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
