"""Every file under conf/ builds and follows the naming rules, and invalid values are rejected in one line."""

from __future__ import annotations

import ast
import functools
import inspect
from pathlib import Path

import pytest
import yaml
from helpers.compose import composed
from helpers.vectors import kept_file

from steer_heal import experiment
from steer_heal.config import CONF, Config, ConfigError
from steer_heal.config.errors import REFUSED
from steer_heal.experiment import Experiment
from steer_heal.reg import Regulariser
from steer_heal.reg.kl_fwd import KlFwd
from steer_heal.reg.kl_rev import KlRev
from steer_heal.reg.nll import Nll
from steer_heal.reg.wd import Wd
from steer_heal.steer import Method
from steer_heal.store.keys import fingerprint

PACKAGES = ("reg", "steer", "dose", "filter", "eval", "model", "tracker")  # one .py and one .yaml an option
NEEDS = {  # what an option cannot do without
    "model/hub": ["model.id=someone/something"],
    "steer/file": [f"steer.path={kept_file()}"],
}
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.y*ml") if path != CONF / "config.yaml")
ALIASES = {Path("generate/sample.yaml"): "nucleus"}  # former names of options
OPTIONS = [file for file in FILES if file.parts[0] not in ("experiment", "hydra")]


@functools.cache
def holding(file: Path) -> Experiment:
    """An experiment with the option, or the preset, of a file."""
    return composed(*selecting(file))


def selecting(file: Path) -> list[str]:
    """The overrides that choose the option in a file, beside what the group holds anyway if it is a list."""
    group, name = file.parent.as_posix(), file.stem
    among = f"[trait,damage,text,{name}]" if name not in ("trait", "damage", "text") else "[trait,damage,text]"
    choice = {"filter": f"[{name}]", "eval": among}.get(group, name)
    return [f"{group}={choice}", *NEEDS.get(f"{group}/{name}", [])]


def chosen(file: Path) -> Config:
    """The option that a file describes."""
    held = getattr(holding(file), file.parts[0])
    option = held[file.stem] if isinstance(held, dict) else held
    assert isinstance(option, Config)
    return option


def content(file: Path) -> dict[str, object]:
    """What a file says, after what the options say that it starts from."""
    loaded: dict[str, object] = yaml.safe_load((CONF / file).read_text(encoding="utf-8"))
    found: dict[str, object] = {}
    for other in loaded.pop("defaults", []):  # type: ignore[attr-defined]
        found |= content(file.with_stem(other))
    return found | loaded


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_builds(file: Path) -> None:
    try:
        holding(file)
    except REFUSED as error:
        raise AssertionError(f"conf/{file} does not build: {error}") from error
    if file in OPTIONS:
        built = chosen(file)
        found = f"{type(built).__module__}.{type(built).__qualname__}"
        assert found == content(file)["_target_"], f"conf/{file} built {found}"


def test_the_glob_finds_every_group() -> None:
    """Guard against a glob that looks in one folder only and so finds nothing wrong in the others."""
    folders = {path.relative_to(CONF) for path in CONF.rglob("*") if path.is_dir()}
    full = {file.parent for file in FILES}
    leaves = {folder for folder in folders if not any(folder in other.parents for other in folders)}
    assert leaves <= full, f"folders without an option: {sorted(map(str, leaves - full))}"
    listed = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    groups = {key for entry in listed if isinstance(entry, dict) for key in entry if not key.startswith("override")}
    tops = {Path(folder.parts[0]) for folder in folders} - {Path("hydra")}
    assert groups == {str(folder) for folder in tops}, "config.yaml's defaults list is the contents page"
    assert groups - {"experiment"} <= set(Experiment.model_fields)


@pytest.mark.parametrize("file", OPTIONS, ids=str)
def test_an_option_is_called_as_its_file(file: Path) -> None:
    """The token on the command line is the yaml's name, the .py's name and the option's `name`."""
    group, settings = file.parts[0], content(file)
    if file in ALIASES:
        assert chosen(file) == chosen(file.with_stem(ALIASES[file])), f"conf/{file} is another option"
        return
    assert settings["name"] == file.stem, f"conf/{file}: name is {settings['name']!r}"
    assert chosen(file).model_dump()["name"] == file.stem
    if group in PACKAGES:
        module = str(settings["_target_"]).rpartition(".")[0]
        assert module == f"steer_heal.{group}.{file.stem}", f"conf/{file}: _target_ lies in {module}"
    if group in ("filter", "eval"):
        assert (CONF / file).read_text().startswith(f"# @package {group}.{file.stem}\n"), f"conf/{file}: its package"


