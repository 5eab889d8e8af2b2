"""What a change computes again: a table of every field, against the stages that can read it and what follows them.

The loop runs once for real. For every change it runs again on a store that computes keys as ever, but gives back what
the first run made; so a stage counts as rerun if its key is a new one. A value that a stage's code turns into another
value does not change here, only keys do, with one exception: doses, which answers copy from what they are asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from steer_heal.artifacts import Completions
from steer_heal.config import Config, build
from steer_heal.eval.damage import SoundText
from steer_heal.experiment import Experiment
from steer_heal.loop import run
from steer_heal.main import CONF
from steer_heal.model import ModelConfig
from steer_heal.store import Artifact, Store, stage_name
from steer_heal.store.keys import VERSIONS, fingerprint, key_of
from steer_heal.tracking import JsonlConfig
from steer_heal.trait import Probe

ROUNDS = 2
Keys = dict[str, str]  # of every call of a stage, by its label


@functools.cache
def chosen(*choices: str) -> DictConfig:
    """The tiny experiment with options chosen, composed once each: that is what takes long."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", ["experiment=tiny", *choices])
    OmegaConf.set_struct(cfg, False)
    return cfg


@functools.cache
def two_rounds(*overrides: str) -> Experiment:
    """The tiny experiment with options chosen and values set, as on a command line, but values are YAML."""
    choices = [override for override in overrides if (CONF / override.partition("=")[0]).is_dir()]
    cfg = copy.deepcopy(chosen(*choices))
    cfg.merge_with_dotlist([f"n_rounds={ROUNDS}", *(override for override in overrides if override not in choices)])
    experiment = build(cfg)
    assert isinstance(experiment, Experiment)
    return experiment


class Labels:
    """Names for the calls of a run: what is done for whom, and in which round. `healed.eval.text 0`."""

    def __init__(self, exp: Experiment) -> None:
        self.exp, self.of_key, self.keys = exp, dict[str, str](), Keys()

    def name(self, stage: str, what: tuple[Any, ...]) -> str:
        if stage == "generate.generate":
            _, student, _, prompts, vector, *_ = what
            who = "base" if not student.history else "healed"
            return f"{who if vector is None else 'steered' if prompts == self.exp.trait.held_out else 'train'}.answers"
        if stage == "eval.evaluate":
            option, subject, _ = what
            who = "steered" if subject.vector is not None else "healed" if subject.student.history else "base"
            return f"{who}.eval.{option.name}"
        if stage in ("filter.likelihoods", "filter.sift"):
            completions = what[0] if stage == "filter.likelihoods" else what[1]
            who = "train" if self.of_key[completions.key].startswith("train") else "held"
            return f"{who}.{'scored' if stage == 'filter.likelihoods' else 'sifted'}"
        return {"steer.extract": "extract", "heal.heal": "heal"}[stage]

    def add(self, stage: str, what: tuple[Any, ...], key: str) -> str:
        name = self.name(stage, what)
        label = f"{name} {sum(other.split()[0] == name for other in self.keys)}"
        self.of_key[key], self.keys[label] = label, key
        return label


class Recording(Store):
    """A store that remembers what it gave, by label."""

    def __init__(self, root: Path, exp: Experiment) -> None:
        super().__init__(root)
        self.labels, self.made = Labels(exp), dict[str, Artifact]()

    def __call__(self, stage: Any, *what: Any, **how: Any) -> Any:
        artifact = super().__call__(stage, *what, **how)
        self.made[self.labels.add(stage_name(stage), what, artifact.key)] = artifact
        return artifact


