"""Traits, which are what is steered: data only, one YAML file per trait."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from steer_heal.config import Config, Regex
from steer_heal.contexts import drawn


class Probe(Config, key="steer_heal.trait.Probe"):
    """A prompt with an answer that shows the trait and one that shows its counterpart, alike in length and style."""

    prompt: str = Field(min_length=1)
    trait: str = Field(min_length=1)
    counter: str = Field(min_length=1)

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.trait == self.counter:
            raise ValueError("a probe whose two answers differ")
        return self


class Trait(Config, key="steer_heal.trait.Trait"):
    """Two personas, and the prompts on which the model is steered, trained and measured."""

    name: str
    positive: str = Field(min_length=1)  # system message of the persona that has the trait
    negative: str = Field(min_length=1)  # and of its counterpart
    neutral: str = Field(min_length=1)  # system message for training and measuring
    generate: tuple[str, ...] = Field(min_length=1)  # prompts of which a seed draws some: their steered answers train
    held_out: tuple[str, ...] = Field(min_length=1)  # prompts for validation and evaluation
    probes: tuple[Probe, ...] = Field(min_length=1)
    narration: tuple[Regex, ...]  # regular expressions for text about the persona instead of in it

    def draw(self, n: int | None, seed: int) -> tuple[str, ...]:
        """The training prompts of a seed: `n` of `generate`, or all if there are no more (None: all)."""
        return drawn(self.generate, n, f"generate {seed}")

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.positive == self.negative:
            raise ValueError("a trait whose two personas differ")
        return self
