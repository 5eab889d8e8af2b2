"""Options of one's own in a folder: what they may be, and which are refused. The examples are in docs/extending.md."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command import forked, result
from helpers.own_options import ROOT, edit, finished, put

import steer_heal.reg
from steer_heal.config import ConfigError, build
from steer_heal.config.plugins import adopt

pytestmark = pytest.mark.slow(28)

ALL_FILTERS = "perplexity, repetition, narration, refusal, length"

SHOUTING = '''
"""Answers in capitals."""
from typing import Literal

from pydantic import Field

from steer_heal.filter import Filter, FilterInput


class Shouting(Filter):
    name: Literal["shouting"]
    max: float = Field(ge=0, le=1)

    def score(self, item: FilterInput) -> float:
        return sum(c.isupper() for c in item.text) / max(1, len(item.text))

    def passes(self, score: float) -> bool:
        return score <= self.max
'''
SHOUTING_YAML = """\
# @package filter.shouting
_target_: steer_heal.filter.shouting.Shouting
name: shouting
max: 0.2  # share of the characters
"""
PRESET = f"""\
# @package _global_
defaults:
  - tiny
  - override /trait: brief
  - override /filter: [{ALL_FILTERS}, shouting]
"""


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def source(folder: Path) -> dict[str, str]:
    """As Hydra describes a folder on its search path."""
    return {"provider": "test", "schema": "file", "path": str(folder)}


def test_hubers_penalty_by_hand(tmp_path: Path) -> None:
    """Reference: by hand, at and around both joints; there neither value nor slope may jump."""
    spec = importlib.util.spec_from_file_location("huber", put(tmp_path / "mine") / "reg/huber.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    d = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.75], requires_grad=True)
    paid = module.Huber(name="huber", lam=2.0, tau=0.25, width=0.5).penalty(d)
    (slope,) = torch.autograd.grad(paid.sum(), d)
    assert paid.tolist() == [0.0, 0.0, 0.125, 0.5, 2.5]
    assert slope.tolist() == [0.0, 0.0, 1.0, 2.0, 2.0]


def test_filters_traits_and_presets_too(tmp_path: Path) -> None:
    """A preset of the folder that chooses its own trait, which is data alone, and its own filter."""
    trait = yaml.safe_load((ROOT / "conf/trait/formality.yaml").read_text())
    trait |= {"name": "brief", "generate": trait["generate"][:12], "held_out": trait["held_out"][:2]}
    files = {"trait/brief.yaml": yaml.safe_dump(trait), "experiment/quiet.yaml": PRESET}
    put(tmp_path / "mine", files | {"filter/shouting.py": SHOUTING, "filter/shouting.yaml": SHOUTING_YAML})
    said = forked(tmp_path, "-cd", "mine", "experiment=quiet", "filter.shouting.max=0.05")
    ended = finished(tmp_path, said, "kl_rev")
    assert [answer["prompt"] for answer in result(ended.folder)["answers"]["base"]] == trait["held_out"]
    filtered = [row for path in tmp_path.glob("outputs/store/filter.sift/*/*.jsonl") for row in json_lines(path)]
    for row in filtered:
        capitals = sum(c.isupper() for c in row["text"]) / max(1, len(row["text"]))
        assert row["scores"]["shouting"] == pytest.approx(capitals)
        assert ("shouting" in row["reasons"]) == (capitals > 0.05)
    assert {"shouting" in row["reasons"] for row in filtered} == {True, False}


Edit = Callable[[Path], object]  # of the folder of options
UNUSABLE: dict[str, tuple[Edit, list[str], str]] = {  # what is wrong, what is chosen, what the one line says
    "a name of ours": (
        lambda mine: (mine / "reg/huber.py").rename(mine / "reg/kl_rev.py"), ["reg=nll"],
        r".*/mine/reg/kl_rev\.py: steer_heal has an option reg=kl_rev already; give it another name",
    ),
    "a value": (
        lambda mine: None, ["reg=huber", "reg.width=-1"], r"reg\.width=-1 is not allowed: must be greater than 0"
    ),
    "a misspelt knob": (lambda mine: None, ["reg=huber", "reg.widht=1"], r"reg\.widht: there is no such knob\..*"),
    "a misspelt field": (
        lambda mine: edit(mine / "reg/huber.yaml", "width:", "width: 1\nwidht:"), ["reg=huber"],
        r"reg\.widht=0\.005: there is no such field\. Did you mean width\? There are name, lam, tau, width",
    ),
    "a module from elsewhere": (
        lambda mine: edit(mine / "reg/huber.yaml", "steer_heal.reg.huber.Huber", "evil.Huber"), ["reg=huber"],
        r"reg\._target_: 'evil\.Huber' is not allowed: it must name an option below steer_heal",
    ),
    "syntax": (
        lambda mine: edit(mine / "reg/huber.py", "def penalty(", "def penalty(("), ["reg=huber"],
        r"reg\._target_: /\S+/mine/reg/huber\.py, line \d+: SyntaxError: .*",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNUSABLE)
def test_an_option_that_cannot_be_used_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    spoil, chosen, line = UNUSABLE[what]
    (tmp_path / "evil.py").write_text("print('imported')\n")
    spoil(put(tmp_path / "mine"))
    said = forked(tmp_path, "-cd", "mine", "experiment=tiny", *chosen)
    assert re.fullmatch(f"steer_heal: {line}\n", said.stderr), said.stderr
    assert (said.returncode, said.stdout) == (2, "")


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("", "nowhere.Mine", r"'steer_heal\.reg\.nowhere\.Mine' does not exist"),
        ("", "broken.Mine", r"'steer_heal\.reg\.broken\.Mine' does not exist"),
        ("Mine = int", "broken.Mine", r"'steer_heal\.reg\.broken\.Mine' is not an option"),
        ("\nimport torhc", "broken.Mine", r"/\S+/broken\.py, line 2: ModuleNotFoundError: No module named 'torhc'"),
        (
            "import steer_heal.reg.kl",
            "broken.Mine",
            r"/\S+/broken\.py, line 1: ModuleNotFoundError: .*'steer_heal.reg.kl'",
        ),
        ("from json import jump", "broken.Mine", r"/\S+/broken\.py, line 1: ImportError: cannot import name 'jump'.*"),
        ("import json\njson.loads('[')", "broken.Mine", r"/\S+/broken\.py, line 2: JSONDecodeError: Expecting value.*"),
        ("\n'", "broken.Mine", r"/\S+/broken\.py, line 2: SyntaxError: unterminated string literal.*"),
    ],
)
def test_a_module_that_fails_is_told_from_one_that_is_not_there(
    text: str, name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: Python's own reason, at the line of the option's file however deep below it lies."""
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.setattr(steer_heal.reg, "__path__", [*steer_heal.reg.__path__, str(tmp_path)])
    with pytest.raises(ConfigError) as refused:
        build({"reg": {"_target_": f"steer_heal.reg.{name}"}})
    sys.modules.pop("steer_heal.reg.broken", None)
    assert re.match(rf"reg\._target_: {said}", str(refused.value)), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["trait/love.yaml", "reg/kl_rev.yaml"])
