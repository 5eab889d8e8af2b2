"""Memory that control groups leave, on made-up trees of the kernel's files, in versions 1 and 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from steer_heal.lm.memory import available
from steer_heal.system import control_groups

FREE = 1000 * 1024  # bytes that the made-up machine says are free
UNLIMITED = 9223372036854771712  # what version 1 says for none
Left = Callable[..., int | None]


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Left:
    """A function from a process's groups and the files below /sys/fs/cgroup to what is available on the CPU."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    monkeypatch.setattr(control_groups, "PROC", proc)
    monkeypatch.setattr(control_groups, "CGROUPS", groups)
    monkeypatch.setattr(sys, "platform", "linux")
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:    9000 kB\nMemFree:    800 kB\nMemAvailable:    1000 kB\n")

    def found(entries: str | None, **files: str) -> int | None:
        if entries is not None:
            (proc / "self/cgroup").write_text(entries)
        for name, text in files.items():
            (groups / name).parent.mkdir(parents=True, exist_ok=True)
            (groups / name).write_text(text)
        return available(torch.device("cpu"))

    return found


def group(place: str, most: object, used: int, cache: int = 0) -> dict[str, str]:
    """The files of a group of version 2."""
    stat = f"anon 5\nfile {cache + 7}\ninactive_file {cache}\nactive_file 7\n"
    texts = {"memory.max": f"{most}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    return {f"{place}{name}": text for name, text in texts.items()}


def group_1(place: str, most: object, used: int, cache: int = 0) -> dict[str, str]:
    """The files of a group of version 1, whose own figure of cache leaves out what is below it."""
    stat = f"cache 5\ninactive_file 0\nhierarchical_memory_limit {most}\ntotal_inactive_file {cache}\n"
    texts = {"limit_in_bytes": f"{most}\n", "usage_in_bytes": f"{used}\n", "stat": stat}
    return {f"memory/{place}memory.{name}": text for name, text in texts.items()}


def test_no_limit_leaves_what_is_free(left: Left) -> None:
    assert left("0::/\n") == FREE
    assert left("0::/a/b\n", **group("a/b/", "max", 900), **group("a/", "max", 900)) == FREE


def test_a_limit_leaves_what_is_not_in_use(left: Left) -> None:
    """Reference: by hand; cache that was not used lately gives way to others."""
    assert left("0::/job\n", **group("job/", 5000, 3000)) == 2000
    assert left("0::/job\n", **group("job/", 5000, 3000, cache=600)) == 2600
    assert left("0::/job\n", **group("job/", 5000, 6000)) == 0, "over the limit there is none, not less than none"
    assert left("0::/job\n", **group("job/", 10 * FREE, 0)) == FREE, "a limit above what is free"


def test_the_tightest_group_above_counts(left: Left) -> None:
    """Reference: the least of what four groups leave, the root of a container among them; one beside is not above."""
    files = group("a/b/c/", "max", 0) | group("a/b/", 9000, 1000) | group("a/", 5000, 1000) | group("", 8000, 1000)
    assert left("0::/a/b/c\n", **files, **group("a/x/", 10, 0)) == 4000
    assert left("0::/a/b/c\n", **group("", 3000, 1000)) == 2000


def test_groups_that_are_not_to_be_seen(left: Left) -> None:
    """A container may be told a place outside what it sees; its own limit then stands at the root."""
    assert left("0::/../../other\n", **group("", 7000, 1000)) == 6000
    assert left("0::/not/here\n") == 6000
    assert left(None) == 6000


def test_missing_files_raise_nothing(left: Left, tmp_path: Path) -> None:
    """Reference: of a limit alone, all of it is left; without figures of cache none gives way."""
    assert left(None) == FREE, "no control groups at all"
    assert left("0::/job\n", **{"job/memory.max": "4000\n"}) == 4000
    assert left("0::/job\n", **{"job/memory.current": "1500\n"}) == 2500
    assert left("0::/job\n", **{"job/memory.stat": "anon 5\n"}) == 2500
    assert left("0::/job\n", **{"job/memory.max": ""}) == FREE
    (tmp_path / "proc/meminfo").write_text("MemTotal:    9000 kB\nMemFree:    800 kB\n")
    assert left("0::/job\n") is None, "a kernel that does not tell what is free"
    (tmp_path / "proc/meminfo").unlink()
    assert left("0::/job\n") is None


ENTRIES_1 = "9:name=systemd:/\n4:memory:/slurm/job_7\n2:cpu,cpuacct:/other\n"


@pytest.mark.parametrize("entries", [ENTRIES_1, ENTRIES_1 + "0::/\n"], ids=["version 1", "both"])
def test_version_1(left: Left, entries: str) -> None:
    """Reference: by hand; other controllers have other places."""
    none = group_1("slurm/", UNLIMITED, 10) | group_1("", UNLIMITED, 20)
    assert left(entries, **none) == FREE
    assert left(entries, **none, **group_1("slurm/job_7/", 5000, 3000, cache=500)) == 2500
    assert left(entries, **group_1("slurm/", 4000, 3000)) == 1000
    assert left(entries, **group_1("other/", 10, 0)) == 1000, "the limit of another group"
