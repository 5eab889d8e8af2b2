"""Pydantic's and OmegaConf's errors about an option's fields, in the words of whoever wrote the fields."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from steer_heal.config.words import nearest

MOST = 3  # places named in one line


def explain(error: ValidationError, option: type[BaseModel], fields: Mapping[str, Any], path: str) -> tuple[str, str]:
    """Describe the invalid fields: names, given values and allowed values. Return also the path of an unknown field.

    A misspelt field may be the reason why another is missing, so misspelt ones come first and alone; then missing ones.
    """
    errors = error.errors()
    if found := [each for each in errors if each["type"] == "extra_forbidden"]:
        return _unknown(found, option, fields, path), _dotted(path, _place(found[0]["loc"], fields)[0])
    if found := [each for each in errors if each["type"] == "missing"]:
        return _missing(found, fields, path), ""
    every = [tuple(_place(each["loc"], fields)[0]) for each in errors]
    inside = {place[:n] for place in every for n in range(len(place))}  # a list whose items are invalid seems empty
    places = [place for place in dict.fromkeys(every) if place not in inside]
    said = [_invalid(place, errors, fields, path) for place in places[:MOST]]
    return "; ".join(said) + (f"; and {len(places) - MOST} more" if len(places) > MOST else ""), ""


def _unknown(found: Sequence[ErrorDetails], option: type[BaseModel], fields: Mapping[str, Any], path: str) -> str:
    loc, names = found[0]["loc"], list(_class_at(option, found[0]["loc"][:-1]).model_fields)
    place, value = _place(loc, fields)
    said = f"{_dotted(path, place)}{_shown(value)}: there is no such field"
    if others := [_dotted(path, _place(each["loc"], fields)[0]) for each in found[1:]]:
        said += f", nor {', '.join(others[:MOST])}"
    hint = nearest(str(loc[-1]), names)
    return f"{said}.{hint} There are {', '.join(names)}" if hint else f"{said}; there are {', '.join(names)}"


def _missing(found: Sequence[ErrorDetails], fields: Mapping[str, Any], path: str) -> str:
    lacking: dict[str, list[str]] = {}
    for each in found:
        lacking.setdefault(_dotted(path, _place(each["loc"], fields)[0]), []).append(str(each["loc"][-1]))
    said = [
        f"{place}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} missing" for place, names in lacking.items()
    ]
    return "; ".join(said[:MOST]) + (f"; and {len(said) - MOST} more" if len(said) > MOST else "")


def _invalid(place: tuple[str, ...], errors: Sequence[ErrorDetails], fields: Mapping[str, Any], path: str) -> str:
    here = [each for each in errors if tuple(_place(each["loc"], fields)[0]) == place]
    _, value = _place(here[0]["loc"], fields)
    name = _dotted(path, place)
    reasons = dict.fromkeys(_reason(each, name) for each in here)
    return f"{name}{_shown(value)} is not allowed: {' or '.join(reasons)}"


def _class_at(option: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel]:
    """The class whose field a place in `option` is; the innermost that is known."""
    kind: Any = option
    for part in loc:
        inner = kind.model_fields[part].annotation if part in kind.model_fields else None
        kind = next(iter(_classes(inner)), kind)
    return kind  # type: ignore[no-any-return]


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """The option classes that an annotation names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for argument in get_args(annotation) for kind in _classes(argument)]


def _dotted(path: str, place: Sequence[str]) -> str:
    return ".".join([*([path] if path else []), *place]) or "configuration"


def _shown(value: Any) -> str:
    return "" if isinstance(value, dict | BaseModel) else f"={value!r:.200}"


def _place(loc: Sequence[int | str], fields: Mapping[str, Any]) -> tuple[list[str], Any]:
    """The path of the innermost given field, and its value; the rest of `loc` names the members of a union."""
    place: list[str] = []
    value: Any = fields
    for part in loc:
        if not (part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)):
            break
        value = value[part]
        place.append(str(part))
    return place, value


def _reason(error: ErrorDetails, name: str) -> str:
    """Rephrase Pydantic's reason; the ValueErrors raised by our own validators state what a value must be."""
    value, kind = error["input"], error["type"]
    if kind == "string_type" and value is not None:
        if isinstance(value, dict):
            return "must be a valid string: text with a colon and a space must be in quotes"
        return "must be a valid string: text such as yes, no, 1 or [a] must be in quotes in YAML"
    if kind in ("model_type", "model_attributes_type", "dict_type", "dataclass_type"):
        return _fields_wanted(value, name)
    if kind == "tuple_type" and isinstance(value, int | float):
        return f"must be a list: write '{name}=[{value}]'"
    message = error["msg"]
    plain = re.sub(r"^\w+ should ", "must ", message.replace("Value error, ", "must be ", 1))
    plain = re.sub(r"^Input is not a valid path.*", "must be a path", plain)
    return re.sub(r", unable to parse.*| after validation", "", plain).replace("a valid tuple", "a list")


def _fields_wanted(value: Any, name: str) -> str:
    """Advice for a single value where an option, with fields, is wanted."""
    if isinstance(value, str) and "." not in name:
        return f"must be an option: in YAML choose it under defaults, as - override /{name}: {value}"
    return f"must have fields, each set as {name}.FIELD=VALUE"
