"""The base class of every option, and the conversion of YAML to typed, frozen, validated configuration."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from steer_heal.config.explain import explain
from steer_heal.config.words import joined, nearest, unusable
from steer_heal.store.keys import fingerprint
from steer_heal.system.paths import expanded

HERE = Path(__file__).resolve().parents[1]
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"  # in a wheel, or in a checkout


LISTS = ("filter", "eval")  # groups of which several options may be chosen
MOVED = {  # option classes that configurations of earlier versions name
    "steer_heal.tracking.JsonlConfig": "steer_heal.tracker.jsonl.JsonlConfig",
    "steer_heal.tracking.WandbConfig": "steer_heal.tracker.wandb.WandbConfig",
}


class ConfigError(ValueError):
    """An invalid value; the message is one line that names the field, the value and the allowed values.

    `unknown` is the dotted path of a field that does not exist, or "".
    """

    def __init__(self, line: str, unknown: str = "") -> None:
        super().__init__(line)
        self.unknown = unknown


class Config(BaseModel):
    """An option: frozen, no unknown fields, no NaN or infinity. YAML holds the values, the class their meaning."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    key_name: ClassVar[str]  # the name of the class in store keys; see __init_subclass__

    renamed: ClassVar[dict[str, str]] = {"meaning": "key_fields"}  # former names of methods that options override

    def __init_subclass__(cls, key: str = "", **kwargs: Any) -> None:
        """Set the class's name in store keys to `key`, which stays when the class moves; by default to its place.

        Raises TypeError for a method by a former name: nothing would call it.
        """
        super().__init_subclass__(**kwargs)
        cls.key_name = key or f"{cls.__module__}.{cls.__qualname__}"
        for old, new in (pair for base in cls.__mro__ for pair in vars(base).get("renamed", {}).items()):
            if old in vars(cls) and old not in vars(cls).get("__annotations__", {}):
                raise TypeError(f"{cls.__qualname__}.{old} is called {new} now: rename it")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject a boolean for a number or text: `seed=true` is a mistake, not the number 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a number or text, not a truth value")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _home_folders(cls, value: Any, info: ValidationInfo) -> Any:
        """Replace the `~` at the beginning of a path. Raises ValueError if there is no such user."""
        is_path = isinstance(value, str) and _takes_path(cls.model_fields[str(info.field_name)].annotation)
        return expanded(value) if is_path else value

    def key_fields(self) -> dict[str, Any]:
        """The fields that determine a result, by name. Options of a class with equal key fields share results."""
        return {field: getattr(self, field) for field in type(self).model_fields if field != "name"}

    @property
    def fingerprint(self) -> Any:
        """Class name and key fields; for a class from outside steer_heal also hashes of its source files."""
        return [type(self).key_name, fingerprint(self.key_fields()), *foreign_source(type(self))]


def _takes_path(annotation: Any) -> bool:
    is_path = isinstance(annotation, type) and issubclass(annotation, Path)
    return is_path or any(map(_takes_path, get_args(annotation)))


@functools.cache
def foreign_source(kind: type) -> tuple[str, ...]:
    """SHA-256 of the user's modules that define a class and its base classes.

    steer_heal's own code has stage versions; a user's code may change without the store knowing.
    """
    found = []
    for one in set(kind.__mro__) - set(Config.__mro__):
        try:
            path = Path(inspect.getfile(one)).resolve()
        except (TypeError, OSError):  # a class defined in an interactive session has no file
            continue
        if not path.is_relative_to(HERE):
            found.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return tuple(sorted(found))


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"a valid regular expression: {error}") from None
    return pattern


Regex = Annotated[str, AfterValidator(_compiles)]  # Python's `re`


