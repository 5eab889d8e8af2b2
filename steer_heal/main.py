"""The command: `python -m steer_heal.main [-m] [group=option ...] [path=value ...]`."""

from __future__ import annotations

import os
import re
import sys
import warnings

import hydra
from omegaconf import DictConfig

from steer_heal.config import CONF
from steer_heal.config.errors import REFUSED, no_choice, one_line, refuse
from steer_heal.config.typed import flags_first

UNNAMED = ("Config group override", "can only concatenate str")  # Hydra's messages for reg=null and filter=[[length]]


def main() -> None:
    """Run the command line. Invalid values are rejected in one line, with exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them in its own form
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="provider=.* is not available", category=UserWarning)
        warnings.filterwarnings("error", message=r"Callback Cells\.on_run_start raised", category=UserWarning)
        try:
            sys.argv[1:] = flags_first(sys.argv[1:])
            job()
        except REFUSED as error:
            refuse(one_line(error))
        except KeyboardInterrupt:
            sys.exit(130)
        except UserWarning as error:
            if not (found := re.search(r"path=(.*) is not available", str(error))):
                raise
            refuse(f"hydra.searchpath={found[1]!r}: there is no such folder")
        except (ValueError, TypeError) as error:
            if not str(error).startswith(UNNAMED):
                raise
            refuse(no_choice())


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    """Carry out one run, or one cell under a third-party launcher."""
    from steer_heal.sweep.cell import run_config

    run_config(cfg)


if __name__ == "__main__":
    main()
