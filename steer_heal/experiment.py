"""The typed root of the configuration: what `conf/config.yaml` and the command line compose."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializeAsAny

from steer_heal.config import Config
from steer_heal.contexts import Contexts
from steer_heal.dose import Dose
from steer_heal.eval import Evaluation
from steer_heal.filter import Filter
from steer_heal.generate import Sampling
from steer_heal.heal import Heal
from steer_heal.lora import Lora
from steer_heal.model import ModelConfig
from steer_heal.reg import Regulariser, Tau
from steer_heal.runtime import Runtime
from steer_heal.steer import Teacher
from steer_heal.store.keys import fingerprint
from steer_heal.tracker.wandb import TrackerConfig
from steer_heal.trait import Trait


class Experiment(Config):
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
    eval: dict[str, SerializeAsAny[Evaluation]]
    tracker: SerializeAsAny[TrackerConfig]
    runtime: Runtime
    lam: float = Field(ge=0)  # strength, read by the regularisers that have one
    tau: Tau  # nats of divergence that are free, or where to settle that; read by the barriers
    decay: Literal["round", "step"]  # what lam means to weight decay
    seed: int = Field(ge=0, lt=2**31)
    n_rounds: int = Field(ge=1)
    min_coherence: float = Field(ge=0, le=1)  # stop after a round whose healed answers fall below it

    def meaning(self) -> dict[str, Any]:
        """What decides the cell's figures: not where it runs and logs, nor knobs that no option of it reads."""
        unread = {"tracker", "runtime", "lam", "tau", "decay"}
        decisive = {field: value for field, value in super().meaning().items() if field not in unread}
        decisive["top_ups"] = self.heal.top_ups
        if self.n_rounds > 1:  # a later round may start from another reference, and ends the run if too little is kept
            decisive |= {"reference": self.heal.reference, "min_train": self.heal.min_train}
        if self.heal.top_ups and self.heal.n_keep is None:  # then it says how many answers are made
            decisive["min_train"] = self.heal.min_train
        return decisive

    def demands(self) -> list[Any]:
        """What `prepare` looks at: cells that agree in it need be prepared once."""
        looked_at = fingerprint(self.steer) if self.steer.needs_look else None
        return [fingerprint(self.model), looked_at, self.lora.target_modules, self.lora.first]

    def prepare(self, here: bool = True) -> None:
        """See to it that the model is on disk and that the options fit it; no weights are loaded. Raises ConfigError.

        `here`: whether it will run on this machine, whose devices must then do.
        """
        if here:
            self.model.torch_device()
        self.model.prepare()
        self.fit()

    def fit(self) -> None:
        """Raise ConfigError for options that the model on disk has no place for."""
        if self.steer.needs_look or self.lora.target_modules != "all-linear":
            skeleton = self.model.skeleton()
            self.steer.fit(skeleton)
            self.lora.check(skeleton)

    def model_post_init(self, _: Any) -> None:
        """What depends on several fields."""
        for name in ("trait", "damage", "text"):
            if name not in self.eval:
                raise ValueError(f"an experiment whose eval has trait, damage and text; {name} is missing")
        if self.reg.shrink(self.heal.lr, self.heal.lr) <= 0:
            pair = f"reg={self.reg.meaning()} at heal.lr={self.heal.lr:g}"
            raise ValueError(f"one whose decay leaves weights their signs, as {pair} does not")
        if self.dose.filters and self.steer.has_strength and not self.filter:
            raise ValueError(f"one with a filter, since dose={self.dose.name} goes by what survives")
        least, given = self.steer.least_contexts, len(set(self.contexts.prompts))
        if given < least:
            raise ValueError(f"one with at least {least} contexts.prompts for steer.layers=auto, not {given}")
        rows = (1 + self.heal.top_ups) * len(self.trait.generate) * self.dose.count() * self.generate.n_samples
        if rows < self.heal.min_train:
            raise ValueError(
                f"one that generates at least heal.min_train={self.heal.min_train} completions, not {rows}"
            )
