"""The examples of options of one's own in docs/extending.md: put into a folder, edited, and run."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from helpers.command import rows

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/extending.md"


def page() -> dict[str, str]:
    """The page's fenced blocks, by the file that their first line names, else by their language."""
    fenced = re.findall(r"^```(\w+)\n(?:# (\S+\.\w+)\n)?(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return {path or language: body for language, path, body in fenced}


def put(folder: Path, files: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write the page's huber, and other files, into a folder laid out like conf/."""
    huber = {f"reg/{name}": page()[f"mine/reg/{name}"] for name in ("huber.py", "huber.yaml")}
    for name, text in (huber | dict(files)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))


@dataclass(frozen=True)
class Ran:
    """A finished sweep of nll and huber, or a run."""

    folder: Path
    out: str

    def cell(self, name: str) -> Path:
        """The folder of a sweep's cell; that of the run itself for no name."""
        (folder,) = self.folder.glob(f"*-{name}") if name else (self.folder,)
        return folder

    def heal(self, name: str) -> list[dict[str, Any]]:
        return [row for row in rows(self.cell(name)) if "heal/step" in row]


def finished(root: Path, said: subprocess.CompletedProcess[str], kind: str) -> Ran:
    """The sweep or the run that ended in `root`."""
    assert said.returncode == 0, said.stderr
    (folder,) = root.glob(f"outputs/*/*-{kind}")
    return Ran(folder, said.stdout)
