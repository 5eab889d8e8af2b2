"""The control groups that this process is in: the kernel's files about it, in versions 1 and 2."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def folders(mount: str, controller: str) -> list[Path]:
    """Return the folder of this process's group and those of its parents, the innermost first.

    Version 1 mounts each controller below a name of its own; in version 2 both names are empty. A container may see its
    own group as the root, so that the name given by the kernel leads nowhere.
    """
    places = dict[str, str]()
    for line in lines(PROC / "self/cgroup"):
        _, controllers, place = line.split(":", 2)
        places |= dict.fromkeys([controllers, *controllers.split(",")], place.lstrip("/"))
    root = CGROUPS / mount
    here = root / places.get(controller, "")
    return [folder for folder in (here, *here.parents) if folder.is_relative_to(root)]


def lines(path: Path) -> list[str]:
    """Return the lines of a kernel file; none if it does not exist or cannot be read."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").splitlines()
    return []
