"""`result.json` of a finished run, which comparisons read."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from steer_heal.config import ConfigError
from steer_heal.experiment import Experiment
from steer_heal.result import MODELS, Result
from steer_heal.store import Store

SWEEP = "sweep.json"  # in a sweep's folder: its cells, in order


@dataclass(frozen=True)
class Run:
    """A finished run, read back."""

    folder: Path
    overrides: tuple[str, ...]
    cell: str  # equal for equivalent cells
    regulariser: str
    note: str
    tau: float | None  # of the barrier, if there is one
    seconds: float  # of the cell; results that it found in the store took none
    rounds: list[dict[str, float]]
    best: int
    stopped: str
    answers: dict[str, list[dict[str, Any]]]  # of the best round, by model
    heal: list[dict[str, float]]  # the curves of all rounds, with `step` counted on

    @property
    def headline(self) -> dict[str, float]:
        """Figures of the best round."""
        return self.rounds[self.best]


def write(
    folder: Path, exp: Experiment, store: Store, result: Result, *, overrides: list[str], seconds: float
) -> dict[str, float]:
    """Write `result.json` and the adapters into the run's folder; return the figures of the last and the best round."""
    for stale in folder.glob("adapter-round-*"):  # of an earlier run in the same folder; the store still has them
        shutil.rmtree(stale)
    for k, adapter in enumerate(done.adapter for done in result.rounds):
        place, there = folder / f"adapter-round-{k}", store.where(adapter)
        if there is not None:
            shutil.copytree(there, place, copy_function=_link)
        else:
            place.mkdir()
            adapter.save(place)
    shown, cell = result.rounds[result.best].models, json.dumps(exp.fingerprint, sort_keys=True)
    answers = {who: shown[who].answers.rows for who in MODELS}
    record = {
        "overrides": overrides, "regulariser": exp.reg.name, "note": exp.model.note, "seconds": seconds,
        "store_seconds": round(store.seconds, 3),
        "tau": result.rows[0].get("tau"),
        "rounds": result.rows, "best": result.best, "stopped": result.stopped,
        "answers": {who: [{"prompt": r.prompt, "text": r.text} for r in rows] for who, rows in answers.items()},
        "worst": [[asdict(place) for place in done.drift.worst] for done in result.rounds],
        "adapters": [done.adapter.key for done in result.rounds],
        "computed": store.computed, "used": store.used, "cell": hashlib.sha256(cell.encode()).hexdigest()[:24],
        "runtime": exp.runtime.model_dump(mode="json") | {
            "torch": torch.__version__, "python": platform.python_version(), "n_threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    scratch = folder / f".result-{time.time_ns()}"
    scratch.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    scratch.rename(folder / "result.json")
    headline = {"round": result.rows[-1], "best": result.rows[result.best]}
    return {f"{when}/{name}": value for when, row in headline.items() for name, value in row.items()}


def rotate(folder: Path) -> None:
    """Keep an earlier attempt's result in this folder as result.1.json and so on, so that it cannot pass for new."""
    if (folder / "result.json").exists():
        free = next(n for n in count(1) if not (folder / f"result.{n}.json").exists())
        (folder / "result.json").rename(folder / f"result.{free}.json")


def _link(source: str, target: str) -> None:
    """Hard-link the store's file, which is never written again; copy it if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read(folder: Path) -> list[Run]:
    """Finished runs in a folder: the run itself, or those of a sweep in the order of their numbers."""
    if (folder / "result.json").is_file():
        return [_read_one(folder)]
    if (folder / SWEEP).is_file():
        try:
            names = [cell["folder"] for cell in json.loads((folder / SWEEP).read_text(encoding="utf-8"))["cells"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder / SWEEP} cannot be read: {error}") from None
        places = [folder / name for name in names if (folder / name / "result.json").is_file()]
    else:
        places = sorted((path.parent for path in folder.glob("*/result.json")), key=_number)
    return [_read_one(place) for place in places]


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
    names = ("cell", "regulariser", "note", "tau", "seconds", "rounds", "best", "stopped", "answers")
    return Run(
        folder=folder, overrides=tuple(record["overrides"]), heal=curve, **{name: record[name] for name in names}
    )
