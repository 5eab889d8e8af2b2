"""`~` in paths that no shell has expanded."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from steer_heal.system.paths import expand_arguments, expanded


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("path", ["a", "a/~/b", "./~", "/a~", "outputs/store", "org/model~1", ""])
def test_other_paths_stay_as_they_are(home: Path, path: str) -> None:
    assert expanded(path) == path, "a store's keys would change"


def test_home_folders(home: Path) -> None:
    assert (expanded("~"), expanded("~/a b")) == (str(home), f"{home}/a b")
    root = pwd.getpwuid(0)
    assert expanded(f"~{root.pw_name}/x") == f"{root.pw_dir}/x"


def test_an_unknown_user_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no user 'nobody9'"):
        expanded("~nobody9/x")
    monkeypatch.chdir(home)
    (home / "~nobody9").mkdir()
    assert expanded("~nobody9") == "~nobody9", "a folder that is called so"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("runtime.store=~/s", "runtime.store=HOME/s"),
        ("runtime.store='~/s t'", "runtime.store='HOME/s t'"),
        ("++model.id=~/m", "++model.id=HOME/m"),
        ("model.id=~/a,~/b,org/c", "model.id=HOME/a,HOME/b,org/c"),
        ("hydra.searchpath=[~/mine,file://~/yours]", "hydra.searchpath=[HOME/mine,file://HOME/yours]"),
        ("hydra.sweep.dir=~", "hydra.sweep.dir=HOME"),
        ("--config-dir=~/mine", "--config-dir=HOME/mine"),
        ("trait.positive='~/ hello'", "trait.positive='~/ hello'"),
        ("~filter", "~filter"),
    ],
)
def test_arguments(home: Path, argument: str, expected: str) -> None:
    (found,) = expand_arguments([argument])
    assert found == expected.replace("HOME", str(home))
    if not found.startswith("--"):
        OverridesParser.create().parse_override(found)


def test_the_folder_after_a_flag(home: Path) -> None:
    assert expand_arguments(["-cd", "~/mine", "lam=1"]) == ["-cd", f"{home}/mine", "lam=1"]
