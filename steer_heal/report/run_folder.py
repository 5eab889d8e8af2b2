"""`result.json` of a finished run, which comparisons read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from steer_heal.artifacts import Adapter, Metrics, Row, read_jsonl, write_jsonl
from steer_heal.config import ConfigError
from steer_heal.eval import MODELS, Column
from steer_heal.eval.damage import Damage
from steer_heal.eval.text import Text
from steer_heal.eval.trait import TraitLogOdds
from steer_heal.experiment import Experiment
from steer_heal.reg.nll import Nll
from steer_heal.report import completions
from steer_heal.result import Result
from steer_heal.store import Store
from steer_heal.system.files import replacing
from steer_heal.system.version import code_version, told

ITEMS = "items"  # folder of a run with the evaluations' items
FICLONE = 0x40049409  # Linux: let a file share another's blocks until one of them is written (btrfs, XFS)
SWEEP = "sweep.json"  # in a sweep's folder: its cells, in order
KNOWN: tuple[Column, ...] = (*TraitLogOdds.columns, *Damage.columns, *Text.columns)


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
    rounds: list[Row]
    best: int  # index of the round with the highest trait gain minus damage
    stopped: str
    answers: dict[str, list[dict[str, Any]]]  # of the last round, by model
    heal: list[Row]  # the curves of all rounds, with `step` counted on
    columns: tuple[Column, ...]  # what the evaluations' figures are
    code: str  # the version that made it; empty for one that did not write it
    group: str = ""  # equal for cells that differ in their seed alone
    rest: str = ""  # equal for cells that differ in seed and regulariser alone
    teacher: str = ""  # the option that steered; empty if it was not written
    basis: dict[str, str] = field(default_factory=dict)  # equal for runs whose figures have one zero
    frontier: list[Row] = field(default_factory=list)  # of the last round, by rising gate

    @property
    def headline(self) -> Row:
        """Figures of the last round."""
        return self.rounds[-1]


def figure(row: Row, who: str, column: Column) -> float | None:
    """A round's figure as it is shown: over base's if the column says so. None if the run does not have it."""
    value, zero = row.get(f"{who}/{column.name}"), row.get(f"base/{column.name}")
    if not column.over_base:
        return value
    return row.get(f"{who}/{column.over_base}") if value is None or zero is None else value - zero


def columns(runs: list[Run]) -> list[Column]:
    """The columns of all runs, each once."""
    return list({column.name: column for run in runs for column in run.columns}.values())


def write(folder: Path, exp: Experiment, store: Store, result: Result, *, overrides: list[str], seconds: float) -> Row:
    """Write `result.json`, the adapters and the evaluations' items into the run's folder; return the summary figures:
    the last round's as `round/<name>`, the best one's as `best/<name>`.
    """
    for k, adapter in enumerate(done.adapter for done in result.rounds):
        _write_adapter(folder / f"adapter-round-{k}", adapter, store.where(adapter), exp.model.source())
    _write_items(folder, result)
    shown = result.rounds[-1].models
    answers = {who: shown[who].answers.rows for who in MODELS}
    record = {
        "code": code_version(),
        "overrides": overrides, "regulariser": exp.reg.name, "note": exp.model.about(), "seconds": seconds,
        "store_seconds": round(store.seconds, 3),
        "tau": result.rows[0].get("tau"),
        "columns": [asdict(column) for column in exp.columns],
        "rounds": result.rows, "best": result.best, "stopped": result.stopped,
        "answers": {who: [{"prompt": r.prompt, "text": r.text} for r in rows] for who, rows in answers.items()},
        "frontier": [done.frontier_rows() for done in result.rounds],
        "group": _hashed(exp.model_copy(update={"seed": 0}).fingerprint),
        "rest": _hashed(exp.model_copy(update={"seed": 0, "reg": Nll(name="nll")}).fingerprint),
        "teacher": exp.steer.name, "basis": _basis(exp, result),
        "worst": [[asdict(place) for place in done.drift.worst] for done in result.rounds],
        "adapters": [done.adapter.key for done in result.rounds],
        "computed": store.computed, "used": store.purposes,
        "cell": _hashed(exp.fingerprint),
        "runtime": exp.runtime.model_dump(mode="json") | {
            "torch": torch.__version__, "python": platform.python_version(), "n_threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    with replacing(folder / "result.json") as fresh:
        fresh.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    headline = {"round": result.rows[-1], "best": result.rows[result.best]}
    return {f"{when}/{name}": value for when, row in headline.items() for name, value in row.items()}


def _hashed(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _basis(exp: Experiment, result: Result) -> dict[str, str]:
    """What runs must have in common for their figures to have one zero."""
    items = {name: sorted(result.rounds[0].models["base"].metrics[name].items) for name in ("trait", "damage")}
    return {
        "model": exp.model.about(), "weights": _hashed(exp.model.identity()), "dtype": str(exp.model.torch_dtype()),
        "trait": exp.trait.name, "probes": _hashed(items["trait"]), "texts": _hashed(items["damage"]),
        "neutral": _hashed(exp.trait.neutral),
    }  # fmt: skip


def _write_adapter(place: Path, adapter: Adapter, there: Path | None, source: tuple[str, str | None] | None) -> None:
    """Write an adapter, copied from its folder in the store if it is there, and name the base as PEFT does.

    It is a copy, so that whoever edits it does not change the store's; the store's manifest does not describe it.
    """
    place.mkdir()
    if there is None:
        adapter.save(place)
    for path in () if there is None else there.iterdir():
        if path.name != "manifest.json":
            _copy(path, place / path.name)
    if source is not None:
        config = adapter.config | dict(zip(("base_model_name_or_path", "revision"), source, strict=True))
        (place / "adapter_config.json").write_text(
            json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )


def _write_items(folder: Path, result: Result) -> None:
    """Write every evaluation's items to `items/<model or round>/<evaluation>.jsonl`; base's are those of any round."""
    for done in result.rounds:
        for who, model in done.models.items():
            place = folder / ITEMS / (who if who == "base" else f"round-{done.index}-{who}")
            place.mkdir(parents=True, exist_ok=True)
            for name, found in model.metrics.items():
                _write_metrics(place / f"{name}.jsonl", found)
        at = done.frontier.matched if done.frontier is not None else None
        for name, found in at.metrics.items() if at is not None else ():
            place = folder / ITEMS / f"round-{done.index}-matched"
            place.mkdir(parents=True, exist_ok=True)
            _write_metrics(place / f"{name}.jsonl", found)


def _write_metrics(path: Path, found: Metrics) -> None:
    if found.items:
        write_jsonl(path, ({"id": i} | row for i, row in found.items.items()))


def read_items(folder: Path, who: str, evaluation: str, index: int = 0) -> dict[str, Row]:
    """The figures of an evaluation's items by item id, of a model of a round; empty if the run has none."""
    path = folder / ITEMS / (who if who == "base" else f"round-{index}-{who}") / f"{evaluation}.jsonl"
    return {row.pop("id"): row for row in read_jsonl(path)} if path.is_file() else {}


