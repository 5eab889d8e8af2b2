"""Recording of a run's measurements: always to `metrics.jsonl` in its folder, and to the mirror that an option adds.

The file is authoritative: it is written first and flushed line by line, and an error in writing it ends the run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol, Self

from steer_heal.artifacts import write_jsonl
from steer_heal.config import Config
from steer_heal.system.files import replacing


class Mirror(Protocol):
    """A second destination for measurements. Neither method raises or blocks for long."""

    def send(self, what: str, call: Callable[[Any, Any], object]) -> None:
        """Queue `call(wandb, run)`; `what` is "rows" or "media"."""

    def finish(self, exit_code: int) -> None:
        """End the mirrored run with this exit code."""


class TrackerConfig(Config):
    """Destinations of a run's measurements: metrics.jsonl, and the mirror that an option adds."""

    def open(self, run_dir: Path, *, config: dict[str, Any], group: str | None, run_name: str) -> Tracker:
        return Tracker(run_dir)


class Tracker:
    """One run's measurements. As a context manager it records exit code 1 when an exception passes through.

    metrics.jsonl is strict JSON, one row a line: NaN and the infinities, which JSON lacks, are the strings "nan",
    "inf" and "-inf", which `float()` reads back. Each row also holds `time`, in seconds since the run began.
    A run that restarts in the same folder replays its rows, so it starts a new file; earlier files are kept as
    metrics.1.jsonl, metrics.2.jsonl and so on, in the order in which they were written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.resolve()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        free = next(n for n in count(1) if not (self.run_dir / f"metrics.{n}.jsonl").exists())
        self.attempt = free if path.exists() else free - 1  # 0 unless a run has started in this folder before
        if path.exists():
            path.rename(self.run_dir / f"metrics.{free}.jsonl")
        self._file = path.open("x", encoding="utf-8")
        self._began = time.monotonic()
        self.mirror: Mirror | None = None

    def log(self, row: Mapping[str, float | str]) -> None:
        """Record one row. Raises OSError if metrics.jsonl cannot be written; failures of W&B raise nothing."""
        line = {k: str(float(v)) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line["time"] = round(time.monotonic() - self._began, 3)
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        kept = dict(row)
        self._send("rows", lambda wandb, run: run.log(kept))

    def records(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows as JSONL to a file of the run's folder, whole or not at all. Raises OSError, which names the file.

        They are not sent anywhere.
        """
        path = self.run_dir / name
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as fresh:
            write_jsonl(fresh, rows)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Show a run's final values in W&B. They are not written to metrics.jsonl: rows and results have them."""
        kept = dict(values)
        self._send("rows", lambda wandb, run: run.summary.update(kept))

    def image(self, key: str, path: Path) -> None:
        """Show an image in W&B. The file is read later by another thread, so it must not be overwritten."""
        where = str(path.resolve())
        self._send("media", lambda wandb, run: run.log({key: wandb.Image(where)}))

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in W&B."""
        data = [list(row) for row in rows]
        self._send("media", lambda wandb, run: run.log({key: wandb.Table(columns=list(columns), data=data)}))

    def histogram(self, key: str, values: Sequence[float]) -> None:
        """Show a histogram of values in W&B."""
        kept = list(values)
        self._send("media", lambda wandb, run: run.log({key: wandb.Histogram(kept, num_bins=64)}))

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run, within FINISH_S and twice GRACE_S, and close the file. A repeated call has no effect."""
        mirror, self.mirror = self.mirror, None
        try:
            if mirror:
                mirror.finish(exit_code)
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def _send(self, what: str, call: Callable[[Any, Any], object]) -> None:
        if self.mirror:
            self.mirror.send(what, call)