class Replaying:
    """A store that computes nothing but keys, and gives what an earlier run made at the same place."""

    def __init__(self, made: dict[str, Artifact], exp: Experiment) -> None:
        self.made, self.labels = made, Labels(exp)

    def __call__(self, stage: Any, *what: Any, **how: Any) -> Any:
        key, _ = key_of(stage_name(stage), what)
        label = self.labels.add(stage_name(stage), what, key)
        name, k = label.split()
        made = self.made[f"{name} {min(int(k), ROUNDS - 1)}"]
        return dataclasses.replace(self.altered(label, made, what), key=key)

    def altered(self, label: str, made: Any, what: tuple[Any, ...]) -> Any:
        """With the doses that answers are asked for now."""
        if "answers" in label:
            asked = dict(zip(dict.fromkeys(row.dose for row in made.rows), what[5], strict=False))
            return Completions(rows=tuple(dataclasses.replace(row, dose=asked[row.dose]) for row in made.rows))
        if "sifted" in label:
            pairs = zip(made.rows, what[1].rows, strict=True)
            return Completions(rows=tuple(dataclasses.replace(row, dose=given.dose) for row, given in pairs))
        return made


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Two rounds of the tiny experiment, for real."""
    folder = tmp_path_factory.mktemp("baseline")
    store = Recording(folder / "store", two_rounds())
    with JsonlConfig(name="jsonl").open(folder, config={}, group=None, run_name="baseline") as tracker:
        run(two_rounds(), store, tracker)
    return store


def replayed(baseline: Recording, folder: Path, exp: Experiment, kind: type[Replaying] = Replaying) -> Keys:
    """The keys of a run that computes nothing."""
    store: Any = kind(baseline.made, exp)
    with JsonlConfig(name="jsonl").open(folder, config={}, group=None, run_name="replay") as tracker:
        run(exp, store, tracker)
    return store.labels.keys


def reads(rounds: int = ROUNDS) -> dict[str, set[str]]:
    """What each stage is given of what other stages made: the signatures, and who fills them in the loop."""
    graph: dict[str, set[str]] = {}

    def examined(who: str, k: int, subject: set[str]) -> None:
        graph[f"{who}.answers {k}"] = graph[f"{who}.eval.trait {k}"] = graph[f"{who}.eval.damage {k}"] = subject
        graph[f"{who}.eval.text {k}"] = subject | {f"{who}.answers {k}"}

    examined("base", 0, set())
    for k in range(rounds):
        student = {f"heal {j}" for j in range(k)}
        graph[f"extract {k}"] = student
        graph[f"train.answers {k}"] = steered = student | {f"extract {k}"}
        examined("steered", k, steered)  # the dose is a number, not a result
        for who, answers in (("train", f"train.answers {k}"), ("held", f"steered.answers {k}")):
            graph[f"{who}.scored {k}"] = {answers}
            graph[f"{who}.sifted {k}"] = {answers, f"{who}.scored {k}"}
        graph[f"heal {k}"] = student | {f"train.sifted {k}", f"held.sifted {k}"}
        examined("healed", k, student | {f"heal {k}"})
    return graph


def affected(first: set[str], rounds: int = ROUNDS) -> set[str]:
    """Those stages, named with or without a round, and all that is made from their results."""
    graph = reads(rounds)
    found = {label for label in graph if label in first or label.split()[0] in first}
    while more := {label for label, given in graph.items() if given & found} - found:
        found |= more
    return found


# Who can read what: the arguments that the loop hands to the stages.
NOTHING: set[str] = set()
EXTRACT, HEAL = {"extract"}, {"heal"}
HELD_OUT = {"base.answers", "steered.answers", "healed.answers"}
ANSWERS = HELD_OUT | {"train.answers"}
SCORED, SIFTED = {"train.scored", "held.scored"}, {"train.sifted", "held.sifted"}
EVALS = {name: {f"{who}.eval.{name}" for who in ("base", "steered", "healed")} for name in ("trait", "damage", "text")}
ALL_EVALS = EVALS["trait"] | EVALS["damage"] | EVALS["text"]
MODEL = EXTRACT | ANSWERS | SCORED | ALL_EVALS | HEAL
STEERED = {"steered.answers", "steered.eval.trait", "steered.eval.damage", "steered.eval.text"}

# Override -> the stages that can read the field, under the tiny experiment and under some other choices. The expected
# set is these and what follows from them.
TABLE: dict[str, dict[str, set[str]]] = {
    "": {
        "model.dtype=bfloat16": MODEL,
        "model.attn_implementation=eager": MODEL,
        "model.init_seed=1": MODEL,
        "model.note=other": NOTHING,
        "contexts.name=other": NOTHING,
        "contexts.prompts=[Name a bird,Name a fish]": EXTRACT,
        "trait.name=other": NOTHING,
        "trait.positive=Be kind": EXTRACT | SCORED,
        "trait.negative=Be cold": EXTRACT | SCORED,
        "trait.neutral=Be": ANSWERS | EVALS["trait"] | EVALS["damage"],
        "trait.generate=[a,b,c,d,e,f,g,h]": {"train.answers"},
        "trait.held_out=[a,b]": HELD_OUT,
        "trait.probes=[{prompt: a, trait: b, counter: c}]": EVALS["trait"],
        "trait.narration=[persona]": SIFTED,
        "steer.layers=[0,3]": EXTRACT,
        "dose.alpha=[0.5,0.9]": {"train.answers"} | STEERED,  # at the mean dose
        "generate.name=other": NOTHING,
        "generate.max_new_tokens=5": ANSWERS,
        "generate.n_samples=2": ANSWERS,
        "generate.temperature=0.9": ANSWERS,
        "generate.top_k=49": ANSWERS,
        "generate.top_p=0.8": ANSWERS,
        "filter.perplexity.max=9e5": SIFTED,
        "filter.perplexity.tail=0.4": SIFTED,
        "filter.repetition.max=0.3": SIFTED,
        "filter.narration.max=1": SIFTED,
        "filter.refusal.opening=100": SIFTED,
        "filter.refusal.patterns=[decline]": SIFTED,
        "filter.length.min=2": SIFTED,
        "filter=[length,perplexity]": SIFTED,
        "reg.lam=0.7": HEAL,
        "reg.tau=0.1": HEAL,
        "reg=nll": HEAL,
        "reg=kl_fwd": HEAL,
        "reg=wd": HEAL,
        "lora.name=other": NOTHING,
        "lora.r=8": HEAL,
        "lora.lora_alpha=4": HEAL,
        "lora.lora_alpha=8": NOTHING,  # 2 r, as it was
        "lora.target_modules=[q_proj,v_proj]": HEAL,
        "heal.name=other": NOTHING,
        "heal.lr=0.02": HEAL,
        "heal.warmup=0.2": HEAL,
        "heal.epochs=1": HEAL,
        "heal.steps=4": HEAL,
        "heal.batch_size=4": HEAL,
        "heal.max_len=500": HEAL,
        "heal.n_keep=31": HEAL | {"train.sifted"},
        "heal.n_keep=null": HEAL | {"train.sifted"},
        "heal.min_train=17": NOTHING,
        "heal.agg=max": HEAL,
        "heal.reference=prev": {"heal 1"},  # in round 0 they are the same
        "heal.measure_every=3": HEAL,
        "eval.damage.texts=[{request: a, text: some text}]": EVALS["damage"],
        "eval.text.max_perplexity=11": EVALS["text"],
        "eval.text.max_repetition=0.3": EVALS["text"],
        "runtime.name=other": NOTHING,
        "runtime.store=elsewhere": NOTHING,
        "runtime.micro_batch=3": NOTHING,
        "runtime.score_batch=3": NOTHING,
        "runtime.generate_batch=3": NOTHING,
        "runtime.head_chunk=3": NOTHING,
        "runtime.threads=1": NOTHING,
        "tracker=wandb": NOTHING,
        "lam=0.7": HEAL,
        "tau=0.1": HEAL,
        "decay=step": NOTHING,
        "seed=1": ANSWERS | SIFTED | HEAL,
        "n_rounds=1": NOTHING,
        "min_coherence=1": NOTHING,
    },
    "reg=nll": {"lam=0.7": NOTHING, "tau=0.1": NOTHING, "decay=step": NOTHING, "heal.agg=max": HEAL},
    "reg=kl_fwd": {"lam=0.7": HEAL, "tau=0.1": HEAL, "decay=step": NOTHING, "reg.lam=0.7": HEAL, "reg.tau=0.1": HEAL},
    "reg=wd": {"lam=0.7": HEAL, "tau=0.1": NOTHING, "decay=step": HEAL, "reg.lam=0.7": HEAL, "reg.decay=step": HEAL},
    "heal.steps=4": {"heal.epochs=1": NOTHING, "heal.batch_size=4": HEAL, "heal.steps=5": HEAL},
    "heal.reference=prev": {"heal.lr=0.02": HEAL},
    "n_rounds=1": {"heal.reference=prev": NOTHING},
    "lora.target_modules=[q_proj,v_proj]": {"lora.target_modules=[v_proj,q_proj,q_proj]": NOTHING},
    "tracker=wandb": {
        "tracker.project=other": NOTHING,
        "tracker.entity=other": NOTHING,
        "tracker.mode=offline": NOTHING,
        "tracker.tags=[other]": NOTHING,
    },
}  # fmt: skip
ROWS = [(under, override) for under, rows in TABLE.items() for override in rows]


def changed(before: Keys, after: Keys) -> set[str]:
    """The calls of the second run whose results are not there after the first."""
    return {label for label, key in after.items() if key not in before.values()}


def assert_reruns(found: set[str], expected: set[str], what: str) -> None:
    assert found == expected, (
        f"{what} reruns too much: {sorted(found - expected)}; too little: {sorted(expected - found)}"
    )


def test_the_replay_gives_the_keys_of_the_run(baseline: Recording, tmp_path: Path) -> None:
    """Reference: the store itself, and the graph that the table builds on."""
    keys = replayed(baseline, tmp_path, two_rounds())
    assert keys == baseline.labels.keys, "the replay has other keys than the run"
    assert keys.keys() == reads().keys(), f"unknown or missing calls: {sorted(keys.keys() ^ reads().keys())}"
    assert len(set(keys.values())) == len(keys), "two calls share a key, so a rerun of one may go unseen"


@pytest.mark.parametrize(("under", "override"), ROWS, ids=lambda text: text[:40] or "tiny")
def test_a_change_reruns_what_can_read_it(baseline: Recording, tmp_path: Path, under: str, override: str) -> None:
    """Reference: the table, and what is made from the results of those stages."""
    given = [under] if under else []
    before = replayed(baseline, tmp_path, two_rounds(*given))
    after = replayed(baseline, tmp_path, two_rounds(*given, override))
    assert_reruns(changed(before, after), affected(TABLE[under][override]), f"{override} under {under or 'tiny'}")


EXAMINED = {f"{what} 0" for what in ("healed.answers", "healed.eval.trait", "healed.eval.damage", "healed.eval.text")}
AFTER_TRAINING = {"heal 0"} | EXAMINED


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("heal.lr=0.02", AFTER_TRAINING),
        ("filter.length.min=2", {"train.sifted 0", "held.sifted 0"} | AFTER_TRAINING),
        ("trait.generate=[a,b,c,d,e,f,g,h]", {"train.answers 0", "train.scored 0", "train.sifted 0"} | AFTER_TRAINING),
        ("trait.held_out=[a,b]", {
            "base.answers 0", "base.eval.text 0", "steered.answers 0", "steered.eval.text 0",
            "held.scored 0", "held.sifted 0"} | AFTER_TRAINING),
        ("contexts.prompts=[a,b]", {label for label in reads(1) if not label.startswith("base")}),
        ("eval.text.max_repetition=0.3", {"base.eval.text 0", "steered.eval.text 0", "healed.eval.text 0"}),
    ],
)  # fmt: skip
def test_one_round_by_hand(baseline: Recording, tmp_path: Path, override: str, expected: set[str]) -> None:
    """Reference: the sets written out, so that the table's "and what follows" is itself checked."""
    before = replayed(baseline, tmp_path, two_rounds("n_rounds=1"))
    after = replayed(baseline, tmp_path, two_rounds("n_rounds=1", override))
    assert_reruns(changed(before, after), expected, override)


