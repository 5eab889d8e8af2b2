"""Runs made up for the table and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer_heal.artifacts import Row
from steer_heal.report.run_folder import KNOWN, Run

SHOWN = [column for column in KNOWN if column.models_shown]


def made_up(steer: str, said: str = "said", dose: float = 0.5, kl: float = 1.4, **figures: float) -> Run:
    """A run with one round; `figures` are further ones of it, with two underscores for a slash."""
    row: Row = {f"{who}/{c.name}": 0.5 for who in ("base", "steered", "healed") for c in KNOWN}
    row |= {f"{who}/damage": 0.0 for who in ("base", "steered", "healed")}
    row |= {"kept": 2.0, "passed": 3.0, "generated": 4.0, "heal_barrier": 0.0, "heal_barrier_on": 0.0, "heal_idle": 0.0}
    row |= {"heal_shrink": 0.0, "heal_decays": 0.0, "dose": dose, "steered/kl_p95": kl}
    row |= {name.replace("__", "/"): value for name, value in figures.items()}
    people = {"base": "base says", "steered": said, "healed": f"healed of {steer}"}
    told: dict[str, Any] = {who: [{"prompt": "Hello", "text": text}] for who, text in people.items()}
    return Run(Path("."), (f"steer={steer}",), steer, "nll", "", None, 1.0, [row], 0, "", told, [], tuple(SHOWN), "")
