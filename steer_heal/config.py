"""The base of every option, and the way from YAML to typed, frozen, checked configuration."""

from __future__ import annotations

import importlib
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A value that cannot be used; the message is one line naming the field, the value and what is allowed."""


class Config(BaseModel):
    """An option: frozen, unknown fields refused, no NaN or infinity. YAML holds the values, the class their meaning."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def build(node: Any, path: str = "") -> Any:
    """Turn a composed YAML tree into options: every mapping with a `_target_` becomes that class, innermost first.

    Only classes below `steer_heal` that are options are built, so a configuration from somebody else runs no code.
    Raises ConfigError for the first bad value.
    """
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
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
        raise ConfigError("; ".join(_one_line(e, path) for e in error.errors())) from None


def _option_class(target: object, path: str) -> type[Config]:
    where = f"{path}._target_" if path else "_target_"
    module, _, name = str(target).rpartition(".")
    if not module.startswith("steer_heal"):
        raise ConfigError(f"{where}: {target!r} is not allowed: it must name an option below steer_heal")
    try:
        option = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError):
        raise ConfigError(f"{where}: {target!r} does not exist") from None
    if not (isinstance(option, type) and issubclass(option, Config)):
        raise ConfigError(f"{where}: {target!r} is not an option (a subclass of Config)")
    return option


def _one_line(error: Any, path: str) -> str:
    field = ".".join([*([path] if path else []), *(str(part) for part in error["loc"])])
    if error["type"] == "missing":
        return f"{field}: missing"
    if error["type"] == "extra_forbidden":
        return f"{field}={error['input']!r}: there is no such field"
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    shown = "" if isinstance(error["input"], (dict, BaseModel)) else f"={error['input']!r}"
    return f"{field or 'configuration'}{shown} is not allowed: must be {reason}"
