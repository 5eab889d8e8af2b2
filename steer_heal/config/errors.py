"""Errors of Hydra and OmegaConf as one line that names the field, the value and the allowed values."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from steer_heal.config import CONF, ConfigError

REFUSED = (ConfigError, HydraException, OmegaConfBaseException, YAMLError)  # the errors that `one_line` describes
EXIT = 2  # exit code of a command given invalid values, the same as of argparse


def refuse(line: str) -> NoReturn:
    """Print the line to standard error and exit with code EXIT."""
    print(f"steer_heal: {plain(line)}", file=sys.stderr)
    sys.exit(EXIT)


def plain(line: str) -> str:
    """Make a line safe to print: parts of it may come from an untrusted file, so control characters are replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def nearest(given: str, there: Iterable[str]) -> str:
    """A suggestion of the most similar name, or an empty string."""
    names = list(there)
    close = [name for name in names if name.rpartition(".")[2] == given] if given else []  # width for reg.width
    close = close or difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def one_line(error: Exception) -> str:
    """Describe what Hydra or OmegaConf rejected, and the alternatives."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _no_such_option(str(error.missing_cfg_file), error.options)
    if found := re.match(r"In '.*': Could not (?:load|find) '(.+/[^']+)'", text):
        return _no_such_option(found.group(1), None)
    if isinstance(error, OverrideParseException):
        reason = text.splitlines()[0].removeprefix("Error parsing override ").removeprefix(f"'{error.override}'")
        reason = "" if "Exception" in reason else reason.strip()  # the name of the parser's class explains nothing
        said = "; ".join(filter(None, [reason, "write path=value, a list as path=[a,b], special characters in quotes"]))
        return f"{error.override}: cannot be read: {said}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {text.splitlines()[0]}"
    if (found := re.match(r"Error merging override (.+)", text)) and error.__cause__ is not None:
        return f"{found.group(1)}: {str(error.__cause__).splitlines()[0]}"
    if found := re.match(r"Could not append to config. An item is already at '(.+)'", text):
        return f"+{found.group(1)}: it already exists; omit the + to set it"
    if found := re.match(r"Could not override '(.+)@(.+)'", text):
        return f"{found.group(1)}@{found.group(2)}: there is no such place; write {found.group(1)}=option"
    if found := re.match(r"Could not (?:override|delete.*) '([^'@]+)'", text):
        return _no_such_knob(found.group(1))
    if found := re.match(r"Ambiguous value for argument '([^=']+)=(.*)'", text):
        key, value = found.groups()
        return f"{key}={value}: several values are a sweep: add -m; or, for a list, write {key}=[{value}]"
    if found := re.match(r"Multiple values for ([^.\s]+)", text):
        return f"{found.group(1)}: given more than once"
    return " ".join((text or str(error.__cause__)).split())


def no_choice() -> str:
    """Describe the argument that does not select an option by name, such as `reg=null`, which Hydra does not report."""
    for argument in sys.argv[1:]:
        try:
            given = OverridesParser.create().parse_override(argument)
        except HydraException:
            continue
        value = given.value()
        there = sorted(path.stem for path in (CONF / given.key_or_group).glob("*.yaml"))
        several = value.list if isinstance(value, ChoiceSweep) else [value]
        if there and not all(isinstance(one, str | list | QuotedString) for one in several):
            names = ", ".join(there)
            return f"{argument}: not the name of an option; to set a field, write group.field=value. There are {names}"
    return "an option must be chosen by its name"


def _no_such_option(file: str, there: Sequence[str] | None) -> str:
    group, _, name = file.rpartition("/")
    options = sorted(path.stem for path in (CONF / group).glob("*.yaml")) if there is None else there
    return f"{group}={name}: there is no such option.{nearest(name, options)} There are {', '.join(options)}"


def _no_such_knob(key: str) -> str:
    group, _, name = key.partition(".")
    if launchers := key.startswith("hydra.launcher."):
        group, name = "hydra/launcher", key.removeprefix("hydra.launcher.")
    files = sorted((CONF / group).glob("*.yaml")) if name else []
    if owners := [path.stem for path in files if name in OmegaConf.load(path)]:
        return f"{key}: only some options of {group} have such a knob: {', '.join(owners)}; choose among them"
    if launchers:
        fields = sorted({field for path in files for field in _fields(path)})
        hint = nearest(name, fields) or f" There are {', '.join(fields)}"
        return f"{key}: there is no such knob.{hint}"
    knobs = _knobs()
    if hint := nearest(key, knobs):
        return f"{key}: there is no such knob.{hint}"
    parent = key.rpartition(".")[0]
    siblings = [knob for knob in knobs if knob.rpartition(".")[0] == parent] if parent else []
    short = siblings or [knob for knob in knobs if "." not in knob]
    return f"{key}: there is no such knob. There are {', '.join(short)}"


def _fields(path: Path) -> list[str]:
    """The fields that can be set for the option in a file."""
    return [str(field) for field in OmegaConf.load(path) if field not in ("_target_", "defaults", "name")]


def _knobs() -> list[str]:
    """The dotted paths of all settings, with the options chosen on the command line if they compose."""
    arguments = [argument for argument in sys.argv[1:] if _chooses(argument)]
    folders = [folder for flag, folder in pairwise(sys.argv) if flag in ("-cd", "--config-dir")]
    if folders and not any(argument.startswith("hydra.searchpath") for argument in arguments):
        arguments.append(f"hydra.searchpath=[{','.join(str(Path(folder).resolve()) for folder in folders)}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        try:
            config = compose("config", arguments)
        except HydraException:
            config = compose("config")
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return [path for path in _paths(cast(dict[str, Any], plain)) if not path.endswith("_target_")]


def _chooses(argument: str) -> bool:
    try:
        key = str(OverridesParser.create().parse_override(argument).key_or_group)
    except HydraException:
        return False
    return key.startswith("hydra.searchpath") or (CONF / key).is_dir()


def _paths(node: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, child in node.items():
        found.append(f"{prefix}{key}")
        if isinstance(child, dict):
            found += _paths(child, f"{prefix}{key}.")
    return found
