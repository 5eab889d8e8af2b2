"""Installed from a wheel, and with options from elsewhere: a folder, or a package; examples as in docs/extending.md."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.command import result, run
from helpers.own_options import ROOT, Ran, edit, finished, page, put

pytestmark = pytest.mark.slow(24)

SHORT = ("experiment=tiny", "heal.batch_size=1", "heal.epochs=1")  # a sequence a step: its penalty is in the curve


def told(part: str) -> list[str]:
    """The arguments of the page's command that has `part` in it."""
    (line,) = (line for line in page()["sh"].splitlines() if part in line)
    words = shlex.split(line, comments=True)
    assert words[:3] == ["python", "-m", "steer_heal.main"]
    return words[3:]


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


@pytest.fixture(scope="module")
def single(venv: Venv, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One run of the installed steer_heal, in an empty folder."""
    root = tmp_path_factory.mktemp("empty")
    return finished(root, venv.run(root, *SHORT), "kl_rev")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The page's sweep, with huber in a folder."""
    root = tmp_path_factory.mktemp("folder")
    put(root / "mine")
    return finished(root, run(root, *told("-m -cd mine"), *SHORT), "sweep")


@pytest.fixture(scope="module")
def packaged(venv: Venv, single: Ran, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The same from an installed package. All but the heals is in the store of the run before it was installed."""
    root = tmp_path_factory.mktemp("package")
    project = root / "project"
    put(project / "huber_reg", {"__init__.py": "1 / 0  # not to be imported"})
    (project / "pyproject.toml").write_text(page()["pyproject.toml"])
    pip("--python", venv.python, "install", "--no-index", "--no-deps", "--no-build-isolation", project)
    (root / "empty").mkdir()
    arguments = [word for word in told("-m -cd mine") if word not in ("-cd", "mine")]
    store = f"runtime.store={single.folder.parents[1] / 'store'}"
    return finished(root / "empty", venv.run(root / "empty", *arguments, *SHORT, store), "sweep")


def test_the_pages_example_is_short() -> None:
    """Reference: the blocks that the page has to show, of which the rest of this file makes use."""
    found = page()
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
    assert re.findall(r"^(nll|huber)\b.*\d", packaged.out, re.MULTILINE)[-2:] == ["nll", "huber"]
    assert result(packaged.cell("huber"))["computed"].count("heal.heal") == 1
    said = venv.run(tmp_path, "--help")
    assert said.returncode == 0, said.stderr
    assert "\nreg: huber, kl_fwd, kl_rev, nll, wd\n" in said.stdout
    for group in (path for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra"):
        options = "huber, kl_fwd, kl_rev, nll, wd" if group.name == "reg" else ", ".join(
            sorted(path.stem for path in group.glob("*.yaml"))
        )  # fmt: skip
        assert f"\n{group.name}: {options}\n" in said.stdout, f"--help does not list {group.name}"


def test_a_folder_of_options_is_swept(swept: Ran, tmp_path: Path) -> None:
    assert re.findall(r"^(nll|huber)\b.*\d", swept.out, re.MULTILINE)[-2:] == ["nll", "huber"]
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
