"""README, CONTRIBUTING and docs/: their links, paths, trees and commands are real, and their examples build."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.own_options import ROOT
from helpers.own_options import page as extending
from helpers.vectors import kept_file
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steer_heal.compare import parsed as compare_arguments
from steer_heal.config import CONF, ConfigError, build
from steer_heal.config.plugins import GROUPS, adopt
from steer_heal.lm.hooks import Operation
from steer_heal.store.__main__ import main as store_command
from steer_heal.sweep.__main__ import COMMANDS

pytestmark = pytest.mark.slow(15)

DATED = "docs/log.md"  # names things as they were
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
TEXT = {name: (ROOT / name).read_text("utf-8") for name in [*PAGES, "CHANGELOG.md"]}
NOW = [name for name in PAGES if name != DATED]
ROOTS = "steer_heal|hydra_plugins|tests|scripts|conf|docs"
VERBS = {
    "run": "main",
    "compare": "compare",
    "show": "show",
    "store": "store",
    "sweep": "sweep",
}  # of the console script
STAND_INS = {  # for what a reader has and the checkout has not
    "steer.path=warm.gguf": f"steer.path={kept_file()}",
    "model.id=...": "model.id=someone/something",
}


def code_lines(text: str) -> Iterator[str]:
    """Lines of indented and fenced blocks, continued ones joined; then inline code."""
    outside = []
    joined = re.sub(r"\\\n\s*", " ", text)
    fenced = False
    for line in joined.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()
        else:
            outside.append(line)
    for inline in re.findall(r"`([^`]+)`", "\n".join(outside)):
        yield " ".join(inline.split())


def commands(module: str) -> list[tuple[str, str]]:
    """Page and arguments of every `python -m steer_heal.<module> ...`."""
    pattern = re.compile(rf"python -m steer_heal\.{module}(?!\w)(.*)")
    return [(name, found[1]) for name in PAGES for line in code_lines(TEXT[name]) if (found := pattern.search(line))]


def tree(text: str) -> Iterator[tuple[int, str]]:
    """Line number and path of every entry of the indented trees that begin with a folder of the checkout."""
    folders: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = re.match(r"( {4,})([\w.]+[/\w.]*(?: [\w.]+[/\w.]*)*)(?: {2,}\S.*)?$", line)
        names = entry[2].split(" ") if entry else []
        if not entry or not all("." in name or name.endswith("/") for name in names):
            folders = []
            continue
        depth = len(entry[1])
        folders = [(at, name) for at, name in folders if at < depth]
        if not folders and depth > 4:
            continue
        for name in names:
            yield number, "".join(name for _, name in folders) + name
        folders.append((depth, names[-1]))


def test_the_readme_is_short() -> None:
    assert len(TEXT["README.md"].splitlines()) <= 120


@pytest.mark.parametrize("name", TEXT)
def test_every_relative_link_leads_somewhere(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[name]) if "://" not in link]
    assert [link for link in links if not (ROOT / name).parent.joinpath(link.split("#")[0]).exists()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)\s]+)\)", TEXT["README.md"]))
    assert {name for name in PAGES if name != "README.md"} <= linked


@pytest.mark.parametrize("name", NOW)
def test_every_path_that_is_named_exists(name: str) -> None:
    named = re.findall(rf"(?<![\w/.-])((?:{ROOTS})/[\w./*-]*)", TEXT[name])
    paths = {path.rstrip(".-") for path in named}
    assert [path for path in sorted(paths) if not any(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("name", ["README.md", "docs/design.md"])
def test_every_entry_of_a_tree_exists(name: str) -> None:
    entries = list(tree(TEXT[name]))
    assert {"conf/", "steer_heal/loop.py", "tests/"} <= {path for _, path in entries}
    missing = [f"{name}:{line}: {path}" for line, path in entries if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("folder", ["steer_heal", "steer_heal/lm", "conf"])
def test_the_designs_tree_is_complete(folder: str) -> None:
    named = {path.rstrip("/") for _, path in tree(TEXT["docs/design.md"])}
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).iterdir()
        if path.name != "__init__.py"
        and (
            path.suffix in (".py", ".yaml")
            or (path.is_dir() and any(one.suffix in (".py", ".yaml") for one in path.iterdir()))
        )
    }
    assert sorted(there - named) == []


def written(folder: Path) -> Path:
    """The options that docs/extending.md writes down, as files."""
    for name, body in extending().items():
        if name.startswith("mine/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(body, "utf-8")
    return folder / "mine"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Those options in a folder, taken in as long as a test lasts."""
    for group in GROUPS:
        package = importlib.import_module(f"steer_heal.{group}")
        monkeypatch.setattr(package, "__path__", list(package.__path__))
    folder = written(tmp_path)
    adopt([{"provider": "test", "schema": "file", "path": str(folder)}])
    return folder


def cells(arguments: str, mine: Path) -> tuple[list[str], list[list[str]]]:
    """A command's overrides of Hydra's own node, and enough of its cells to see every value that is swept once.

    These are the first of all values, and every other value with the first of the others.
    """
    words = [STAND_INS.get(word, word) for word in shlex.split(arguments, comments=True)]
    given = [word.replace("[mine]", f"[{mine}]") for word in words if not word.startswith("-") and word != "mine"]
    if "-cd" in words:
        given.append(f"hydra.searchpath=[{mine}]")
    parsed = OverridesParser.create().parse_overrides([word for word in given if "=" in word and word != "job"])
    own = [o.input_line for o in parsed if o.key_or_group.startswith(("hydra.", "hydra/"))]
    swept = [list(o.sweep_string_iterator()) if o.is_sweep_override() else None for o in parsed]
    choices = [
        [f"{o.key_or_group}={value}" for value in values] if values else [o.input_line]
        for o, values in zip(parsed, swept, strict=True)
        if o.input_line not in own
    ]
    first = [values[0] for values in choices]
    others = [[*first[:i], value, *first[i + 1 :]] for i, values in enumerate(choices) for value in values[1:]]
    return own, [first, *others]


