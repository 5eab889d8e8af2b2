"""`steer-heal VERB`: the same commands as the modules, by one name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ENTRY = Path(sys.executable).with_name("steer-heal")


def said(folder: Path, *arguments: str, entry: bool = True) -> subprocess.CompletedProcess[str]:
    command = [str(ENTRY)] if entry else [sys.executable, "-m", "steer_heal"]
    return subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_without_a_verb_it_lists_them(tmp_path: Path) -> None:
    bare, asked = said(tmp_path), said(tmp_path, "--help", entry=False)
    assert (bare.returncode, asked.returncode) == (2, 0)
    assert bare.stdout == asked.stdout
    for verb in ("run", "compare", "show", "sweep", "store"):
        assert f"\n{verb} " in bare.stdout


def test_a_slip_is_rejected_in_one_line(tmp_path: Path) -> None:
    found = said(tmp_path, "stor", "ls")
    assert (found.returncode, found.stderr) == (2, "steer_heal: stor: there is no such command. Did you mean store?\n")


@pytest.mark.parametrize(
    ("typed", "code", "part"),
    [
        ("run lam=-1", 2, "lam=-1 is not allowed"),
        ("run --help", 0, "== Groups, chosen as group=option"),
        ("compare nowhere", 2, "nowhere: there is no such folder"),
        ("show nowhere", 2, "nowhere: there is no such folder"),
        ("sweep status nowhere", 2, "nowhere: not the folder of a sweep"),
        ("store ls", 2, "there is no such folder"),
    ],
)
def test_a_verb_is_its_module(tmp_path: Path, typed: str, code: int, part: str) -> None:
    """Reference: `python -m steer_heal.<module>`, to the exit status and the last line."""
    verb, *rest = typed.split()
    module = {"run": "main"}.get(verb, verb)
    command = [sys.executable, "-m", f"steer_heal.{module}", *rest]
    plain = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    found = said(tmp_path, *typed.split())
    assert found.returncode == plain.returncode == code, found.stderr
    assert part in found.stdout + found.stderr
    last = [(one.stdout + one.stderr).splitlines()[-1].partition(":")[2] for one in (found, plain)]
    assert last[0] == last[1]


def test_a_spoilt_sweep_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/sweep.json").write_text('{"cells": [{}]}')
    found = said(tmp_path, "compare", "s")
    assert found.returncode == 2, found.stderr
    assert found.stderr.splitlines()[-1].startswith("steer_heal: s/sweep.json cannot be read")
