"""The user messages over which a steering vector is averaged."""

from __future__ import annotations

from pydantic import Field, field_validator

from steer_heal.config import Config


class Contexts(Config, key="steer_heal.contexts.Contexts"):
    """Prompts on many topics, shared by all traits."""

    name: str
    prompts: tuple[str, ...] = Field(min_length=2)

    @field_validator("prompts")
    @classmethod
    def _differ(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(prompts)) < 2:
            raise ValueError("at least two different prompts: without a spread there is no signal-to-noise ratio")
        return prompts
