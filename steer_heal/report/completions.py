"""The completions of every round in a run's folder: `completions/round-<k>.jsonl`, one completion a line.

They are written as soon as they are filtered, so that a run that is still going or has failed has them too, and they
do not depend on the store.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer_heal.artifacts import Completions, read_jsonl
from steer_heal.config import ConfigError
from steer_heal.filter import Filter

FOLDER = "completions"  # in a run's
FIELDS = {"round", "number", "prompt", "dose", "passed", "kept", "failed", "scores", "tokens", "ended", "text"}
Record = dict[str, Any]


def records(k: int, completions: Completions, filters: Mapping[str, Filter]) -> list[Record]:
    """The completions of round `k` in their order, with scores, and for each filter failed its limit.

    `passed`: no filter failed; `kept`: trained on. `tokens` counts the end-of-turn token of one that `ended` by itself.
    """
    return [
        {
            "round": k, "number": i, "prompt": row.prompt, "dose": row.dose,
            "passed": not row.reasons, "kept": row.kept,
            "failed": [
                {"filter": name, "score": row.scores[name], **filters[name].compared_with()} for name in row.reasons
            ],
            "scores": row.scores, "tokens": len(row.ids), "ended": row.ended, "text": row.text,
        }
        for i, row in enumerate(completions.rows)
    ]  # fmt: skip


def counts(rows: Sequence[Record]) -> str:
    """The outcome in words, such as `86 of 96 pass (perplexity 7, repetition 3), 24 kept`.

    In brackets the completions that failed each filter; one may have failed several.
    """
    failed = Counter(failure["filter"] for row in rows for failure in row["failed"])
    causes = ", ".join(f"{name} {n}" for name, n in failed.most_common())
    passed, kept = (sum(row[name] for row in rows) for name in ("passed", "kept"))
    return f"{passed} of {len(rows)} pass{f' ({causes})' if causes else ''}, {kept} kept"


def read(folder: Path) -> dict[int, list[Record]]:
    """The records of all rounds in a run's folder, by round; empty if there are none. Raises ConfigError."""
    found = {}
    for path in (folder / FOLDER).glob("round-*.jsonl"):
        if number := re.fullmatch(r"round-(\d+)", path.stem):
            found[int(number[1])] = _read_one(path)
    return dict(sorted(found.items()))


def _read_one(path: Path) -> list[Record]:
    try:
        rows = read_jsonl(path)
        if lacking := [i for i, row in enumerate(rows, 1) if not row.keys() >= FIELDS]:
            raise ValueError(f"line {lacking[0]} lacks {', '.join(sorted(FIELDS - rows[lacking[0] - 1].keys()))}")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return rows


def rotate(folder: Path, number: int | None) -> None:
    """Clear away the completions of an earlier attempt: kept as `completions.<number>`, removed if that is None."""
    if (folder / FOLDER).is_dir():
        if number is None:
            shutil.rmtree(folder / FOLDER)
        else:
            (folder / FOLDER).rename(folder / f"{FOLDER}.{number}")