@pytest.mark.parametrize("file", [f for f in OPTIONS if f.parts[0] not in ("runtime", "tracker")], ids=str)
def test_an_options_class_has_a_name_of_its_own_in_keys(file: Path) -> None:
    """Reference: the class statement. By default the key is the class's path, and the class could not move."""
    kind = type(chosen(file))
    (statement,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(statement, ast.ClassDef)
    given = {word.arg: ast.literal_eval(word.value) for word in statement.keywords}
    assert given.get("key") == kind.key_name, f"{kind.__module__}: class {kind.__name__}(..., key=...)"
    assert chosen(file).fingerprint[0] == kind.key_name


@pytest.mark.parametrize("package", PACKAGES)
def test_code_and_options_correspond(package: str) -> None:
    folder = Path(inspect.getfile(experiment)).parent / package
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    options = {file.stem for file in FILES if file.parts[0] == package}
    assert modules == options, f"{package}: only .py or only .yaml: {sorted(modules ^ options)}"


@pytest.mark.parametrize("file", [Path("config.yaml"), *FILES], ids=str)
def test_every_file_opens_with_a_comment(file: Path) -> None:
    lines = (CONF / file).read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))
    assert first.startswith("# "), f"conf/{file}: says {first!r} instead of what it is"


@pytest.mark.parametrize(
    ("name", "kind", "reads"),
    [
        ("nll", Nll, set()),
        ("kl_fwd", KlFwd, {"lam", "tau"}),
        ("kl_rev", KlRev, {"lam", "tau"}),
        ("wd", Wd, {"lam", "decay"}),
    ],
)
def test_knobs_reach_the_regularisers_that_read_them(name: str, kind: type[Regulariser], reads: set[str]) -> None:
    """Fields that a regulariser does not read do not change its key, so equivalent cells are computed once."""
    plain = composed(f"reg={name}").reg
    assert type(plain) is kind
    values: dict[str, object] = {"lam": 0.7, "tau": 0.02, "decay": "step"}
    for knob, value in values.items():
        turned = composed(f"reg={name}", f"{knob}={value}").reg
        assert (fingerprint(turned) != fingerprint(plain)) == (knob in reads), f"{name} and {knob}"
        if knob in reads:
            assert getattr(turned, knob) == value, f"{name} did not get {knob}"


def test_the_seed_preset_holds_the_seeds_values() -> None:
    exp = composed("experiment=original")
    assert isinstance(exp.reg, KlRev)
    assert (exp.reg.lam, exp.reg.tau, exp.lora.r, exp.lora.alpha) == (1.0, 0.5, 8, 16)
    assert (exp.heal.lr, exp.heal.epochs, exp.heal.batch_size, exp.heal.reference) == (1e-4, 2, 1, "base")
    decayed = composed("experiment=original", "reg=wd").reg
    assert isinstance(decayed, Wd)
    assert decayed.decay == "step"


def test_the_revised_preset_is_what_its_authors_moved_to() -> None:
    exp = composed("experiment=revised")
    assert isinstance(exp.reg, KlRev)
    assert (exp.reg.lam, exp.reg.tau, exp.lora.r, exp.lora.alpha) == (0.3, 2.0, 32, 64)
    assert (exp.heal.epochs, exp.heal.agg, exp.heal.reference) == (6, "rmse", "prev")


def test_a_sweep_over_ranks_compares_capacity() -> None:
    """The same scaling's numerator at every rank: with 2 r a larger rank is also a stronger heal (docs/heal.md)."""
    ranks = [composed(f"lora=r{r}").lora for r in (4, 8, 16, 32, 64)] + [composed("lora.r=24").lora]
    assert [one.alpha for one in ranks] == [32.0] * 6
    assert composed("lora=r16", "lora.lora_alpha=null").lora.fingerprint == ranks[2].fingerprint


def test_values_below_an_option_can_be_set() -> None:
    exp = composed("lora.r=24", "heal.lr=5e-4", "steer.layers=[1,3]", "filter=[length,repetition]")
    assert isinstance(exp.steer, Method)
    assert (exp.lora.r, exp.heal.lr, exp.steer.layers) == (24, 5e-4, (1, 3))
    assert set(exp.filter) == {"length", "repetition"}


def test_a_rank_is_called_by_its_number() -> None:
    ranks = {file.stem: holding(file).lora.r for file in FILES if file.parts[0] == "lora"}
    assert {f"r{rank}" for rank in ranks.values()} == set(ranks), "lora=r8 has rank 8"


