"""The environment in which torch's threads wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from steer_heal.system.spinning import OWN, SPINS, limit_spinning


def test_it_is_set_unless_the_user_has_set_it() -> None:
    for given in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        environment = dict(given)
        limit_spinning(environment)
        assert environment == given
    limit_spinning(empty := {"PATH": "x"})
    assert empty == {"PATH": "x", "GOMP_SPINCOUNT": str(SPINS)}


@pytest.mark.skipif(sys.platform != "linux", reason="torch uses GNU OpenMP on Linux")
def test_openmp_reads_it() -> None:
    """Reference: the list of its settings that OpenMP prints when torch loads it."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    command = "import steer_heal.main, torch; torch.ones(2, 2) @ torch.ones(2, 2)"
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment | {"OMP_DISPLAY_ENV": "verbose"}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr, done.stderr