@pytest.mark.parametrize(("name", "arguments"), sorted(set(commands("main"))))
def test_every_run_that_is_named_composes_and_builds(name: str, arguments: str, mine: Path) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        own, made = cells(arguments, mine)
        for cell in made:
            try:
                config = hydra.compose_config("config", [*own, *cell], RunMode.RUN)
                alone = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
                build(alone)
            except (ConfigError, HydraException, OmegaConfBaseException) as error:
                pytest.fail(f"{name}: python -m steer_heal.main {' '.join(cell)}: {error}")


def test_the_commands_are_found() -> None:
    """Of these there are many: a pattern that finds none would let everything pass."""
    assert len(commands("main")) > 20
    assert len(commands("store")) >= 4
    assert len(commands("sweep")) >= 8
    assert len(commands("compare")) >= 2
    assert len(commands("show")) >= 3


def verbs(module: str) -> list[tuple[str, str, list[str]]]:
    """Page, verb and further words of every command of a module that has verbs."""
    found = []
    for name, arguments in commands(module):
        words = shlex.split(arguments, comments=True)
        found += [(name, verb, words[1:]) for verb in (words[0].split("|") if words else [])]
    return found


def test_every_verb_of_the_sweep_command_is_real() -> None:
    assert [(name, verb) for name, verb, _ in verbs("sweep") if verb not in COMMANDS] == []
    assert {verb for _, verb, _ in verbs("sweep")} == set(COMMANDS)


def test_every_verb_of_the_store_command_is_real(capsys: pytest.CaptureFixture[str]) -> None:
    """And every flag after it is one of that verb."""
    assert {verb for _, verb, _ in verbs("store")} >= {"ls", "show", "verify", "gc"}
    for name, verb, words in verbs("store"):
        with pytest.raises(SystemExit) as ended:
            store_command([verb, "--help"])
        assert ended.value.code == 0, f"{name}: python -m steer_heal.store {verb}"
        said = capsys.readouterr().out
        assert [word for word in words if word.startswith("--") and word not in said] == [], f"{name}: {verb}"


def test_compare_is_called_as_it_takes_it() -> None:
    """Its own parser, on every line that calls it."""
    for name, arguments in commands("compare"):
        words = re.sub(r"<[^>]*>", "FOLDER", arguments)
        given = compare_arguments(shlex.split(words, comments=True))
        assert all("FOLDER" in folder or folder.startswith(("outputs", "~")) for folder in given.folders), (name, words)


def test_the_console_script_mirrors_the_modules() -> None:
    used = {verb for name in NOW for verb in re.findall(r"`steer-heal (\w+)", TEXT[name])}
    assert used == set(VERBS)
    assert all(importlib.util.find_spec(f"steer_heal.{module}") for module in VERBS.values())


def test_every_module_that_is_run_exists() -> None:
    modules = {
        m for name in NOW for line in code_lines(TEXT[name]) for m in re.findall(r"-m (steer_heal[\w.]*\w)", line)
    }
    assert [module for module in sorted(modules) if importlib.util.find_spec(module) is None] == []


CONTRACT = re.findall(r"^\| [\w ]+ \| (`\w+` in `steer_heal.*?) \| (.*?) \|(.*?)\|$", TEXT["docs/extending.md"], re.M)


@pytest.mark.parametrize(("base", "must", "may"), CONTRACT, ids=[row[0].split("`")[1] for row in CONTRACT])
def test_the_contracts_name_what_there_is(base: str, must: str, may: str) -> None:
    """Every method and field in the table of docs/extending.md is one of the classes in its row."""
    (path,) = re.findall(r"`(steer_heal/[\w/]+)\.py`", base)
    module = importlib.import_module(path.replace("/", ".").removesuffix(".__init__"))
    classes = [getattr(module, name) for name in re.findall(r"`([A-Z]\w+)`", base)]
    assert classes
    has = {
        name for kind in classes for one in kind.__mro__ for name in (*vars(one), *vars(one).get("__annotations__", ()))
    }
    members = set(re.findall(r"`([a-z]\w*)(?:\([^`]*\))?`", must + may))
    assert members
    assert sorted(members - has) == []


def test_there_are_contracts_for_every_kind() -> None:
    assert len(CONTRACT) == len(GROUPS) + 1, "a steer option is a direction or another teacher"


def test_the_example_of_an_operation_keeps_the_norm(mine: Path) -> None:
    """Reference: by hand, one state turned half way towards the direction, at doses 0 and 1."""
    module = importlib.import_module("steer_heal.steer.keep_norm")
    h = torch.tensor([[[3.0, 0.0]], [[3.0, 0.0]]])
    turn = module.Turn(torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([0.0, 3.0]), None, torch.float32)
    half = 3 / 2**0.5
    torch.testing.assert_close(turn(h), torch.tensor([[[3.0, 0.0]], [[half, half]]]))
    assert Operation.known["turn"] is module.Turn
