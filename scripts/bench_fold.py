"""Ways to add what was learned to bfloat16 weights: python scripts/bench_fold.py RUN [RUN ...] [--help]

RUN is the folder of a finished run, whose adapters (`adapter-round-*`) are the history. Ways:

float32     a base in float32, for comparison: nothing is rounded
nearest     W0 + change, summed in float32, rounded to nearest
stochastic  the same, rounded stochastically: the student's view, at several seeds of the noise
factors     the factors of all rounds at work beside the layers, in bfloat16

For each way, number of rounds and gate: the projection of the applied on the learned change (mean over layers), the
trait's gain over the base of the same dtype, and the nll of neutral text over it. Then the cost: seconds to enter the
view, seconds to generate, and GB above the model. The ways take turns; times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from steer_heal.artifacts import Adapter, Completions
from steer_heal.config import CONF, build
from steer_heal.eval import EvalInput, Readings, evaluate
from steer_heal.experiment import Experiment
from steer_heal.generate import generate
from steer_heal.lm import student as views
from steer_heal.lm.student import Student, Subject
from steer_heal.model import load

WAYS = ("float32", "nearest", "stochastic", "factors")


def composed(*overrides: str) -> Experiment:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        exp = build(compose("config", list(overrides)))
    assert isinstance(exp, Experiment)
    return exp


def to_nearest(exact: Tensor, dtype: torch.dtype, name: str, seed: int) -> Tensor:
    return exact.to(dtype)


@contextmanager
def as_(way: str) -> Iterator[None]:
    """Make views in a way."""
    if way == "nearest":
        with patch.object(views, "round_to", to_nearest):
            yield
    elif way == "factors":
        with patch.object(views, "summable", lambda module: False):
            yield
    else:
        yield


@torch.no_grad()
def projection(student: Student) -> float:
    """Mean over layers of <applied, learned> / <learned, learned>."""
    names = student.history[0].modules()
    before = {name: student.base.model.get_submodule(name).weight.float() for name in names}
    found = []
    with student.view() as model:
        for name in names:
            learned = student.gate * torch.stack([adapter.delta(name) for adapter in student.history]).sum(0)
            applied = model.get_submodule(name).weight.float() - before[name]
            found.append(float((applied * learned).sum() / learned.square().sum()))
    return statistics.mean(found)


class Bench:
    """Students of one run's adapters on a base in bfloat16 and one in float32."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.exps = {dtype: composed(f"model.dtype={dtype}", *given.overrides) for dtype in ("bfloat16", "float32")}
        self.exps["bfloat16"].runtime.apply()
        self.bases = {dtype: load(exp.model) for dtype, exp in self.exps.items()}
        self.zero = {dtype: self.figures(Student(base)) for dtype, base in self.bases.items()}

    def figures(self, student: Student) -> dict[str, float]:
        exp, subject, found = self.exps["bfloat16"], Subject(student), dict[str, float]()
        answers, personas = Completions(()), (exp.trait.positive, exp.trait.negative)
        readings = Readings.of(subject, answers, personas, partial, runtime=exp.runtime)
        given = EvalInput("healed", exp.trait, subject, answers, None, None, readings)
        for name in ("trait", "damage"):
            option = exp.eval[name]
            found |= evaluate(option, subject, option.material(given), runtime=exp.runtime).values
        return found

    def fidelity(self, run: Path, history: tuple[Adapter, ...]) -> Iterator[dict[str, Any]]:
        for gate in self.given.gates:
            for way in WAYS:
                dtype = "float32" if way == "float32" else "bfloat16"
                for seed in range(self.given.seeds if way == "stochastic" else 1):
                    student = Student(self.bases[dtype], history, gate, seed)
                    with as_(way):
                        found = self.figures(student)
                        at = projection(student) if way in ("nearest", "stochastic") else 1.0
                    gain, damage = (found[name] - self.zero[dtype][name] for name in ("trait", "text_nll"))
                    yield {
                        "run": run.name, "rounds": len(history), "gate": gate, "way": way, "seed": seed,
                        "projection": at, "gain": gain, "damage": damage,
                    }  # fmt: skip

    def cost(self, history: tuple[Adapter, ...]) -> Iterator[dict[str, Any]]:
        exp, student = self.exps["bfloat16"], Student(self.bases["bfloat16"], history)
        trait = exp.trait
        times: dict[str, dict[str, list[float]]] = {way: {"enter": [], "generate": []} for way in WAYS[1:]}
        for _ in range(self.given.turns):
            for way, taken in times.items():
                with as_(way):
                    begun = time.perf_counter()
                    with student.view():
                        taken["enter"].append(time.perf_counter() - begun)
                    begun = time.perf_counter()
                    generate(exp.generate, student, trait.neutral, trait.held_out, None, [0.0], 0, runtime=exp.runtime)
                    taken["generate"].append(time.perf_counter() - begun - taken["enter"][-1])
        for way, taken in times.items():
            weights = {id(weight) for weight in student.base.model.parameters()}
            with as_(way), student.view() as model:
                own = [weight for weight in model.parameters() if id(weight) not in weights]
            yield {
                "rounds": len(history), "way": way, "gigabytes": sum(weight.nbytes for weight in own) / 1e9,
                **{name: statistics.median(values) for name, values in taken.items()},
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--gates", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1], help="how many of a run's adapters are used")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=5, help="of the cost; 0 leaves it out")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument("overrides", nargs="*", default=[], help="after --, such as trait=formality")
    given = parser.parse_args()
    bench = Bench(given)

    def show(row: dict[str, Any]) -> None:
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    for run in given.runs:
        adapters = [
            Adapter.load(folder)
            for folder in sorted(run.glob("adapter-round-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        ]
        for rounds in given.rounds:
            history = tuple(adapters[:rounds])
            for row in bench.fidelity(run, history):
                show(row)
            if given.turns and run == given.runs[0]:
                for row in bench.cost(history):
                    show(row)


if __name__ == "__main__":
    main()
