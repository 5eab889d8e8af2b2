"""Options from elsewhere: a folder laid out like ours, `reg/huber.py` with `reg/huber.yaml` beside it.

Hydra finds the YAML on its search path (`hydra.searchpath=[...]`, `--config-dir`, or the entry point below); here the
code next to it joins our packages, so that its `_target_` is `steer_heal.reg.huber.Huber` like any other. A package
that is installed announces such a folder of its own as an entry point of the group `steer_heal.options`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

from steer_heal.config import HERE, ConfigError

GROUPS = ("model", "steer", "dose", "filter", "reg", "eval")  # those whose options are code


def adopt(sources: Iterable[Mapping[str, str]]) -> None:
    """Take in the code beside Hydra's config sources (`hydra.runtime.config_sources`).

    Raises ConfigError for a name that is taken: which of the two would run could not be told from the command line.
    """
    for source in sources:
        if source["provider"] in ("main", "hydra", "schema"):
            continue
        folder = _folder(source["path"], source["schema"])
        for group in GROUPS if folder else ():
            assert folder is not None
            if any((folder / group).glob("*.py")):
                _join(group, folder / group)


def _folder(path: str, schema: str) -> Path | None:
    if schema == "file":
        return Path(path).resolve()
    if schema == "pkg":
        found = importlib.util.find_spec(path.replace("/", "."))
        if found is not None and found.submodule_search_locations:
            return Path(found.submodule_search_locations[0])
    return None


def _join(group: str, folder: Path) -> None:
    package = importlib.import_module(f"steer_heal.{group}")
    if str(folder) in package.__path__:
        return
    for path in sorted(folder.glob("*.py")):
        taken = [place for place in package.__path__ if (Path(place) / path.name).is_file()]
        if taken and path.stem != "__init__":
            whose = "steer_heal" if Path(taken[0]).is_relative_to(HERE) else taken[0]
            raise ConfigError(f"{path}: {whose} has an option {group}={path.stem} already; give it another name")
    package.__path__.append(str(folder))
