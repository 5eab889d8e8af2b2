"""The command: `python -m steer_heal.main [-m] [group=option ...] [path=value ...]`."""

from __future__ import annotations

import os
import re
import sys
import warnings

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from steer_heal.config import CONF
from steer_heal.config.errors import REFUSED, no_choice, one_line, refuse
from steer_heal.config.typed import flags_first
from steer_heal.system.paths import expand_arguments
from steer_heal.system.streams import exit_with

FLAGS = ("-m", "--multirun")
UNNAMED = ("Config group override", "can only concatenate str")  # Hydra's messages for reg=null and filter=[[length]]


def main() -> None:
    """Run the command line. Invalid values are rejected in one line, with exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them in its own form
    try:
        sys.argv[1:] = flags_first(expand_arguments(sys.argv[1:]))
    except ValueError as error:
        refuse(str(error))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="provider=.* is not available", category=UserWarning)
        warnings.filterwarnings("error", message=r"Callback Cells\.on_run_start raised", category=UserWarning)
        try:
            _run()
        except (
            KeyboardInterrupt
        ):  # before the first cell; later it is the launcher's, which tells what becomes of cells
            print("steer_heal: interrupted", file=sys.stderr)
            sys.exit(130)
        except REFUSED as error:
            refuse(one_line(error))
        except UserWarning as error:
            if not (found := re.search(r"path=(.*) is not available", str(error))):
                raise
            refuse(f"hydra.searchpath={found[1]!r}: there is no such folder")
        except (ValueError, TypeError) as error:
            if str(error).startswith("Only one of --run"):  # also Hydra's
                refuse(f"{' '.join(sys.argv[1:])}: give one of --run, --multirun, --cfg and --info")
            if not str(error).startswith(UNNAMED):
                raise
            refuse(no_choice())


def _run() -> None:
    """Have Hydra run the command line, or show what was asked for. Hydra shows one run's, and takes no -m beside."""
    given = get_args_parser().parse_known_args()[0]
    shows = "--cfg" if given.cfg else "--info" if given.info else ""
    if shows:
        sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in FLAGS]
    try:
        job()
    except REFUSED as error:
        line = one_line(error)
        if shows and "several values are a sweep" in line:
            refuse(
                f"{line.partition(':')[0]}: {shows} shows the configuration of one run: give one value of the several"
            )
        raise


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    """Carry out one run, or one cell under a third-party launcher."""
    from steer_heal.sweep.cell import run_config

    run_config(cfg)


if __name__ == "__main__":
    exit_with(main)
