"""Which code made a result: a repository, an installed commit, neither."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from steer_heal.system import version

VERSION = metadata.version("steer_heal")


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, as the place where the package lies."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_text("one")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        git(root, *command)
    monkeypatch.setattr(version, "ROOT", root)
    return root


def found() -> dict[str, str | bool | None]:
    return version.code_version.__wrapped__()


def test_the_commit_and_whether_files_differ_from_it(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "untracked").write_text("no matter")
    assert found() == {"version": VERSION, "commit": commit, "dirty": False}
    (repository / "file").write_text("two")
    assert found() == {"version": VERSION, "commit": commit, "dirty": True}
    assert version.told(found()) == f"{VERSION} ({commit[:7]}, with changes)"


def test_a_new_file_of_the_code_is_a_change(repository: Path) -> None:
    (repository / "steer_heal").mkdir()
    assert found()["dirty"] is False
    (repository / "steer_heal/new.py").write_text("")
    assert found()["dirty"] is True


def test_a_status_that_cannot_be_had_is_not_clean(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = version._git
    monkeypatch.setattr(version, "_git", lambda *given: None if given[0] == "status" else asked(*given))
    assert found()["dirty"] is None


def test_somebody_elses_repository_is_not_ours(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .venv often lies in the repository of whoever uses it."""
    inner = repository / "lib"
    inner.mkdir()
    monkeypatch.setattr(version, "ROOT", inner)
    monkeypatch.setattr(version, "_installed_commit", lambda: None)
    assert found() == {"version": VERSION, "commit": None, "dirty": None}
    assert version.told(found()) == VERSION


def test_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(version, "_installed_commit", lambda: "abc")
    assert found() == {"version": VERSION, "commit": "abc", "dirty": None}
