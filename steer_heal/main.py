"""The command: `python -m steer_heal.main [-m] [group=option ...] [path=value ...]`."""

from __future__ import annotations

import os
import sys

import hydra
from omegaconf import DictConfig

from steer_heal.config import CONF
from steer_heal.config.errors import REFUSED, no_choice, one_line, refuse


def main() -> None:
    """Run the command line. Invalid values are rejected in one line, with exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them in its own form
    try:
        job()
    except REFUSED as error:
        refuse(one_line(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's, of reg=null
            raise
        refuse(no_choice())


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    """Carry out one run, or one cell under a third-party launcher."""
    from steer_heal.sweep.cell import run_config

    run_config(cfg)


if __name__ == "__main__":
    main()
