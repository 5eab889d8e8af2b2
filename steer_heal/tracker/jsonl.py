"""The tracker that writes metrics.jsonl and mirrors it nowhere."""

from __future__ import annotations

from typing import Literal

from steer_heal.tracker import TrackerConfig


class JsonlConfig(TrackerConfig):
    """Measurements go to metrics.jsonl only."""

    name: Literal["jsonl"]
