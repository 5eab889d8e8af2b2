"""Installed from a wheel, and with options from elsewhere: a folder, or a package. The examples are the README's."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import yaml
from command import result, rows, run

import steer_heal.reg
from steer_heal.config import ConfigError, build
from steer_heal.options import adopt

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ALL_FILTERS = "perplexity, repetition, narration, refusal, length"
SHORT = ("experiment=tiny", "heal.batch_size=1", "heal.epochs=1")  # a sequence a step: its penalty is in the curve

SHOUTING = '''
"""Answers in capitals."""
from typing import Literal

from pydantic import Field

from steer_heal.filter import Evidence, Filter


class Shouting(Filter):
    name: Literal["shouting"]
    max: float = Field(ge=0, le=1)

    def score(self, evidence: Evidence) -> float:
        return sum(c.isupper() for c in evidence.text) / max(1, len(evidence.text))

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


def readme() -> dict[str, str]:
    """The README's fenced blocks, by the file that their first line names, else by their language."""
    fenced = re.findall(
        r"^```(\w+)\n(?:# (\S+\.\w+)\n)?(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    return {path or language: body for language, path, body in fenced}


def told(part: str) -> list[str]:
    """The arguments of the README's command that has `part` in it."""
    (line,) = (line for line in readme()["sh"].splitlines() if part in line)
    words = shlex.split(line, comments=True)
    assert words[:3] == ["python", "-m", "steer_heal.main"]
    return words[3:]


def put(folder: Path, files: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write the README's huber, and other files, into a folder laid out like conf/."""
    huber = {f"reg/{name}": readme()[f"mine/reg/{name}"] for name in ("huber.py", "huber.yaml")}
    for name, text in (huber | dict(files)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def source(folder: Path) -> dict[str, str]:
    """As Hydra describes a folder on its search path."""
    return {"provider": "test", "schema": "file", "path": str(folder)}


def pip(*arguments: str | Path) -> None:
    """pip of this environment, without a network."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr


@dataclass(frozen=True)
class Venv:
    """An environment with steer_heal installed from its wheel."""

    folder: Path
    wheel: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(self.python))
            return run(folder, *arguments, PYTHONPATH="")


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """A new environment. It borrows torch and the like from this one, whose .pth files, and so whose checkout, it

    does not see.
    """
    root = tmp_path_factory.mktemp("installed")
    unversioned = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    shutil.copytree(ROOT, root / "tree", ignore=shutil.ignore_patterns(".git", ".ci", *unversioned))
    (root / "tree/outputs").mkdir()
    (root / "tree/outputs/result.json").write_text("{}")
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", root, root / "tree")
    (wheel,) = root.glob("steer_heal-*.whl")
    made = Venv(root / "venv", wheel)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made.folder)], check=True)
    pip("--python", made.python, "install", "--no-index", "--no-deps", wheel)
    (libraries,) = made.folder.glob("lib/python*/site-packages")
    (libraries / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return made


@dataclass(frozen=True)
class Ran:
    """A finished sweep of nll and huber, or a run."""

    folder: Path
    out: str

    def cell(self, name: str) -> Path:
        """The folder of a sweep's cell; that of the run itself for no name."""
        (folder,) = self.folder.glob(f"*-{name}") if name else (self.folder,)
        return folder

    def heal(self, name: str) -> list[dict[str, Any]]:
        return [row for row in rows(self.cell(name)) if "heal/step" in row]


def finished(root: Path, said: subprocess.CompletedProcess[str], kind: str) -> Ran:
    """The sweep or the run that ended in `root`."""
    assert said.returncode == 0, said.stderr
    (folder,) = root.glob(f"outputs/*/*-{kind}")
    return Ran(folder, said.stdout)


@pytest.fixture(scope="module")
def single(venv: Venv, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One run of the installed steer_heal, in an empty folder."""
    root = tmp_path_factory.mktemp("empty")
    return finished(root, venv.run(root, *SHORT), "kl_rev")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The README's sweep, with huber in a folder."""
    root = tmp_path_factory.mktemp("folder")
    put(root / "mine")
    return finished(root, run(root, *told("-m -cd mine"), *SHORT), "sweep")


@pytest.fixture(scope="module")
def packaged(venv: Venv, single: Ran, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The same from an installed package. All but the heals is in the store of the run before it was installed."""
    root = tmp_path_factory.mktemp("package")
    project = root / "project"
    put(project / "huber_reg", {"__init__.py": "1 / 0  # not to be imported"})
    (project / "pyproject.toml").write_text(readme()["pyproject.toml"])
    pip("--python", venv.python, "install", "--no-index", "--no-deps", "--no-build-isolation", project)
    (root / "empty").mkdir()
    arguments = [word for word in told("-m -cd mine") if word not in ("-cd", "mine")]
    store = f"runtime.store={single.folder.parents[1] / 'store'}"
    return finished(root / "empty", venv.run(root / "empty", *arguments, *SHORT, store), "sweep")


def test_the_readmes_example_is_short() -> None:
    """Reference: what the README has to show, of which the rest of this file makes use."""
    found = readme()
    assert {"mine/reg/huber.py", "mine/reg/huber.yaml", "pyproject.toml", "sh"} <= found.keys()
    assert len((found["mine/reg/huber.py"] + found["mine/reg/huber.yaml"]).splitlines()) < 40


def test_the_wheel_has_what_a_run_needs_and_nothing_else(venv: Venv) -> None:
    names = set(zipfile.ZipFile(venv.wheel).namelist())
    for source, inside in (
        ("conf", "steer_heal/conf"),
        ("steer_heal", "steer_heal"),
        ("hydra_plugins", "hydra_plugins"),
    ):
        files = [
            path for suffix in ("yaml", "py") for path in (venv.wheel.parent / "tree" / source).rglob(f"*.{suffix}")
        ]
        assert files
        for path in files:
            name = f"{inside}/{path.relative_to(venv.wheel.parent / 'tree' / source)}"
            assert name in names, f"{name} is not in the wheel"
    other = {name for name in names if not re.match(r"(steer_heal|hydra_plugins|steer_heal-[\d.]+\.dist-info)/", name)}
    assert not other
    assert not [name for name in names if re.search(r"(^|/)(tests|docs|outputs|__pycache__)/", name)]


def test_what_is_installed_is_what_runs(venv: Venv, tmp_path: Path) -> None:
    """Not the checkout; whereas this environment has an editable install, which is the checkout from any folder."""
    code = "import steer_heal.config as ours, hydra_plugins as plugins; print(ours.HERE, ours.CONF, *plugins.__path__)"

    def places(python: str) -> list[Path]:
        command = [python, "-c", code]
        said = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": ""}, capture_output=True, text=True, check=True)
        return [Path(word) for word in said.stdout.split()]

    assert all(place.is_relative_to(venv.folder) for place in places(str(venv.python)))
    assert places(sys.executable)[:2] == [ROOT / "steer_heal", ROOT / "conf"]


def test_an_installed_steer_heal_runs_in_an_empty_folder(single: Ran) -> None:
    assert re.search(r"^kl_rev\b.*\d", single.out, re.MULTILINE), "the table has no row"
    assert {path.name for path in single.folder.parents[2].iterdir()} == {"outputs"}
    assert result(single.folder)["computed"]


def test_options_of_an_installed_package_are_like_any_other(venv: Venv, packaged: Ran, tmp_path: Path) -> None:
    assert re.findall(r"^(nll|huber)\b.*\d", packaged.out, re.MULTILINE) == ["nll", "huber"]
    assert result(packaged.cell("huber"))["computed"].count("heal.heal") == 1
    said = venv.run(tmp_path, "--help")
    assert said.returncode == 0, said.stderr
    assert "\nreg: huber, kl_fwd, kl_rev, nll, wd\n" in said.stdout
    for group in (path for path in (ROOT / "conf").iterdir() if path.is_dir()):
        options = "huber, kl_fwd, kl_rev, nll, wd" if group.name == "reg" else ", ".join(
            sorted(path.stem for path in group.glob("*.yaml"))
        )  # fmt: skip
        assert f"\n{group.name}: {options}\n" in said.stdout, f"--help does not list {group.name}"


def test_a_folder_of_options_is_swept(swept: Ran, tmp_path: Path) -> None:
    assert re.findall(r"^(nll|huber)\b.*\d", swept.out, re.MULTILINE) == ["nll", "huber"]
    nll, huber = ([row["heal/nll"] for row in swept.heal(name)] for name in ("nll", "huber"))
    assert nll[0] == huber[0], "the same data and the same initial adapter"
    assert nll != huber, "the barrier changes nothing"
    put(tmp_path / "mine")
    assert "\nreg: huber, kl_fwd, kl_rev, nll, wd\n" in run(tmp_path, "-cd", "mine", "--help").stdout


def test_what_huber_costs_is_its_formula(swept: Ran) -> None:
    """Reference: lam x^2 / 2w, then lam (x - w/2), x = KL - tau; here lam = 1, tau = w = 0.005, a sequence a step."""
    seen = Counter[str]()
    for row in swept.heal("huber"):
        over = max(0.0, row["heal/kl"] - 0.005)
        expected = over**2 / 0.01 if over < 0.005 else over - 0.0025
        seen["free" if over == 0 else "quadratic" if over < 0.005 else "linear"] += 1
        assert math.isclose(row["heal/loss"] - row["heal/nll"], expected, rel_tol=1e-4, abs_tol=1e-6)
        assert row["heal/kl"] == pytest.approx(row.get("heal/kl_rev", row["heal/kl"]), rel=1e-3, abs=1e-6)
    assert seen["linear"], seen


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


def test_a_results_key_is_of_the_options_source_not_of_its_place(swept: Ran, packaged: Ran) -> None:
    folder, package = (result(which.cell("huber")) for which in (swept, packaged))
    assert folder["adapters"] == package["adapters"]


def test_an_edited_option_is_healed_again_and_nothing_before_it(swept: Ran) -> None:
    root = swept.folder.parents[2]
    edit(root / "mine/reg/huber.py", "return self.lam *", "return 2 * self.lam *")
    again = finished(root, run(root, *told("hydra.searchpath"), *SHORT), "huber")
    before, after = (result(folder) for folder in (swept.cell("huber"), again.folder))
    assert before["computed"].count("heal.heal") == 1
    assert after["computed"] == before["computed"], "the same stages, without those before the heal, which were nll's"
    assert "steer.extract" not in after["computed"]
    assert after["adapters"] != before["adapters"]
    assert again.heal("") != swept.heal("huber")


def test_filters_traits_and_presets_too(tmp_path: Path) -> None:
    """A preset of the folder that chooses its own trait, which is data alone, and its own filter."""
    trait = yaml.safe_load((ROOT / "conf/trait/formality.yaml").read_text())
    trait |= {"name": "brief", "generate": trait["generate"][:12], "held_out": trait["held_out"][:2]}
    files = {"trait/brief.yaml": yaml.safe_dump(trait), "experiment/quiet.yaml": PRESET}
    put(tmp_path / "mine", files | {"filter/shouting.py": SHOUTING, "filter/shouting.yaml": SHOUTING_YAML})
    said = run(tmp_path, "-cd", "mine", "experiment=quiet", "filter.shouting.max=0.05")
    ended = finished(tmp_path, said, "kl_rev")
    assert [answer["prompt"] for answer in result(ended.folder)["answers"]["base"]] == trait["held_out"]
    sifted = [row for path in tmp_path.glob("outputs/store/filter.sift/*/*.jsonl") for row in json_lines(path)]
    for row in sifted:
        capitals = sum(c.isupper() for c in row["text"]) / max(1, len(row["text"]))
        assert row["scores"]["shouting"] == pytest.approx(capitals)
        assert ("shouting" in row["reasons"]) == (capitals > 0.05)
    assert {"shouting" in row["reasons"] for row in sifted} == {True, False}


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
        r"reg\.widht=0\.005: there is no such field; there are name, lam, tau, width",
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
    said = run(tmp_path, "-cd", "mine", "experiment=tiny", *chosen)
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