def test_more_rounds_rerun_none_of_the_first(baseline: Recording, tmp_path: Path) -> None:
    """Reference: all calls of the third round, and no other."""
    after = replayed(baseline, tmp_path, two_rounds("n_rounds=3"))
    assert_reruns(changed(baseline.labels.keys, after), {x for x in reads(3) if x.endswith(" 2")}, "n_rounds=3")


class Choosy(Replaying):
    """Another filter keeps other rows: those at the highest dose."""

    def altered(self, label: str, made: Any, what: tuple[Any, ...]) -> Any:
        made = super().altered(label, made, what)
        if "train.sifted" not in label:
            return made
        most = max(row.dose for row in made.rows)
        kept = tuple(dataclasses.replace(row, kept=row.kept and row.dose == most) for row in made.rows)
        return Completions(rows=kept)


def test_what_is_kept_decides_the_dose_of_the_steered_figures(baseline: Recording, tmp_path: Path) -> None:
    """Reference: steered figures are at the mean dose of what was kept, and of the sifting read nothing else."""
    few = ("heal.min_train=1", "filter.length.min=2")
    after = replayed(baseline, tmp_path, two_rounds(*few), Choosy)
    assert_reruns(changed(baseline.labels.keys, after), affected(SIFTED | STEERED), "another mean dose")


