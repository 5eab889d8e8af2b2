"""YAML files that users write: decoded, parsed and checked, each problem in one line that names the file."""

from __future__ import annotations

import io
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import MarkedYAMLError, YAMLError
from yaml.reader import ReaderError

from steer_heal.config import LISTS, ConfigError
from steer_heal.config.plugins import GROUPS
from steer_heal.config.words import joined

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON escapes half of a character beyond U+FFFF
HINTS = {  # a part of PyYAML's message: what to do
    r"'\\t'": "indent with spaces, not with tabs",
    r"mapping values are not allowed": "text with a colon and a space must be in quotes",
    r"expected <block end>": "lines of one mapping or list must be indented alike",
    r"could not find expected ':'": "write name: value",
    r"unknown escape character": "in double quotes write a backslash twice, or use single quotes",
    r"found unexpected end of stream": "a quote is not closed",
    r"expected ',' or '[]}]'": "a bracket is not closed",
    r"undefined alias|expected alphabetic|cannot start any token": "text with special characters must be in quotes",
}


def decoded(data: bytes, shown: str) -> str:
    """Decode a text file, less the byte order mark that some editors write. Raises ConfigError if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte 0x{data[error.start]:02x} in line {line}"
        raise ConfigError(f"{shown}: not UTF-8 text ({kind}); save it as UTF-8") from None


def parsed(text: str, shown: str) -> DictConfig:
    """Parse a YAML file of fields; surrogate pairs, as JSON escapes emoji, are joined. Raises ConfigError."""
    try:
        config = OmegaConf.load(io.StringIO(text))
    except (YAMLError, OSError) as error:  # OSError: OmegaConf's for a single number
        raise ConfigError(f"{shown}{_problem(error)}") from None
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{shown}: a list, where a file has fields, as name: value")
    if SURROGATE.search(text):
        config = OmegaConf.create(_joined(OmegaConf.to_container(config)))
    return config


def check_place(config: DictConfig, package: str | None, path: str, shown: str) -> None:
    """Raise ConfigError for an option's file whose fields would land in another place than its own.

    `path` is group and name, such as `eval/mine`; `package` is what the file's `# @package` line says.
    """
    group, _, name = path.removesuffix(".yaml").rpartition("/")
    own = {"experiment": "_global_", **{listed: f"{listed}.{name}" for listed in LISTS}}.get(group)
    fields = [str(key) for key in config if key != "defaults"]
    if own is not None and package is None:
        overrides = any("override " in str(entry) for entry in config.get("defaults") or [])
        nested = group in LISTS and fields and all(isinstance(config._get_node(key), DictConfig) for key in fields)
        if (fields and not nested) or overrides or ("defaults" not in config and not fields):
            raise ConfigError(f"{shown}: its first line must be: # @package {own}")
    here = package == own  # elsewhere, fields may well add to those of another option
    if group in GROUPS and here and "_target_" not in config and "defaults" not in config:
        raise ConfigError(
            f"{shown}: _target_ is missing: the option's class, such as steer_heal.{group}.{name}.{_class(name)}; "
            f"to change fields of another option, begin with defaults: [OPTION]"
        )


def _class(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _problem(error: Exception) -> str:
    """Describe a YAML error by its line, its reason and what to do, without the file's name."""
    if isinstance(error, ReaderError):
        return f": it holds the character U+{error.character:04X}, which YAML does not allow; write it as an escape"
    if not isinstance(error, MarkedYAMLError):
        return f": {' '.join(str(error).split())}"
    mark = error.problem_mark or error.context_mark
    problem = re.sub("found duplicate key (.*)", r"\1 is given twice", error.problem or str(error))
    hint = next((hint for part, hint in HINTS.items() if re.search(part, problem)), "")
    return f"{f', line {mark.line + 1}' if mark else ''}: {problem}{f': {hint}' if hint else ''}"


def _joined(node: Any) -> Any:
    if isinstance(node, dict):
        return {_joined(key): _joined(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_joined(value) for value in node]
    return joined(node) if isinstance(node, str) else node
