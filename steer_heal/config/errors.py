"""Errors of Hydra and OmegaConf as one line that names the field, the value and the allowed values."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
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

from steer_heal.config import CONF, LISTS, ConfigError, interpolation
from steer_heal.config.typed import groups, quoted, why_unreadable
from steer_heal.config.words import nearest

REFUSED = (ConfigError, HydraException, OmegaConfBaseException, YAMLError)  # the errors that `one_line` describes
NUMBERS = {  # group -> how a number is given that has no file of its own, and what it is
    "lora": ("lora.r={}", "a rank that has no file"),
    "dose": ("'dose.alpha=[{}]'", "a dose"),
    "steer": ("'steer.layers=[{}]'", "a layer"),
    "reg": ("lam={}", "the strength of a regulariser"),
    "generate": ("generate.max_new_tokens={}", "the length of answers"),
    "heal": ("heal.epochs={}", "the number of epochs"),
}
EXIT = 2  # exit code of a command given invalid values, the same as of argparse


def refuse(line: str) -> NoReturn:
    """Print the line to standard error and exit with code EXIT."""
    print(f"steer_heal: {plain(line)}", file=sys.stderr)
    sys.exit(EXIT)


def plain(line: str) -> str:
    """Make a line safe to print: parts of it may come from an untrusted file, so control characters are replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def one_line(error: Exception) -> str:
    """Describe what Hydra or OmegaConf rejected, and the alternatives."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read: {why_unreadable(str(error.override), sys.argv[1:])}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return interpolation(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _no_such_option(str(error.missing_cfg_file))
    for pattern, describe in PATTERNS.items():
        if found := re.match(pattern, text):
            return describe(*found.groups())
    if (found := re.match(r"Error merging override (.+)", text)) and error.__cause__ is not None:
        return f"{found.group(1)}: {str(error.__cause__).splitlines()[0]}"
    if isinstance(error.__cause__, OmegaConfBaseException) and not text:
        return one_line(error.__cause__)
    return " ".join((text or str(error.__cause__)).split())


def _ambiguous(key: str, value: str) -> str:
    said = f"{key}={value}: several values are a sweep: add -m"
    if re.fullmatch(r"\d+,\d+", value):
        said += f"; a fraction is written {value.replace(',', '.')}"
    if key in LISTS or (key not in groups() and not isinstance(_value(key), int | float)):
        said += f"; or, for a list, write {quoted(f'{key}=[{value}]')}"
    return said


def _no_such_place(group: str, package: str) -> str:
    return f"{group}@{package}: there is no such place; write {group}=option"


def _removed(key: str) -> str:
    if key in LISTS:
        return f"~{key}: a list is made empty by {quoted(f'{key}=[]')}"
    return f"~{key}: {'a group needs an option' if key in groups() else 'there is no such knob'}"


def _no_primary(name: str) -> str:
    return f"{name}: there is no such configuration, only config; a preset is chosen as experiment={name}"


def no_choice() -> str:
    """Describe the argument that does not select an option by name, such as `reg=null`, which Hydra does not report."""
    for argument in sys.argv[1:]:
        try:
            given = OverridesParser.create().parse_override(argument)
        except HydraException:
            continue
        group, value = given.key_or_group, given.value()
        there = _options(group)
        several = value.list if isinstance(value, ChoiceSweep) else [value]
        if not there or all(_names_options(one) for one in several):
            continue
        advice = _meant(group, str(value)) or " To set a field, write group.field=value."
        none = f" To choose none, write {quoted(f'{group}=[]')}." if value is None and group in LISTS else ""
        return f"{argument}: not the name of an option.{none or advice} There are {', '.join(there)}"
    return "an option must be chosen by its name"


def _names_options(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, str | QuotedString) for one in value)
    return isinstance(value, str | QuotedString)


def _no_such_option(file: str) -> str:
    group, _, name = file.removesuffix(".yaml").rpartition("/")
    if "/" in group and not group.startswith("hydra/"):  # a path where a name is wanted, or a group inside a group
        outer, _, inner = group.partition("/")
        if outer == "experiment" and inner in groups():
            return f"{inner}={name} in the defaults of a preset: write - override /{inner}: {name}"
        group, name = outer, file.removeprefix(f"{outer}/")
    options = _options(group)
    said = f"{group}={name}: there is no such option.{_meant(group, name) or nearest(name.rpartition('/')[2], options)}"
    said = f"{said} There are {', '.join(options)}"
    if group in LISTS and name in ("none", "no", "off"):
        return f"{said}; to choose none, write {quoted(f'{group}=[]')}"
    if group == "eval" and name:
        return f"{said}; one of your own is found by -cd FOLDER, and chosen as 'eval=[trait,damage,text,{name}]'"
    return said


def _options(group: str) -> list[str]:
    """The names of a group's options, those in folders given on the command line included."""
    there = {path.stem for folder in (CONF, *_folders()) for path in (folder / group).glob("*.yaml")}
    return sorted(there, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _folders() -> list[Path]:
    """The folders of users' options that the command line names."""
    given = [folder for flag, folder in pairwise(sys.argv) if flag in ("-cd", "--config-dir")]
    given += [argument.partition("=")[2] for argument in sys.argv if re.match(r"(-cd|--config-dir)=", argument)]
    for argument in sys.argv:
        if argument.startswith("hydra.searchpath="):
            given += argument.partition("=")[2].strip("[]").split(",")
    return [Path(folder.strip("'\"").removeprefix("file://")).resolve() for folder in given if "pkg://" not in folder]


def _meant(group: str, name: str) -> str:
    """Advice for a number, or a model's name, in place of an option's."""
    if group == "model" and name:
        return f" A model of the Hub, or in a folder, is chosen as model=hub model.id={name.removeprefix('hub/')}."
    number = re.fullmatch(r"[a-z]{0,2}?_?(\d+(?:\.\d+)?(?:e-?\d+)?)", name.lower())
    if group in NUMBERS and number and float(number[1]) > 0:
        knob, what = NUMBERS[group]
        return f" Write {knob.format(number[1])} to set {what}."
    return ""


def _no_such_knob(key: str) -> str:
    group, _, name = key.partition(".")
    if launchers := key.startswith("hydra.launcher."):
        group, name = "hydra/launcher", key.removeprefix("hydra.launcher.")
    known = OmegaConf.load(CONF / "model/hub.yaml").template
    if key.startswith("model.template.") and key.removeprefix("model.template.") not in known:
        return f"{key}: conf/model/hub.yaml has no such variable; write +{key}=... for one of your chat template"
    files = sorted((CONF / group).glob("*.yaml")) if name else []
    owners = [path.stem for path in files if name.partition(".")[0] in map(str, OmegaConf.load(path))]
    if owners and (group in LISTS or len(owners) < len(files)):
        return f"{key}: only some options of {group} have such a knob: {', '.join(owners)}; choose among them"
    if key == "launcher":
        return f"{key}: there is no such knob. A launcher is chosen as hydra/launcher=parallel or hydra/launcher=slurm"
    if launchers:
        fields = sorted({field for path in files for field in _fields(path)})
        hint = nearest(name, fields) or f" There are {', '.join(fields)}"
        return f"{key}: there is no such knob.{hint}"
    knobs, parent = _knobs(), key.rpartition(".")[0]
    if inside := [knob for knob in knobs if knob.startswith(f"{key}.")]:
        return f"{key}: it has no such field; there are {', '.join(inside)}"
    siblings = [knob for knob in knobs if knob.rpartition(".")[0] == parent] if parent else []
    if hint := nearest(key, siblings or knobs):
        return f"{key}: there is no such knob.{hint}"
    short = siblings or [knob for knob in knobs if "." not in knob]
    return f"{key}: there is no such knob. There are {', '.join(short)}"


def _fields(path: Path) -> list[str]:
    """The fields that can be set for the option in a file."""
    return [str(field) for field in OmegaConf.load(path) if field not in ("_target_", "defaults", "name")]


def _value(key: str) -> object:
    """The value that a setting has without the one that is refused; None if there is none."""
    return OmegaConf.select(OmegaConf.create(_settings()), key, default=None)


def _knobs() -> list[str]:
    """The dotted paths of all settings."""
    return [path for path in _paths(_settings()) if not path.endswith("_target_")]


def _settings() -> dict[str, Any]:
    """All settings, with the options chosen on the command line if they compose."""
    arguments = [argument for argument in sys.argv[1:] if _chooses(argument)]
    if (folders := _folders()) and not any(argument.startswith("hydra.searchpath") for argument in arguments):
        arguments.append(f"hydra.searchpath=[{','.join(map(str, folders))}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        try:
            config = compose("config", arguments)
        except (HydraException, ConfigError):
            config = compose("config")
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return cast(dict[str, Any], plain)


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


PATTERNS: dict[str, Callable[..., str]] = {  # how a message of Hydra begins -> its description, from the groups
    r"In '.*': Could not (?:load|find) '(.+/[^']+)'": _no_such_option,
    r"Could not append to config. An item is already at '(.+)'": "+{}: it already exists; omit the + to set it".format,
    r"Could not override '(.+)@(.+)'": _no_such_place,
    r"Could not delete[^']*'([^'@]+)'": _removed,
    r"Could not override '([^'@]+)'": _no_such_knob,
    r"Ambiguous value for argument '([^=']+)=(.*)'": _ambiguous,
    r"Sweep parameters '([^=']+)=(.*)' requires": "{}={}: several values are a sweep: add -m".format,
    r"Multiple values for ([^.\s]+)": "{}: given more than once".format,
    r"Cannot find primary config '([^']+)'": _no_primary,
    r"(hydra.searchpath) must be a list of strings. Got: (.+)": "{0}={1}: write '{0}=[{1}]'".format,
}
