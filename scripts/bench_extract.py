"""Benchmark of direction extraction against the bare forward passes: python scripts/bench_extract.py [--help]

In one process, over all contexts under both personas of a trait:

(f) the model's blocks run over every prompt, batched by length, and nothing is kept
(e) `steer_heal.steer.extract`: the same prompts, and the states at the assistant tag of the chosen blocks

The two alternate; each figure is the median over turns, and the ratio is the median over pairs of consecutive turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from hydra import compose, initialize_config_dir

from steer_heal.config import CONF, build
from steer_heal.experiment import Experiment
from steer_heal.lm.batch import by_length
from steer_heal.lm.student import Student
from steer_heal.model import load
from steer_heal.steer import extract

LAYERS = {"all blocks": [0.0, 1.0], "the default band": [0.4, 0.6]}


@torch.no_grad()
def bare(exp: Experiment) -> None:
    """Run the blocks over every prompt of each persona."""
    base = load(exp.model)
    for persona in (exp.trait.positive, exp.trait.negative):
        prompts = [base.chat.prompt(persona, context) for context in exp.contexts.prompts]
        for group in by_length(prompts, exp.runtime.score_batch):
            width = max(len(prompts[i]) for i in group)
            ids = [[*prompts[i], *[base.pad_id] * (width - len(prompts[i]))] for i in group]
            base.model.base_model(input_ids=torch.tensor(ids, device=base.device), use_cache=False)


def main(argv: Sequence[str] | None = None) -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--turns", type=int, default=5, help="turns of each method")
    ask.add_argument("overrides", nargs="*", help="configuration overrides, such as trait=formality")
    given = ask.parse_args(argv)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        exp: Experiment = build(compose("config", given.overrides))
    exp.runtime.apply()
    student, personas = Student(load(exp.model)), (exp.trait.positive, exp.trait.negative)
    found: dict[str, list[float]] = defaultdict(list)
    for turn in range(given.turns + 1):
        for what, layers in {"bare": None, **LAYERS}.items():
            begun = time.perf_counter()
            if layers is None:
                bare(exp)
            else:
                extract(exp.steer.model_copy(update={"layers": tuple(layers)}), student, personas, exp.contexts,
                        runtime=exp.runtime)  # fmt: skip
            if turn:  # the first is for warming up
                found[what].append(time.perf_counter() - begun)
    print(f"{len(exp.contexts.prompts)} contexts under two personas, {exp.model.name}, steer={exp.steer.name}")
    for what, seconds in found.items():
        ratio = statistics.median(own / plain for own, plain in zip(seconds, found["bare"], strict=True))
        print(f"{what:17} {statistics.median(seconds):7.2f} s {ratio:6.2f} of the bare passes")


if __name__ == "__main__":
    main()
