"""Slips on the command line that Hydra's parsers name in terms of their own: flags, and what a shell makes of lists."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser

from steer_heal.config import CONF, ConfigError
from steer_heal.config.words import nearest

ASIDE = {  # characters that editors and web pages put in place of plain ones
    "\u201c\u201d\u201e\u00ab\u00bb": 'a typographic quote, {}: write a straight one, "',
    "\u2018\u2019\u201a": "a typographic quote, {}: write a straight one, '",
    "\u00a0\u202f\u2007\u200b\ufeff": "an invisible character, {}: type the argument anew",
    "\u2013\u2014\u2212": "a dash, {}: write -",
    "\uff0c\uff1d\u3001": "{}: write the plain character",
}


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Move flags before the overrides, which argparse requires. Raises ConfigError for an unknown or incomplete one."""
    parser = get_args_parser()
    known = {name: action for action in parser._actions for name in action.option_strings}
    first, others, left = list[str](), list[str](), list(arguments)
    while left:
        argument = left.pop(0)
        if found := re.fullmatch(r"hydra\.(launcher|sweeper)=(\w+)", argument):
            raise ConfigError(f"{argument}: an option is chosen as hydra/{found[1]}={found[2]}")
        if not argument.startswith("-") or argument in ("-", "--"):
            others.append(argument)
            continue
        flag, given, value = argument.partition("=")
        full = _full(flag, value, known)
        first.append(full + given + value)
        action = known[full]
        takes = 0 if isinstance(action, argparse._StoreTrueAction | argparse._VersionAction) else 1
        if takes and not given:
            if left and (action.nargs is None or left[0] in (action.choices or ())):
                first.append(left.pop(0))
            elif action.nargs is None:
                raise ConfigError(f"{flag}: nothing follows it; {_wanted(action)}")
        elif given and not takes:
            raise ConfigError(f"{argument}: {flag} takes no value")
        _check(flag, action, first[-1].partition("=")[2] if given else first[-1])
    return [*first, *others]


def _full(flag: str, value: str, known: dict[str, argparse.Action]) -> str:
    """The full name of a flag, which may be abbreviated as argparse allows. Raises ConfigError for an unknown one."""
    if flag in known:
        return flag
    begun = [name for name in known if flag.startswith("--") and name.startswith(flag)]
    if len(begun) == 1:
        return begun[0]
    name = flag.lstrip("-")
    close = nearest(flag, known) if flag.startswith("--") or len(name) < 3 else ""
    if re.match(r"[\w.]+$", name) and not begun and not close:
        setting = quoted(f"{name}={value or 'VALUE'}")
        raise ConfigError(f"{flag}: there is no such flag; a value is set as {setting}, without dashes. See --help")
    raise ConfigError(f"{flag}: there is no such flag.{nearest(flag, begun or known)} See --help")


def _wanted(action: argparse.Action) -> str:
    if action.choices:
        return f"one of {', '.join(map(str, action.choices))}"
    return "a folder" if action.dest in ("config_dir", "config_path") else "a value"


def _check(flag: str, action: argparse.Action, value: str) -> None:
    """Raise ConfigError for a flag's value that cannot be right."""
    if action.choices and value not in action.choices and action.nargs is None:
        raise ConfigError(f"{flag} {value}: {_wanted(action)} must follow {flag}")
    if action.dest == "config_dir" and not Path(value).is_dir():
        raise ConfigError(f"{flag} {value}: there is no such folder")
    if action.dest == "config_dir" and (folder := Path(value).resolve()).name in groups() and not _holds_groups(folder):
        raise ConfigError(f"{flag} {value}: a group; give the folder that it is in, {folder.parent}")


def groups() -> list[str]:
    """The groups of options, such as reg and lora."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def _holds_groups(folder: Path) -> bool:
    return any((folder / group).is_dir() for group in groups())


def why_unreadable(argument: str, arguments: Sequence[str]) -> str:
    """What is wrong with an argument that Hydra cannot parse, and what to write; `arguments` are all that are given."""
    for characters, advice in ASIDE.items():
        if found := [c for c in argument if c in characters]:
            return advice.format(f"U+{ord(found[0]):04X}")
    at = arguments.index(argument) if argument in arguments else len(arguments)
    before, after = (arguments[at - 1] if at > 0 else ""), list(arguments[at + 1 :])
    if whole := _put_together(argument, after):
        return f"the shell ends an argument at a space: write {quoted(whole)}"
    if "=" not in argument:
        return _no_equals(argument, before, after)
    key, _, value = argument.partition("=")
    if value.startswith("="):
        return f"write {quoted(key + value)}"
    if value.endswith(",") or ",," in value or value.startswith(","):
        return f"an item is missing beside a comma; write {quoted(f'{key}={_without_gaps(value)}')}"
    if "${" in value and _open(value):
        return "a ${ is not closed; for text that has ${ in it write \\${"
    if _open(value):
        return "a bracket is not closed; write a list as 'path=[a,b]'"
    if re.search(r"\s[\w./+~]+=", value):
        return "several settings in one argument: quote each by itself"
    return "write path=value, a list as 'path=[a,b]', text with special characters as 'path=\"text\"'"


def _put_together(argument: str, after: Sequence[str]) -> str:
    """The list that a shell split at spaces, without these; or an empty string."""
    whole, rest = argument, list(after)
    while rest and "=" in whole and (whole.endswith(",") or _open(whole)) and not re.match(r"[\w./+~]+=|-", rest[0]):
        whole += rest.pop(0)
    return "" if whole == argument or _open(whole) else whole.rstrip(",")


def _no_equals(argument: str, before: str, after: Sequence[str]) -> str:
    following = after[0] if after else ""
    if following.startswith("="):
        value = following[1:] or (after[1] if len(after) > 1 else "VALUE")
        return f"write {quoted(f'{argument}={value}')}, without spaces"
    if before.endswith("="):
        return f"write {quoted(before + argument)}, without spaces"
    if (found := re.match(r"([\w.]+)[:/ ](.+)", argument)) and found[1].partition(".")[0] in groups():
        return f"write {quoted(f'{found[1]}={found[2].strip()}')}"
    value = following if following and "=" not in following and not following.startswith("-") else "VALUE"
    return f"write {quoted(f'{argument}={value}')}; every setting is path=value"


def _without_gaps(value: str) -> str:
    return ",".join(part for part in value.split(",") if part)


def _open(text: str) -> bool:
    """Return True for brackets that are opened and not closed."""
    return any(text.count(a) > text.count(b) for a, b in ("[]", "{}", "()"))


def quoted(argument: str) -> str:
    """An argument as a shell takes it: brackets, braces and spaces are in quotes."""
    return argument if re.fullmatch(r"[\w.,=/:+~@%-]+", argument) else f"'{argument}'"