def rotate(folder: Path) -> None:
    """Keep an earlier result in this folder as result.1.json and so on, so that it cannot pass for new.

    So are its adapters, which somebody may have edited, its items and its completions; completions of an attempt
    without a result are removed.
    """
    kept = ("result.{}.json", *(name + ".{}" for name in (completions.FOLDER, ITEMS, "adapter-round-0")))
    free = next(n for n in count(1) if not any((folder / name.format(n)).exists() for name in kept))
    there = (folder / "result.json").exists()
    completions.rotate(folder, free if there else None)
    for place in (folder / ITEMS, *folder.glob("adapter-round-*")):
        if place.is_dir() and re.fullmatch(rf"{ITEMS}|adapter-round-\d+", place.name):
            place.rename(folder / f"{place.name}.{free}")
    if there:
        (folder / "result.json").rename(folder / f"result.{free}.json")


def _copy(source: Path, target: Path) -> None:
    """Copy a file's content with this user's own permissions; where the file system can, the copy shares its blocks."""
    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new, FICLONE, old.fileno())
        except OSError:
            shutil.copyfileobj(old, new)


def read(folder: Path) -> list[Run]:
    """Finished runs in a folder: the run itself, or those of a sweep in the order of their numbers.

    A run of a sweep whose files cannot be read is left out with a warning. Raises ConfigError for a single run.
    """
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
    runs = list[Run]()
    for place in places:
        try:
            runs.append(_read_one(place))
        except ConfigError as error:
            logger.warning("{}; it is left out", error)
    return runs


def _number(folder: Path) -> tuple[int, str]:
    head = folder.name.split("-")[0]
    return (int(head) if head.isdigit() else -1, folder.name)


def _read_one(folder: Path) -> Run:
    """Read a finished run; one whose metrics.jsonl is gone has no curve. Raises ConfigError if it cannot be read."""
    try:
        return _parsed(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{folder}: its result cannot be read: {type(error).__name__}: {error}") from None


def _parsed(folder: Path) -> Run:
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    path = folder / "metrics.jsonl"
    rows = read_jsonl(path) if path.is_file() else []
    curve = [
        {key.removeprefix("heal/"): value for key, value in row.items() if key.startswith("heal/")}
        for row in rows
        if "heal/step" in row
    ]
    names = ("cell", "regulariser", "note", "tau", "seconds", "rounds", "best", "stopped", "answers")
    if "columns" in record:
        columns = tuple(_column(given) for given in record["columns"])
    else:  # of a version that did not write them
        columns = tuple(c for c in KNOWN if _same_figure(c, record["rounds"][-1]))
    return Run(
        folder=folder, overrides=tuple(record["overrides"]), heal=curve, columns=columns,
        code=told(record["code"]) if "code" in record else "", frontier=(record.get("frontier") or [[]])[-1],
        group=record.get("group") or _hashed([o for o in record["overrides"] if not o.startswith("seed=")]),
        rest=record.get("rest") or _hashed([o for o in record["overrides"] if not o.startswith(("seed=", "reg="))]),
        teacher=record.get("teacher", ""), basis=record.get("basis") or {"model": record["note"]},
        **{name: record[name] for name in names},
    )  # fmt: skip


def _same_figure(column: Column, row: Row) -> bool:
    """True if a round of an older version has a figure; its `coherence` was another one, by perplexity under base."""
    return f"healed/{column.name}" in row and (column.name != "coherence" or "healed/distinct" in row)


def _column(given: dict[str, Any]) -> Column:
    """A column as it was written; fields that this version does not have are left out."""
    known = {field.name for field in fields(Column)}
    shown = given.get("shown")
    return Column(**{n: v for n, v in given.items() if n in known} | {"shown": None if shown is None else tuple(shown)})
