"""Comparisons and runs as pandas frames, for notebooks: pip install 'steer_heal[notebook]'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steer_heal.report.comparison import compared
from steer_heal.report.comparison_table import records
from steer_heal.report.replicates import gathered, settings
from steer_heal.report.run_folder import Run

if TYPE_CHECKING:
    import pandas as pd


def comparison(*folders: str | Path, by: Sequence[str] = (), against: str | None = None) -> pd.DataFrame:
    """One line a row of `python -m steer_heal.compare`; `comparison` numbers tables that share no zero.

    Raises ConfigError for a folder that holds no runs.
    """
    import pandas as pd

    made = compared(gathered([Path(folder) for folder in folders]), by, against)
    return pd.DataFrame([{"comparison": i} | record for i, found in enumerate(made) for record in records(found)])


def rounds(*folders: str | Path) -> pd.DataFrame:
    """One line a round of every run: its settings, then all figures that it logged, as `round/<name>`."""
    import pandas as pd

    runs = gathered([Path(folder) for folder in folders])
    return pd.DataFrame(
        [_told(run) | {f"round/{name}": v for name, v in row.items()} for run in runs for row in run.rounds]
    )


def frontiers(*folders: str | Path) -> pd.DataFrame:
    """One line a gate of every run's last student: its settings, then `at/gate` and all figures there, `at/<name>`."""
    import pandas as pd

    runs = gathered([Path(folder) for folder in folders])
    return pd.DataFrame(
        [_told(run) | {f"at/{name}": v for name, v in row.items()} for run in runs for row in run.frontier]
    )


def _told(run: Run) -> dict[str, str]:
    """A run's folder, seed and settings."""
    return {"folder": str(run.folder), "seed": "0"} | settings(run)
