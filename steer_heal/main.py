"""The command: `python -m steer_heal.main [-m] [group=option ...] [path=value ...]`."""

from __future__ import annotations

import os
import sys

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from steer_heal.config import CONF
from steer_heal.config.errors import REFUSED, no_choice, one_line, refuse
from steer_heal.system.paths import expand_arguments
from steer_heal.system.streams import exit_with

FLAGS = ("-m", "--multirun")


def main() -> None:
    """Run the command line. Invalid values are rejected in one line, with exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them in its own form
    try:
        sys.argv[1:] = expand_arguments(sys.argv[1:])
    except ValueError as error:
        refuse(str(error))
    shows = _shows_configuration()
    if shows:  # Hydra shows the configuration of one run, and takes no -m beside
        sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in FLAGS]
    try:
        job()
    except REFUSED as error:
        line = one_line(error)
        if shows and "several values are a sweep" in line:
            line = (
                f"{line.partition(':')[0]}: {shows} shows the configuration of one run: give one value of the several"
            )
        refuse(line)
    except KeyboardInterrupt:  # before the first cell; later it is the launcher's, which tells what becomes of cells
        print("steer_heal: interrupted", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        if str(error).startswith("Config group override"):  # Hydra's, of reg=null
            refuse(no_choice())
        if str(error).startswith("Only one of --run"):  # also Hydra's
            refuse(f"{' '.join(sys.argv[1:])}: give one of --run, --multirun, --cfg and --info")
        raise


def _shows_configuration() -> str:
    """The flag that asks to show something instead of running it; empty if there is none."""
    given = get_args_parser().parse_known_args()[0]
    return "--cfg" if given.cfg else "--info" if given.info else ""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    """Carry out one run, or one cell under a third-party launcher."""
    from steer_heal.sweep.cell import run_config

    run_config(cfg)


if __name__ == "__main__":
    exit_with(main)