def build(node: Any, path: str = "") -> Any:
    """Convert a composed YAML tree to options: every mapping with a `_target_` becomes that class, innermost first.

    Only option classes below `steer_heal` are built, so values from an untrusted source run no code. (The `hydra` node,
    which a preset may set, is instantiated by Hydra: an untrusted preset can run code.)
    Raises ConfigError for the first option with invalid values.
    """
    if isinstance(node, DictConfig):
        node = _resolved(node)
    if isinstance(node, list):
        return [build(child, _inner(path, i)) for i, child in enumerate(node)]
    if isinstance(node, str):
        return _text(node, path)
    if not isinstance(node, dict):
        return node
    if path in LISTS:
        node = {name: child for name, child in node.items() if not left_out(path, name, child)}
    fields = {k: build(v, _inner(path, k)) for k, v in node.items() if k != "_target_"}
    if "_target_" not in node:
        return fields
    option = _option_class(node["_target_"], path)
    try:
        return option(**fields)
    except ValidationError as error:
        raise ConfigError(*explain(error, option, fields, path)) from None


def left_out(group: str, name: str, node: Any) -> bool:
    """Return True for fields of an option of a list that is not chosen: a preset sets them in case it is.

    Raises ConfigError for fields of what is no option at all.
    """
    if not isinstance(node, Mapping) or "_target_" in node:
        return False
    options = [found.name for found in pkgutil.iter_modules(importlib.import_module(f"steer_heal.{group}").__path__)]
    if name not in options:
        there = f"There are {', '.join(options)}"
        raise ConfigError(f"{group}.{name}: there is no such option.{nearest(name, options)} {there}")
    return True


def _resolved(node: DictConfig) -> Any:
    """Return the values of a tree with every interpolation resolved. Raises ConfigError."""
    try:
        if missing := list(_missing(OmegaConf.to_container(node), "")):
            given = " ".join(f"{key}=VALUE" for key in missing)
            raise ConfigError(f"{', '.join(missing)}: missing; give {given}, or the value in YAML in place of ???")
        return OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(interpolation(error)) from None


def _missing(node: Any, path: str) -> Iterator[str]:
    """Yield the paths of mandatory values that are missing: `???` in YAML."""
    if node == "???":
        yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _missing(child, _inner(path, key))


def interpolation(error: OmegaConfBaseException) -> str:
    """Describe what is wrong with a `${...}`, and how to write one that is meant as text."""
    said = str(error).splitlines()[0]
    if found := re.search(r"Environment variable '(.*)' not found", said):
        said = f"the environment variable {found[1]} is not set; set it, or write ${{oc.env:{found[1]},DEFAULT}}"
    elif found := re.match(r"Unsupported interpolation type (.*)", said):
        said = f"${{{found[1]}:...}}: there is no such resolver; for text write \\${{"
    elif "Recursive" in said:
        said = "its ${...} leads back to itself"
    else:
        said = re.sub(r"^(no viable alternative|mismatched|extraneous|token recog).*", "a ${ that is not closed", said)
        alone = re.fullmatch(r"\$\{[^}]*\}", str(None if error.child_node is None else error.child_node._value()))
        said = said if alone else f"{said}; for text that has ${{ in it write \\${{"
    return f"{error.full_key}: {said}" if error.full_key else said


def _inner(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _text(text: str, path: str) -> str:
    """Return text with its surrogate pairs joined. Raises ConfigError for a character that no text can hold."""
    text = joined(text)
    if said := unusable(text):
        raise ConfigError(f"{path}: {said}")
    return text


def _option_class(target: object, path: str) -> type[Config]:
    where = _inner(path, "_target_")
    module, _, name = MOVED.get(str(target), str(target)).rpartition(".")
    if not module.startswith("steer_heal."):
        raise ConfigError(f"{where}: {target!r} is not allowed: it must name an option below steer_heal")
    try:
        option = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a user's module may raise anything; it is reported with file and line
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{where}: {target!r} does not exist") from None
        raise ConfigError(f"{where}: {_import_failure(error, module)}") from error
    if option is None:
        raise ConfigError(f"{where}: {target!r} does not exist")
    if not (isinstance(option, type) and issubclass(option, Config)):
        raise ConfigError(f"{where}: {target!r} is not an option (a subclass of Config)")
    return option


def _import_failure(error: Exception, module: str) -> str:
    """Describe the failed import of an existing module, most likely a user's: file, line and reason."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    spec = importlib.util.find_spec(module)
    file = spec.origin if spec else None
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}{f', line {lines[-1]}' if lines else ''}: {type(error).__name__}: {' '.join(str(error).split())}"
