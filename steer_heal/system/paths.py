"""Paths as users write them: `~` and `~name` stand for home folders, also where no shell has replaced them."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

# Where a shell would see the beginning of a path in an argument of Hydra: after `=`, in a list, in a file:// address.
FLAGS = ("--config-dir", "-cd", "--config-path", "-cp")
START = re.compile(r"(?<=[=\[, ])(?P<quote>['\"]?)(?P<schema>(?:file://)?)(?P<path>~[^\],'\"]*)(?P=quote)")
PATHS = re.compile(
    r"\+{0,2}(runtime\.store|hydra\.(run\.dir|sweep\.dir|searchpath)|model\.(id|chat_template)|steer\.path)="
)


def expanded(path: str) -> str:
    """Replace a leading `~` or `~name` by the home folder; anything else, also a relative path, is returned as it is.

    Raises ValueError, saying what the path must be, if there is no such user.
    """
    if not path.startswith("~"):
        return path
    with suppress(RuntimeError):
        return str(Path(path).expanduser())
    if Path(path).exists():  # a folder that is called so
        return path
    user = path.removeprefix("~").split("/")[0]
    raise ValueError(f"a path that exists: there is no user {user!r}" if user else "a path: there is no home folder")


def expand_arguments(arguments: list[str]) -> list[str]:
    """Expand the paths among the arguments of a Hydra command: its grammar has no unquoted `~`.

    Raises ValueError, naming the argument, if there is no such user.
    """
    found, after_flag = list[str](), False
    for argument in arguments:
        flag, joined, value = argument.partition("=")
        try:
            if after_flag:
                argument = expanded(argument)
            elif joined and flag in FLAGS:
                argument = f"{flag}={expanded(value)}"
            elif PATHS.match(argument):
                argument = START.sub(lambda m: f"{m['quote']}{m['schema']}{expanded(m['path'])}{m['quote']}", argument)
        except ValueError as error:
            raise ValueError(f"{argument}: must be {error}") from None
        after_flag = argument in FLAGS
        found.append(argument)
    return found
