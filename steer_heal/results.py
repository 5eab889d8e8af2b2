"""A finished run's `result.json`: what comparisons read."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steer_heal.experiment import Experiment
from steer_heal.loop import Result
from steer_heal.store import Store


@dataclass(frozen=True)
class Run:
    """A finished run, read back."""

    folder: Path
    overrides: tuple[str, ...]
    regulariser: str
    note: str
    tau: float | None  # of the barrier, if there is one
    seconds: float  # of the whole cell; what it found in the store cost it nothing
    rounds: list[dict[str, float]]
    best: int
    stopped: str
    answers: dict[str, list[dict[str, Any]]]
    heal: list[dict[str, float]]  # the curve of all rounds, `step` counted through

    @property
    def last(self) -> dict[str, float]:
        return self.rounds[-1]


def write(
    folder: Path, exp: Experiment, store: Store, result: Result, *, overrides: list[str], seconds: float
) -> dict[str, float]:  # fmt: skip
    """Write `result.json`, link the adapters into the run's folder, and return the figures of the last round."""
    for k, adapter in enumerate(result.adapters):
        link = folder / f"adapter-round-{k}"
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(store.where(adapter), folder), target_is_directory=True)
    record = {
        "overrides": overrides, "regulariser": exp.reg.name, "note": exp.model.note, "seconds": seconds,
        "tau": exp.tau if exp.reg.has_barrier else None,
        "rounds": result.rounds, "best": result.best, "stopped": result.stopped,
        "answers": {who: [{"prompt": r.prompt, "text": r.text} for r in rows] for who, rows in result.answers.items()},
        "adapters": [adapter.key for adapter in result.adapters],
        "computed": store.computed,
        "runtime": exp.runtime.model_dump(mode="json") | {
            "torch": torch.__version__, "python": platform.python_version(), "n_threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    whole = folder / f".result-{time.time_ns()}"
    whole.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    whole.rename(folder / "result.json")
    return {f"round/{name}": value for name, value in result.rounds[-1].items()}


def read(folder: Path) -> list[Run]:
    """The finished runs in a folder: itself, or those of a sweep in the order of their numbers."""
    places = [folder] if (folder / "result.json").is_file() else [path.parent for path in folder.glob("*/result.json")]
    return [_read_one(place) for place in sorted(places, key=_number)]


def _number(folder: Path) -> tuple[int, str]:
    head = folder.name.split("-")[0]
    return (int(head) if head.isdigit() else -1, folder.name)


def _read_one(folder: Path) -> Run:
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [
        {key.removeprefix("heal/"): value for key, value in row.items() if key.startswith("heal/")}
        for row in rows
        if "heal/step" in row
    ]
    names = ("regulariser", "note", "tau", "seconds", "rounds", "best", "stopped", "answers")
    return Run(
        folder=folder, overrides=tuple(record["overrides"]), heal=curve, **{name: record[name] for name in names}
    )