@pytest.mark.parametrize(
    ("override", "field", "allowed"),
    [
        ("lam=-1", "lam=-1", "greater than or equal to 0"),
        ("lam=nan", "lam=nan", "finite"),
        ("lam=inf", "lam=inf", "finite"),
        ("tau=abc", "tau='abc'", "number"),
        ("lora.r=0", "lora.r=0", "greater than or equal to 1"),
        ("lora.target_modules=[]", "lora.target_modules=[]", "at least 1 item"),
        ("n_rounds=0", "n_rounds=0", "greater than or equal to 1"),
        ("n_rounds=1.5", "n_rounds=1.5", "integer"),
        ("seed=x", "seed='x'", "integer"),
        ("decay=daily", "decay='daily'", "'round' or 'step'"),
        ("heal.agg=sum", "heal.agg='sum'", "'mean', 'rmse', 'p95' or 'max'"),
        ("steer.layers=[0.9,0.2]", "steer.layers=[0.9, 0.2]", "0 <= from < to <= 1"),
        ("steer.layers=[2,2]", "steer.layers=[2, 2]", "distinct"),
        ("steer.layers=all", "steer.layers='all'", "a list"),
        ("dose.alpha=[]", "dose.alpha=[]", "at least 1 item"),
        ("dose.alpha=[0.5,-1]", "dose.alpha.1=-1", "greater than or equal to 0"),
        ("trait.generate=[]", "trait.generate=[]", "at least 1 item"),
        ("trait.held_out=[]", "trait.held_out=[]", "at least 1 item"),
        ("trait.probes=[]", "trait.probes=[]", "at least 1 item"),
        ("trait.probes=[{prompt: a, trait: b}]", "trait.probes.0", "counter is missing"),
        ("trait.narration=['(']", "trait.narration.0='('", "regular expression"),
        ("filter.refusal.patterns=['(']", "filter.refusal.patterns.0='('", "regular expression"),
        ("contexts.prompts=[]", "contexts.prompts=[]", "at least 2 items"),
        ("eval.damage.texts=[]", "eval.damage.texts=[]", "at least 1 item"),
        ("eval=[trait]", "eval", "write 'eval=[trait,damage,text]'"),
        ("heal.n_keep=8", "heal", "n_keep=8 is at least its min_train=16"),
        ("trait.generate=[a]", "configuration", "at least heal.min_train=16 completions, not 12"),
        ("seed=3000000000", "seed=3000000000", "less than 2147483648"),
        ("model.dtype=int8", "model.dtype='int8'", "'float32' or 'bfloat16'"),
        ("runtime.threads=some", "runtime.threads='some'", "integer or must be 'auto'"),
        ("runtime.threads=0", "runtime.threads=0", "greater than or equal to 1"),
        ("model=hub", "model.id", "missing"),
        ("lam=${nowhere}", "lam", "nowhere"),
        ("+heal.learning_rate=1", "heal.learning_rate=1", "there are name, lr, warmup"),
        ("+strength=1", "strength=1", "there are model, contexts, trait"),
        ("reg.name=kl_fwd", "reg.name='kl_fwd'", "'kl_rev'"),
        ("reg._target_=os.system", "reg._target_: 'os.system'", "below steer_heal"),
        ("reg._target_=steer_heal_evil.Reg", "reg._target_: 'steer_heal_evil.Reg'", "below steer_heal"),
        ("reg._target_=steer_heal.config.build", "reg._target_: 'steer_heal.config.build'", "subclass of Config"),
        ("reg._target_=steer_heal.store.Store", "reg._target_: 'steer_heal.store.Store'", "subclass of Config"),
        ("reg._target_=steer_heal.reg.kl.Kl", "reg._target_: 'steer_heal.reg.kl.Kl'", "does not exist"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(override: str, field: str, allowed: str) -> None:
    """The line names the field, what was given and what is allowed."""
    with pytest.raises(ConfigError) as refused:
        composed(override)
    message = str(refused.value)
    assert "\n" not in message
    assert field in message
    assert allowed in message
    assert len(message) < 400, "a line that a person reads"


def test_no_code_of_a_foreign_target_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose name merely begins like ours is not imported."""
    (tmp_path / "steer_healer.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="not allowed"):
        composed("reg._target_=steer_healer.Thing")


def test_an_unknown_preset_is_refused() -> None:
    """A misspelt preset must not run the defaults instead."""
    from hydra.errors import MissingConfigException

    with pytest.raises(MissingConfigException, match="experiment/sede"):
        composed("experiment=sede")


def test_options_are_frozen() -> None:
    exp = composed()
    with pytest.raises(ValueError, match="frozen"):
        exp.heal.lr = 1.0
