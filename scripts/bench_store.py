"""Benchmark of the commands that list a store of many results: python scripts/bench_store.py [RESULTS]

Creates RESULTS small results (default: 10,000) in a temporary folder and times the commands as a user would type them,
start-up included, median of five. The store's cost to a run is in the run's result.json: store_seconds of seconds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from steer_heal.artifacts import Metrics
from steer_heal.store import publish

STAGES = ("steer.extract", "generate.generate", "filter.sift", "heal.heal", "eval.evaluate")


def main(results: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs = {"config": ["steer_heal.heal.Heal", {f"field_{i}": i for i in range(40)}]}
        about = {"version": 1, "inputs": inputs, "seconds": 1.0, "host": "here", "made": "2026-01-01T00:00:00Z"}
        for i in range(results):
            publish(Metrics(values={"x": float(i)}), root / STAGES[i % len(STAGES)] / f"{i:024x}", about)
        for command in (["ls"], ["ls", "heal.heal"], ["verify"], ["gc"]):
            times = []
            for _ in range(5):
                begun = time.monotonic()
                said = subprocess.run(
                    [sys.executable, "-m", "steer_heal.store", "--store", folder, *command],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                times.append(time.monotonic() - begun)
            lines = len(said.stdout.splitlines())
            print(f"{' '.join(command):14} {statistics.median(times):6.2f} s   {lines} lines, of {results} results")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