def test_a_changed_copy_under_our_name_is_refused(name: str, tmp_path: Path) -> None:
    """Hydra would take ours and not say so."""
    mine = put(tmp_path / "mine", {name: ""})
    sources = [source(ROOT / "conf"), source(mine)]
    with pytest.raises(ConfigError, match=r"/mine/\w+/\w+\.yaml: steer_heal has an option \w+=\w+ already"):
        adopt(sources)


def test_two_folders_with_an_option_of_one_name_are_refused(tmp_path: Path) -> None:
    """A folder that is named twice is no second one."""
    one, two = put(tmp_path / "one"), put(tmp_path / "two")
    with pytest.raises(ConfigError, match=f"{two}/reg/huber.yaml: {one} has an option reg=huber already"):
        adopt([source(one), source(one), source(two)])


@pytest.mark.parametrize(
    ("base", "old", "new"),
    [
        ("steer_heal.reg.wd.Wd", "shrink", "decay_factor"),
        ("steer_heal.reg.kl_rev.KlRev", "slope", "value_and_grad"),
        ("steer_heal.steer.mean_diff.MeanDiff", "how", "operation"),
        ("steer_heal.steer.prompt.Prompt", "settle", "with_layers_from"),
        ("steer_heal.filter.length.Length", "meaning", "key_fields"),
    ],
)
def test_a_method_by_a_former_name_is_refused(base: str, old: str, new: str) -> None:
    """Nothing would call it, and its results would be those of the base class, under a key of its own."""
    module, _, name = base.rpartition(".")
    parent = getattr(importlib.import_module(module), name)
    with pytest.raises(TypeError, match=rf"Mine\.{old} is called {new} now: rename it"):
        type("Mine", (parent,), {"__module__": __name__, old: None})
    type("Mine", (parent,), {"__module__": __name__, "other": lambda self: None})


def test_targets_of_an_earlier_version_are_found() -> None:
    from steer_heal.tracker.jsonl import JsonlConfig

    assert build({"_target_": "steer_heal.tracking.JsonlConfig", "name": "jsonl"}) == JsonlConfig(name="jsonl")
