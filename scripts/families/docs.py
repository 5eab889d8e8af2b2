"""The summary of a walk, in docs/models.md between two markers."""

from __future__ import annotations

import datetime
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- written by scripts/try_families.py -->", "<!-- end -->"
WORDS = {"agrees": "agree", "refused": "refused", "not tried": "not tried", "wrong": "wrong"}


def write_docs(rows: Sequence[dict[str, Any]]) -> None:
    """Replace what stands between the markers by the summary of these records."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{summary(rows)}\n{END}{after}", "utf-8")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return the counts, the families that agree, and the others by reason, as Markdown."""
    counts = Counter(row["outcome"] for row in rows)
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "peft"))
    parts = [
        f"On {datetime.date.today()}, with {versions}, of {len(rows)} families "
        + ", ".join(f"{counts[outcome]} {word}" for outcome, word in WORDS.items())
        + ".",
        "### Agree",
        _list(row["family"] for row in rows if row["outcome"] == "agrees" and "options" not in row),
    ]
    chosen = [row for row in rows if row["outcome"] == "agrees" and "options" in row]
    if chosen:
        parts += ["With the layers named that are adapted, since PEFT refuses some of the others:"]
        parts += ["\n".join(f"- `{row['family']}`: `'{row['options']}'`" for row in chosen)]
    for outcome, title in (("refused", "Refused"), ("not tried", "Not tried"), ("wrong", "Wrong")):
        if groups := _by_reason(row for row in rows if row["outcome"] == outcome):
            table = [f"| {reason} | {_list(families)} |" for reason, families in groups.items()]
            parts += [f"### {title}", "\n".join(["| why | families |", "| --- | --- |", *table])]
    return "\n\n".join(parts) + "\n"


def _list(families: Iterable[str]) -> str:
    return ", ".join(f"`{family}`" for family in families)


def _by_reason(rows: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Group families by what was said, without names of classes, shapes and places in it; the largest group first."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        reason = re.sub(r"^model(\.id=\.\.\.)?:? ", "", row["said"]).replace("|", "\\|")
        reason = re.sub(r"\b(is an? )[\w.-]+, ", r"\1..., ", reason)
        reason = re.sub(
            r"(?<=[ (])\[[\d, ]+\]", "[...]", re.sub(r"\b[A-Za-z0-9_]+For[A-Z]\w+|\b\w+LMHead\w*", "...", reason)
        )
        reason = textwrap.shorten(re.sub(r"(?<=target_modules=)\[[^\]]*\]", "...", reason), 200)
        groups.setdefault(re.sub(r" in \w+\.py:\d+", "", reason), []).append(row["family"])
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))
