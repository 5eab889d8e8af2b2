"""The base class of every option, and the conversion of YAML to typed, frozen, validated configuration."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from steer_heal.store.keys import fingerprint
from steer_heal.system.paths import expanded

HERE = Path(__file__).resolve().parents[1]
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"  # in a wheel, or in a checkout


MOVED = {  # option classes that configurations of earlier versions name
    "steer_heal.tracking.JsonlConfig": "steer_heal.tracker.jsonl.JsonlConfig",
    "steer_heal.tracking.WandbConfig": "steer_heal.tracker.wandb.WandbConfig",
}


class ConfigError(ValueError):
    """An invalid value; the message is one line that names the field, the value and the allowed values."""


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
        try:
            node = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            raise ConfigError(f"{error.full_key}: missing; give it as {error.full_key}=...") from None
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    if isinstance(node, list):
        return [build(child, f"{path}[{i}]") for i, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    fields = {k: build(v, f"{path}.{k}" if path else str(k)) for k, v in node.items() if k != "_target_"}
    if "_target_" not in node:
        return fields
    option = _option_class(node["_target_"], path)
    try:
        return option(**fields)
    except ValidationError as error:
        raise ConfigError(_explain(error, option, fields, path)) from None


def _option_class(target: object, path: str) -> type[Config]:
    where = f"{path}._target_" if path else "_target_"
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


def _explain(error: ValidationError, option: type[Config], fields: dict[str, Any], path: str) -> str:
    """Describe the first invalid field: its name, the given value and the allowed values."""
    # A misspelt field may be the reason why another is missing, so it is reported first.
    found = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place, value = _place(found[0]["loc"], fields)
    name = ".".join([*([path] if path else []), *place]) or "configuration"
    shown = "" if isinstance(value, dict | BaseModel) else f"={value!r:.200}"
    if found[0]["type"] == "missing":
        return f"{name}: {found[0]['loc'][-1]} is missing"
    if found[0]["type"] == "extra_forbidden":
        return f"{name}{shown}: there is no such field; there are {', '.join(option.model_fields)}"
    reasons = [_reason(other["msg"]) for other in found if _place(other["loc"], fields)[0] == place]
    return f"{name}{shown} is not allowed: {' or '.join(dict.fromkeys(reasons))}"


def _place(loc: Sequence[int | str], fields: dict[str, Any]) -> tuple[list[str], Any]:
    """The path of the innermost given field, and its value; the rest of `loc` names the members of a union."""
    place: list[str] = []
    value: Any = fields
    for part in loc:
        if not (part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)):
            break
        value = value[part]
        place.append(str(part))
    return place, value


def _reason(message: str) -> str:
    """Rephrase Pydantic's reason; the ValueErrors raised by our own validators state what a value must be."""
    plain = re.sub(r"^\w+ should ", "must ", message.replace("Value error, ", "must be ", 1))
    plain = re.sub(r"^Input is not a valid path.*", "must be a path", plain)
    return re.sub(r", unable to parse.*| after validation", "", plain).replace("a valid tuple", "a list")