def test_a_real_run_agrees(baseline: Recording, tmp_path: Path) -> None:
    """Reference: the stages that a real store computes; how it is carried out takes no part."""
    for overrides, expected in ((("runtime.micro_batch=3", "seed=0"), 0), (("eval.text.max_perplexity=11",), 5)):
        store = Store(baseline.root)
        with JsonlConfig(name="jsonl").open(tmp_path, config={}, group=None, run_name="again") as tracker:
            run(two_rounds(*overrides), store, tracker)
        assert store.computed == ["eval.evaluate"] * expected, f"{overrides}: computed {store.computed}"


def test_auto_is_the_device_that_it_finds(baseline: Recording, tmp_path: Path) -> None:
    """Reference: on a machine with nothing but a CPU the same as cpu, and otherwise another one."""
    exp = two_rounds("model.device=auto")
    expected = set() if exp.model.torch_device().type == "cpu" else affected(MODEL)
    assert_reruns(changed(baseline.labels.keys, replayed(baseline, tmp_path, exp)), expected, "model.device=auto")


VERSIONED = {
    "steer.extract": EXTRACT, "generate.generate": ANSWERS, "filter.likelihoods": SCORED, "filter.sift": SIFTED,
    "heal.heal": HEAL, "eval.evaluate": ALL_EVALS,
}  # fmt: skip


