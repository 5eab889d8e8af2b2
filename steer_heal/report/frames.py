"""Comparisons and runs as pandas frames, for notebooks: pip install 'steer_heal[notebook]'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steer_heal.report.comparison import compared, gathered, settings
from steer_heal.report.comparison_table import records

if TYPE_CHECKING:
    import pandas as pd


def comparison(*folders: str | Path, by: Sequence[str] = (), against: str = "nll") -> pd.DataFrame:
    """One line a row of `python -m steer_heal.compare`; `comparison` numbers tables that share no zero.

    Raises ConfigError for a folder that holds no runs.
    """
    import pandas as pd

    made = compared(gathered([Path(folder) for folder in folders]), by, against)
    return pd.DataFrame([{"comparison": i} | record for i, found in enumerate(made) for record in records(found)])


def rounds(*folders: str | Path) -> pd.DataFrame:
    """One line a round of every run: its settings, then all figures that it logged."""
    import pandas as pd

    runs = gathered([Path(folder) for folder in folders])
    return pd.DataFrame([{"folder": str(run.folder)} | settings(run) | row for run in runs for row in run.rounds])


def frontiers(*folders: str | Path) -> pd.DataFrame:
    """One line a gate of every run's last student: its settings, the gate and all figures there."""
    import pandas as pd

    runs = gathered([Path(folder) for folder in folders])
    return pd.DataFrame([{"folder": str(run.folder)} | settings(run) | row for run in runs for row in run.frontier])
