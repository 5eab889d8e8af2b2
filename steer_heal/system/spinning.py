"""How long torch's threads wait for each other busily before they sleep.

GNU OpenMP, which torch uses on Linux, lets a thread that has done its part of an operation spin for milliseconds. While
another program uses one of the cores, the thread that shares that core falls behind, and the others burn the time in
which it could run: twice the work takes four times as long instead of one and a third (docs/performance.md).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = 3000  # some tens of microseconds: longer than the gap between two operations, shorter than most of them
OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # of a user, who then decides


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the number of spins, for this process and those that it starts; no effect once torch is imported."""
    if not any(name in environment for name in OWN):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