@pytest.mark.parametrize("stage", VERSIONED)
def test_a_new_version_reruns_its_stage_and_what_follows(
    baseline: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Reference: the calls of that stage, and what is made from their results."""
    monkeypatch.setitem(VERSIONS, stage, VERSIONS.get(stage, 1) + 1)
    after = replayed(baseline, tmp_path, two_rounds())
    assert_reruns(changed(baseline.labels.keys, after), affected(VERSIONED[stage]), f"another version of {stage}")


def test_versions_are_of_stages_that_exist() -> None:
    """Reference: the stages of the loop; a misspelt one would change nothing, silently."""
    assert VERSIONS.keys() <= VERSIONED.keys(), f"no such stages: {VERSIONS.keys() - VERSIONED.keys()}"


def fixed(kind: type[Config], field: str) -> bool:
    """Whether a field admits one value only, as an option's name does."""
    annotation = kind.model_fields[field].annotation
    return typing.get_origin(annotation) is Literal and len(typing.get_args(annotation)) == 1


def fields(exp: Experiment) -> Iterator[tuple[str, type[Config], str]]:
    """Path, class and name of every field that can be changed, of the experiment and of all its options."""

    def below(option: Config, path: str) -> Iterator[tuple[str, type[Config], str]]:
        for name in type(option).model_fields:
            value, here = getattr(option, name), f"{path}{name}"
            members = value if isinstance(value, dict) else {}
            if isinstance(value, Config):
                yield from below(value, f"{here}.")
            elif not members and not fixed(type(option), name):
                yield here, type(option), name
            for member, inner in members.items():
                yield from below(inner, f"{here}.{member}.")

    return below(exp, "")


def covered() -> set[tuple[type[Config], str]]:
    """The fields that have a row, as class and name."""
    found = {(kind, name) for path, kind, name in fields(two_rounds()) if path == "model.device"}  # has its own test
    for under, rows in TABLE.items():
        paths = {override.partition("=")[0] for override in rows}
        exp = two_rounds(*([under] if under else []))
        found |= {(kind, name) for path, kind, name in fields(exp) if path in paths}
    return found


def test_every_field_has_a_row() -> None:
    """Reference: the classes of the options, those of the tiny experiment and all that conf/ has."""
    have = covered()
    missing = [path for path, kind, name in fields(two_rounds()) if (kind, name) not in have]
    assert not missing, f"the table has no row for {', '.join(missing)}"
    for file in sorted(CONF.glob("*/*.yaml")):
        target = OmegaConf.load(file).get("_target_")
        kind: Any = get_class(target) if target else None
        if kind is None or issubclass(kind, ModelConfig):  # presets are made of the others; models follow below
            continue
        missing = [name for name in kind.model_fields if (kind, name) not in have and not fixed(kind, name)]
        assert not missing, f"{file.relative_to(CONF)}: the table has no row under it for {', '.join(missing)}"


def other_values(folder: Path) -> dict[str, Any]:
    """Another value for every field of a model option."""
    (folder / "template.jinja").write_text("template")
    return {
        "name": "other", "note": "other", "dtype": "float32", "device": "cpu", "attn_implementation": "eager",
        "id": "owner/other", "revision": "other", "chat_template": folder / "template.jinja", "init_seed": 1,
    }  # fmt: skip


@pytest.mark.parametrize("model", sorted(path.stem for path in CONF.glob("model/*.yaml")))
def test_every_field_of_a_model_but_name_and_note_is_part_of_it(model: str, tmp_path: Path) -> None:
    """Reference: the fields of the class. No weights are loaded."""
    given = ["model.dtype=bfloat16", "model.device=auto", *(["model.id=owner/name"] if model == "hub" else [])]
    option, others = two_rounds(f"model={model}", *given).model, other_values(tmp_path)
    missing = type(option).model_fields.keys() - others.keys()
    assert not missing, f"no other value for {sorted(missing)} of model={model}"
    for field in type(option).model_fields:
        other = option.model_copy(update={field: others[field]})
        same = other.fingerprint == option.fingerprint
        assert same == (field in ("name", "note")), f"model.{field} {'does not count' if same else 'counts'}"


@pytest.mark.parametrize("item", [Probe(prompt="p", trait="t", counter="c"), SoundText(request="r", text="text")])
def test_every_field_of_data_in_lists_counts(item: Config) -> None:
    """Reference: the fields of the class."""
    for field in type(item).model_fields:
        assert item.model_copy(update={field: "other"}).fingerprint != item.fingerprint, f"{field} does not count"


SAME = [
    (("lora=r16",), ("lora=r8", "lora.r=16")),
    (("lora=r16",), ("lora=r16", "lora.lora_alpha=32")),
    (("lora=r16",), ("lora=r4", "lora.r=16", "lora.lora_alpha=32.0", "lora.name=mine")),
    (("reg=kl_rev", "lam=0.7"), ("reg=kl_rev", "reg.lam=0.7")),
    (("heal.lr=1e-3",), ("heal.lr=0.001",)),
    (("dose.alpha=[1,2]",), ("dose.alpha=[1.0,2.0]",)),
    (("filter=[length,perplexity]",), ("filter=[perplexity,length]",)),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=str)
def test_the_same_thing_said_otherwise_is_found(
    baseline: Recording, tmp_path: Path, one: tuple[str, ...], other: tuple[str, ...]
) -> None:
    """Reference: the keys of the first way to say it."""
    keys = [replayed(baseline, tmp_path, two_rounds(*said)) for said in (one, other)]
    assert_reruns(changed(*keys), set(), f"{other} after {one}")


def imported(path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's regulariser, out of a file that says `source`."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("users_own", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "users_own", module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # sources of one length and second look the same to Python
    spec.loader.exec_module(module)
    return module.Own(name="own")


OWN = """
from steer_heal.reg import Regulariser

class Own(Regulariser):
    def shrink(self, lr: float, lr_sum: float) -> float:
        return 0.9
"""


def test_a_users_regulariser_is_another_once_its_source_changes(
    baseline: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the same file again, and with another number in it; the heal reruns and what follows."""
    sources = (OWN, OWN, OWN.replace("0.9", "0.8"))
    own = [imported(tmp_path / "users_own.py", source, monkeypatch) for source in sources]
    prints = []
    for option, source in zip(own, sources, strict=True):
        imported(tmp_path / "users_own.py", source, monkeypatch)
        prints.append(fingerprint(option))
    assert prints[0] == prints[1] != prints[2], f"fingerprints {prints}"
    keys = [replayed(baseline, tmp_path, two_rounds().model_copy(update={"reg": option})) for option in own]
    assert_reruns(changed(keys[0], keys[1]), set(), "the same source")
    assert_reruns(changed(keys[0], keys[2]), affected(HEAL), "another source")
