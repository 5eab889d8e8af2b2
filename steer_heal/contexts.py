"""The user messages over which a steering vector is averaged."""

from __future__ import annotations

from pydantic import Field

from steer_heal.config import Config


class Contexts(Config):
    """Prompts on many topics, shared by all traits."""

    name: str
    prompts: tuple[str, ...] = Field(min_length=2)
