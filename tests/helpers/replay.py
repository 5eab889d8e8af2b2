"""Runs of the loop that compute keys only."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from helpers.vectors import kept_file
from steer_heal.artifacts import Completions
from steer_heal.config import build
from steer_heal.experiment import Experiment
from steer_heal.filter import likelihoods
from steer_heal.heal.reference import reference_states
from steer_heal.lm.kl import answer_states
from steer_heal.loop import run
from steer_heal.main import CONF
from steer_heal.stages import FIRST_TRIAL
from steer_heal.store import Artifact, Store, stage_name
from steer_heal.store.keys import key_of
from steer_heal.tracker.jsonl import JsonlConfig

ROUNDS = 2
NEEDS = {  # what an option cannot do without, or what ends its search at once: no student gains so much
    "steer=file": [f"steer.path={kept_file()}"],
    "match=gate": ["match.at=1000"],
}
Keys = dict[str, str]  # of every call of a stage, by its label


@functools.cache
def chosen(*choices: str) -> DictConfig:
    """The tiny experiment with options chosen, composed once each, since composing is slow."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", ["experiment=tiny", *choices])
    OmegaConf.set_struct(cfg, False)
    return cfg


@functools.cache
def two_rounds(*overrides: str) -> Experiment:
    """The tiny experiment with options chosen and values set, as on a command line, but values are YAML."""
    choices = [override for override in overrides if (CONF / override.partition("=")[0]).is_dir()]
    cfg = copy.deepcopy(chosen(*choices))
    needed = [value for choice in choices for value in NEEDS.get(choice, [])]
    values = [override for override in overrides if override not in choices]
    cfg.merge_with_dotlist([f"n_rounds={ROUNDS}", *needed, *values])
    experiment = build(cfg)
    assert isinstance(experiment, Experiment)
    return experiment


class Labels:
    """Names for the calls of a run: model, stage and round, such as `healed.eval.text 0`."""

    def __init__(self, exp: Experiment) -> None:
        self.exp, self.of_key, self.keys = exp, dict[str, str](), Keys()

    def name(self, stage: str, what: tuple[Any, ...]) -> str:
        if stage == "generate.generate":
            _, student, _, prompts, vector, *_ = what
            if what[7:8] == (FIRST_TRIAL,):
                return "trial.answers"
            who = "base" if not student.history else "healed"
            return f"{who if vector is None else 'steered' if prompts == self.exp.trait.held_out else 'train'}.answers"
        if stage == "eval.evaluate":
            option, subject, _ = what
            who = "steered" if subject.vector is not None else "healed" if subject.student.history else "base"
            who = who if subject.student.gate == 1 else "gated"
            return f"{who}.eval.{option.name}"
        if stage == "apart.strength":
            return "trial.strength"
        if stage in ("filter.likelihoods", "filter.sift"):
            completions = what[0] if stage == "filter.likelihoods" else what[1][0]
            who = self.of_key[completions.key].partition(".")[0].replace("steered", "held")
            return f"{who}.{'scored' if stage == 'filter.likelihoods' else 'filtered'}"
        return {"steer.extract": "extract", "heal.heal": "heal", "heal.drift.drift": "drift"}[stage]

    def add(self, stage: str, what: tuple[Any, ...], key: str) -> str:
        name = self.name(stage, what)
        again = stage == "filter.likelihoods" or name.startswith("healed.eval")
        if again and key in self.of_key:  # asked for again, by another evaluation, or as a gate of 1
            return next(label for label, other in self.keys.items() if other == key)
        label = f"{name} {sum(other.split()[0] == name for other in self.keys)}"
        self.of_key[key], self.keys[label] = label, key
        return label


class Recording(Store):
    """A store that remembers what it returned, by label."""

    def __init__(self, root: Path, exp: Experiment) -> None:
        super().__init__(root)
        self.labels, self.made = Labels(exp), dict[str, Artifact]()

    def __call__(self, stage: Any, *what: Any, **how: Any) -> Any:  # type: ignore[override]
        artifact = super().__call__(stage, *what, **how)
        inside = stage is likelihoods and self.labels.of_key[what[0].key].startswith(("base", "healed"))
        if not inside and stage not in (
            reference_states,
            answer_states,
        ):  # which a replay never asks for
            self.made[self.labels.add(stage_name(stage), what, artifact.key)] = artifact
        return artifact


class Replaying:
    """A store that computes only keys, and returns what an earlier run made at the same place."""

    def __init__(self, made: dict[str, Artifact], exp: Experiment) -> None:
        self.made, self.labels = made, Labels(exp)

    def __call__(self, stage: Any, *what: Any, **how: Any) -> Any:
        key, _ = key_of(stage_name(stage), what)
        label = self.labels.add(stage_name(stage), what, key)
        name, k = label.split()
        if name.startswith("trial"):
            return dataclasses.replace(self.trial(name, what), key=key)
        made = self.made[f"{name.replace('gated', 'healed')} {min(int(k), ROUNDS - 1)}"]
        return dataclasses.replace(self.altered(label, made, what), key=key)

    def log_served(self) -> None:
        """Log nothing: every result is served."""

    def trial(self, name: str, what: tuple[Any, ...]) -> Any:
        """Trials for a search: two answers that pass every filter, with the divergence of the baseline's answers."""
        if name == "trial.answers":
            rows = cast(Completions, self.made["train.answers 0"]).rows[:2]
            return Completions(rows=tuple(dataclasses.replace(row, dose=what[5][0]) for row in rows))
        if name == "trial.filtered":
            return what[1][0]
        return self.made["train.scored 0" if name == "trial.scored" else "steered.eval.strength 0"]

    def altered(self, label: str, made: Any, what: tuple[Any, ...]) -> Any:
        """Replace the doses by those now requested."""
        if "answers" in label:
            asked = dict(zip(dict.fromkeys(row.dose for row in made.rows), what[5], strict=False))
            rows = tuple(dataclasses.replace(row, dose=asked[row.dose]) for row in made.rows)
            return dataclasses.replace(made, rows=rows)
        if "filtered" in label:
            pairs = zip(made.rows, what[1][0].rows, strict=True)
            return Completions(rows=tuple(dataclasses.replace(row, dose=given.dose) for row, given in pairs))
        return made


def replayed(baseline: Recording, folder: Path, exp: Experiment, kind: type[Replaying] = Replaying) -> Keys:
    """The keys of a run that computes nothing."""
    store: Any = kind(baseline.made, exp)
    with JsonlConfig(name="jsonl").open(folder, config={}, group=None, run_name="replay") as tracker:
        run(exp, store, tracker)
    return store.labels.keys
