"""Options from outside the package: a folder with the same layout, `reg/huber.py` with `reg/huber.yaml` beside it.

Hydra finds the YAML on its search path (`hydra.searchpath=[...]`, `--config-dir`, or the entry point below); this
module adds the code beside it to our packages, so that its `_target_` is `steer_heal.reg.huber.Huber` like any other.
An installed package announces such a folder as an entry point of the group `steer_heal.options`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

from steer_heal.config import CONF, HERE, ConfigError

GROUPS = ("model", "steer", "dose", "filter", "reg", "eval", "match", "tracker")  # groups whose options are classes


def adopt(sources: Iterable[Mapping[str, str]]) -> None:
    """Add the code beside Hydra's config sources (`hydra.runtime.config_sources`) to our packages.

    Raises ConfigError for a missing folder and for a name that is taken: Hydra would silently choose the first of two
    YAML files, and the command line would not show which of two modules runs.
    """
    folders = [folder for source in sources if (folder := _folder(source["path"], source["schema"]))]
    taken = dict[str, Path]()  # option -> the first folder that contains it
    for folder in folders:
        for group in sorted(path.name for path in CONF.iterdir() if path.is_dir()):
            for path in sorted((folder / group).glob("*.yaml")):
                if (first := taken.setdefault(f"{group}={path.stem}", folder)) != folder:
                    raise _taken(path, first)
    for folder in folders:
        for group in GROUPS:
            if any((folder / group).glob("*.py")):
                _join(group, folder / group)


def _folder(path: str, schema: str) -> Path | None:
    if schema == "file":
        if not Path(path).is_dir():
            raise ConfigError(f"hydra.searchpath={path!r}: there is no such folder")
        return Path(path).resolve()
    if schema == "pkg":
        try:
            found = importlib.util.find_spec(path.replace("/", "."))
        except ModuleNotFoundError as error:
            raise ConfigError(f"hydra.searchpath='pkg://{path}': {error}") from error
        if found is not None and found.submodule_search_locations:
            return Path(found.submodule_search_locations[0]).resolve()
    return None


def _join(group: str, folder: Path) -> None:
    package = importlib.import_module(f"steer_heal.{group}")
    if str(folder) in package.__path__:
        return
    for path in sorted(folder.glob("*.py")):
        taken = [Path(place) for place in package.__path__ if (Path(place) / path.name).is_file()]
        if taken and path.stem != "__init__":
            raise _taken(path, taken[0])
    package.__path__.append(str(folder))


def _taken(path: Path, first: Path) -> ConfigError:
    whose = "steer_heal" if first == CONF or first.is_relative_to(HERE) else first
    return ConfigError(f"{path}: {whose} has an option {path.parent.name}={path.stem} already; give it another name")
