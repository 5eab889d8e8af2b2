"""The typed root of the configuration, composed from `conf/config.yaml` and the command line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from steer_heal.config import Config, ConfigError
from steer_heal.contexts import Contexts
from steer_heal.dose import Dose
from steer_heal.eval import Column, Evaluation
from steer_heal.filter import Filter
from steer_heal.generate import Sampling
from steer_heal.heal import Heal
from steer_heal.lm.chat import Chat
from steer_heal.lm.limits import Limits
from steer_heal.lora import Lora
from steer_heal.match import Match
from steer_heal.model import ModelConfig
from steer_heal.reg import Regulariser, Tau
from steer_heal.runtime import Runtime
from steer_heal.steer import Teacher
from steer_heal.store.keys import fingerprint
from steer_heal.tracker import TrackerConfig
from steer_heal.trait import Trait

REQUIRED = ("trait", "damage", "text")  # evaluations that every table reads


_fitting: set[str] = set()  # what was checked in this process


class Experiment(Config, key="steer_heal.experiment.Experiment"):
    """One cell of a sweep."""

    model: SerializeAsAny[ModelConfig]
    contexts: Contexts
    trait: Trait
    steer: SerializeAsAny[Teacher]
    dose: SerializeAsAny[Dose]
    generate: Sampling
    filter: dict[str, SerializeAsAny[Filter]] = Field(default_factory=dict)  # filter=[] composes to nothing
    reg: SerializeAsAny[Regulariser]
    lora: Lora
    heal: Heal
    eval: dict[str, SerializeAsAny[Evaluation]] = Field(default_factory=dict, validate_default=True)
    match: SerializeAsAny[Match]
    tracker: SerializeAsAny[TrackerConfig]
    runtime: Runtime
    lam: float = Field(ge=0)  # strength, read by the regularisers that have one
    tau: Tau  # nats of divergence that are free, or the percentile that fixes them; read by the barriers
    decay: Literal["round", "step"]  # meaning of lam for weight decay
    seed: int = Field(ge=0, lt=2**31)  # draws contexts and prompts; of every noise, initialisation and order
    n_rounds: int = Field(ge=1)
    min_coherence: float = Field(ge=0, le=1)  # stop after a round whose healed answers fall below it

    @property
    def columns(self) -> tuple[Column, ...]:
        """The figures of all evaluations, in the order of `eval`."""
        return tuple(column for option in self.eval.values() for column in option.columns)

    def key_fields(self) -> dict[str, Any]:
        """Fields that determine the cell's figures: not where it runs and logs, nor knobs that no option reads."""
        unread = {"tracker", "runtime", "lam", "tau", "decay"}
        decisive = {field: value for field, value in super().key_fields().items() if field not in unread}
        decisive["top_ups"] = self.heal.top_ups
        decisive["n_prompts"] = len(self.trait.draw(self.generate.n_prompts, self.seed))
        if self.n_rounds > 1:  # a later round may start from another reference, and ends the run if too little is kept
            decisive |= {"reference": self.heal.reference, "min_train": self.heal.min_train}
        if self.heal.top_ups and self.heal.n_keep is None:  # then min_train decides how many answers are drawn
            decisive["min_train"] = self.heal.min_train
        return decisive

    def preparation_key(self) -> list[Any]:
        """Values that `prepare` uses: of cells with equal values only one needs to be prepared."""
        teacher = fingerprint(self.steer) if self.steer.needs_model else None
        texts = [fingerprint(option) for option in (self.trait, self.contexts, *self.eval.values())]
        length = self.generate.max_new_tokens
        return [fingerprint(self.model), teacher, self.lora.target_modules, self.lora.first, *texts, length]

    def prepare(self, here: bool = True) -> None:
        """Ensure that the model is on disk and that the options fit it; no weights are loaded. Raises ConfigError.

        `here`: whether the cell will run on this machine, which must then have the device.
        """
        if here:
            self.model.torch_device()
        self.model.prepare()
        self.check_model()

    def check_model(self) -> None:
        """Raise ConfigError for options that do not fit the model on disk."""
        chat = self.model.conversations()
        if chat is None and not self.steer.needs_model and self.lora.target_modules == "all-linear":
            return
        key = json.dumps([self.preparation_key(), self.model.identity()], sort_keys=True)
        if key in _fitting:  # a preview and every cell ask again
            return
        skeleton = self.model.skeleton()
        try:
            self.steer.check_model(skeleton)
            self.lora.check_fits(skeleton)
            limits = Limits.of(skeleton)
        except ConfigError:
            raise
        except Exception as error:  # somebody else's code, tried for the first time: it may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            raise ConfigError(
                f"model: {type(skeleton).__name__} is not built as models here must be: {reason}"
            ) from error
        if chat is not None:
            limits.check_ends(skeleton.generation_config, chat)
            first = self.contexts.prompts[0]
            if chat.prompt(self.trait.positive, first) == chat.prompt(self.trait.negative, first):
                raise ConfigError("trait.positive and trait.negative: the tokenizer makes the same tokens of both")
            systems = dict.fromkeys((self.trait.neutral, self.trait.positive, self.trait.negative))
            limits.check_texts([text for system in systems for text in self._texts(chat, system)], chat)
        _fitting.add(key)

    def _texts(self, chat: Chat, system: str) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Yield each text's place in the configuration, its ids in a conversation, and the tokens that may follow it.

        Raises ConfigError for one of which no token is left to score.
        """
        room = self.generate.max_new_tokens
        prompts = {"trait.generate": self.trait.generate, "trait.held_out": self.trait.held_out}
        for field, texts in (prompts | {"contexts.prompts": self.contexts.prompts}).items():
            for i, text in enumerate(texts):
                yield f"{field}[{i}]", chat.prompt(system, text), room if field in prompts else 0
        for option in self.eval.values():
            for place, pair in option.sequences(chat, self.trait, system).items():
                if not pair.prompt or not pair.completion:
                    raise ConfigError(f"{place}: too short: the tokenizer makes no token of it that could be scored")
                yield place, pair.prompt + pair.completion, 0

    @field_validator("eval")
    @classmethod
    def _complete(cls, chosen: dict[str, Evaluation]) -> dict[str, Evaluation]:
        if not chosen.keys() >= set(REQUIRED):
            every = ",".join(dict.fromkeys([*REQUIRED, *chosen]))
            raise ValueError(f"an eval with at least {', '.join(REQUIRED)}; write 'eval=[{every}]'")
        return chosen

    def doubts(self) -> list[str]:
        """Warnings about what is valid and hardly meant."""
        sizes = {"trait.probes": self.trait.probes, "trait.held_out": self.trait.held_out}
        return [
            f"{field} has one item only: a figure from one item has no spread, and says little"
            for field, items in sizes.items()
            if len(items) == 1
        ]

    def model_post_init(self, _: Any) -> None:
        """Check what depends on several fields."""
        columns = Counter(name for column in self.columns for name in {column.name, column.over_base} - {""})
        if taken := sorted(name for name, count in columns.items() if count > 1):
            raise ValueError(f"an experiment whose evaluations give different figures; several give {', '.join(taken)}")
        if self.reg.decay_factor(self.heal.lr, self.heal.lr) <= 0:
            pair = f"reg={self.reg.key_fields()} at heal.lr={self.heal.lr:g}"
            raise ValueError(f"one whose decay keeps the signs of the weights, which {pair} does not")
        if self.dose.filters and self.steer.has_strength and not self.filter:
            raise ValueError(f"one with a filter, since dose={self.dose.name} depends on the filters")
        least, given = self.steer.least_contexts, len(set(self.contexts.draw(self.seed).prompts))
        if given < least:
            raise ValueError(f"one with at least {least} contexts.prompts for steer.layers=auto, not {given}")
        prompts = len(self.trait.draw(self.generate.n_prompts, self.seed))
        rows = (1 + self.heal.top_ups) * prompts * self.dose.count() * self.generate.n_samples
        if rows < self.heal.min_train:
            raise ValueError(
                f"one that generates at least heal.min_train={self.heal.min_train} completions, not {rows}"
            )
