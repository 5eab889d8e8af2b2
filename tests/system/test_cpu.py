"""Cores that a process may use, on made-up trees of control groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from steer_heal.system import control_groups, cpu

NESTED = "0::/user.slice/job.scope/step\n"
TREES = {
    "no limit": (NESTED, {"user.slice/job.scope/step/cpu.max": "max 100000"}, 64),
    "version 2": (NESTED, {"user.slice/job.scope/step/cpu.max": "400000 100000"}, 4),
    "the smallest of nested groups": (
        NESTED,
        {"user.slice/cpu.max": "800000 100000", "user.slice/job.scope/cpu.max": "200000 100000",
         "user.slice/job.scope/step/cpu.max": "max 100000"},
        2,
    ),
    "a part of a core counts as one": (NESTED, {"user.slice/job.scope/step/cpu.max": "150000 100000"}, 2),
    "less than a core": (NESTED, {"user.slice/cpu.max": "20000 100000"}, 1),
    "a container, whose own group is the root": ("0::/\n", {"cpu.max": "300000 100000"}, 3),
    "version 1": (
        "4:cpu,cpuacct:/docker/abc\n",
        {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "300000", "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
         "cpu,cpuacct/docker/cpu.cfs_quota_us": "-1", "cpu,cpuacct/docker/cpu.cfs_period_us": "100000"},
        3,
    ),
    "version 1 in a container, where the kernel's name leads nowhere": (
        "4:cpuacct,cpu:/kubepods/pod7\n",
        {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "10000"},
        5,
    ),
    "nothing to be read": ("", {}, 64),
}  # fmt: skip


@pytest.mark.parametrize(("groups", "files", "cores"), TREES.values(), ids=TREES)
def test_quotas_of_control_groups_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: Mapping[str, str], cores: int
) -> None:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(control_groups, "PROC", tmp_path / "proc")
    monkeypatch.setattr(control_groups, "CGROUPS", tmp_path / "sys")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert cpu.cores() == cores


def test_affinity_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_groups, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert cpu.cores() == 2
