"""The demo's four cells against the obvious way, stage by stage: python scripts/bench_sweep.py [--help] [OVERRIDE ...]

ours      one sweep with one store: the first cell is run, and what is its own (heal, drift, the healed model's answers
          and figures) counted once for each of the four cells
obvious   four separate runs, each from nothing; plain `generate` for one row at a time; one text at a time with logits
          and softmax at all positions; PEFT, one sequence a step. A share of each stage's items is timed on the same
          data in the same process, and the seconds are extrapolated to all of them
ceiling   the same stage of ours at the speed of one large matrix product and of one large copy: the multiply-adds of
          its linear layers over the first, or the bytes that they read and write over the second, whichever is longer

With --before REV the same first cell is also run by the code of a commit (`git worktree`), in a process of its own, in
turns with this code, and the seconds of both are printed stage by stage.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CELLS = 4


def parsed() -> argparse.Namespace:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--share", type=int, default=4, help="items of each stage that the obvious way is timed on")
    ask.add_argument("--before", metavar="REV", help="compare with the code of this commit instead")
    ask.add_argument("--turns", type=int, default=1, help="turns of both commits, with --before")
    ask.add_argument("--code", type=Path, default=ROOT, help=argparse.SUPPRESS)
    ask.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    ask.add_argument("overrides", nargs="*", help="configuration overrides, such as model.dtype=float32")
    return ask.parse_args()


def group(stage: str, where: str) -> tuple[str, bool]:
    """The line of the table that a stage at a position in the run belongs to, and whether each cell has its own."""
    own = "healed" in where or stage in ("heal.heal", "heal.drift.drift")
    if stage == "eval.evaluate":
        return f"evaluate, {'healed' if own else 'base and steered'}", own
    if stage in ("lm.kl.answer_states", "filter.likelihoods") and "batch" not in where:
        return f"evaluate, {'healed' if own else 'base and steered'}", own
    names = {
        "generate.generate": "generate", "filter.likelihoods": "filter likelihoods", "heal.heal": "heal",
        "heal.drift.drift": "drift", "heal.reference.reference_states": "reference", "steer.extract": "extract",
    }  # fmt: skip
    name = names.get(stage, "filters")
    return (f"{name}, healed" if own and name == "generate" else name), own


class Meter:
    """Seconds, multiply-adds and bytes of linear layers, by line of the table; nested stages count by themselves."""

    def __init__(self) -> None:
        self.seconds, self.operations, self.bytes = (defaultdict[str, float](float) for _ in range(3))
        self.own = dict[str, bool]()
        self.open: list[tuple[str, float]] = []

    @contextmanager
    def within(self, stage: str, where: str) -> Iterator[None]:
        line, own = group(stage, where)
        self.own[line] = own
        now = time.perf_counter()
        if self.open:
            outer, since = self.open[-1]
            self.seconds[outer] += now - since
        self.open.append((line, now))
        try:
            yield
        finally:
            now, (line, since) = time.perf_counter(), self.open.pop()
            self.seconds[line] += now - since
            if self.open:
                self.open[-1] = (self.open[-1][0], now)

    def watch(self, base: Any) -> None:
        """Count the products of a model's blocks and head from now on. (Hooks on their layers would slow a heal.)"""
        from torch.nn import Linear

        def counting(part: Any) -> Callable[..., None]:
            layers = [m for m in part.modules() if isinstance(m, Linear)]
            weights = sum(m.weight.numel() for m in layers)
            width = sum(m.in_features + m.out_features for m in layers)
            size = layers[0].weight.element_size()

            def count(_module: Any, _inputs: Any, output: Any) -> None:
                if self.open:
                    line = self.open[-1][0]
                    passes = 2 if line == "heal" else 1  # back through the layers too; their weights are frozen
                    first = output[0] if isinstance(output, tuple) else output
                    rows = first.numel() // first.shape[-1]
                    self.operations[line] += passes * rows * weights
                    self.bytes[line] += passes * size * (weights + rows * width)

            return count

        for part in (*base.blocks, base.model.get_output_embeddings()):
            part.register_forward_hook(counting(part))


def ours(overrides: Sequence[str], code: Path) -> tuple[Meter, Any, dict[str, list[Any]]]:
    """Run the first cell; return its meter, the experiment, and each stage's inputs and results."""
    from hydra import compose, initialize_config_dir

    from steer_heal.config import CONF, build
    from steer_heal.loop import run
    from steer_heal.model import load
    from steer_heal.store import Store, stage_name
    from steer_heal.system.terminal import position
    from steer_heal.tracker.jsonl import JsonlConfig

    assert CONF.is_relative_to(code), f"the code of {CONF} was imported, not that of {code}"
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        exp: Any = build(compose("config", ["tracker=jsonl", *overrides]))
    exp.runtime.apply()
    meter, made, base = Meter(), dict[str, list[Any]](), load(exp.model)
    meter.watch(base)  # loads the model, for which no stage pays then

    class Timed(Store):
        def __call__(self, function: Any, /, *inputs: Any, **how: Any) -> Any:
            name = stage_name(function)
            with meter.within(name, position()):
                found = super().__call__(function, *inputs, **how)
            made.setdefault(name, []).append((inputs, found))
            return found

    with (
        tempfile.TemporaryDirectory() as folder,
        JsonlConfig(name="jsonl").open(Path(folder), config={}, group=None, run_name="bench") as tracker,
    ):
        run(exp, Timed(Path(folder) / "store"), tracker)
    return meter, exp, made


def speeds(dtype: Any) -> tuple[float, float]:
    """Multiply-adds a second of a large matrix product, and bytes a second of a large copy, read and written."""
    import torch

    a, b = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    block = torch.empty(2**27, dtype=torch.uint8)
    other = torch.empty_like(block)

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            begun = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun)
        return sorted(times)[len(times) // 2]

    return 1024 * 2048 * 2048 / best(lambda: a @ b), 2 * 2**27 / best(lambda: other.copy_(block))


def whole(seconds: dict[str, float], own: dict[str, bool]) -> float:
    """Seconds of a sweep of all cells."""
    return sum(CELLS * value if own[line] else value for line, value in seconds.items())


def against_the_obvious(given: argparse.Namespace) -> None:
    meter, exp, made = ours(given.overrides, given.code)
    import torch
    from obvious import Obvious

    products, copies = speeds(exp.model.torch_dtype())
    obvious = Obvious(exp, made, given.share).seconds()
    print(
        f"{exp.model.name}, {exp.model.torch_dtype()}, {torch.get_num_threads()} threads; one large product "
        f"{2 * products / 1e9:.0f} GFLOP/s, a copy {copies / 1e9:.1f} GB/s; obvious: {given.share} items a stage, "
        "extrapolated; seconds of one cell"
    )
    print(f"{'stage':28} {'ours':>8} {'obvious':>8} {'ratio':>6} {'ceiling':>8} {'share':>6}")
    for line, mine in sorted(meter.seconds.items(), key=lambda item: -item[1]):
        ceiling, theirs = max(meter.operations[line] / products, meter.bytes[line] / copies), obvious.get(line, 0.0)
        print(f"{line:28} {mine:8.1f} {theirs:8.1f} {theirs / mine:6.1f} {ceiling:8.1f} {ceiling / mine:6.0%}")
    total, plain = whole(meter.seconds, meter.own), CELLS * sum(obvious.values())
    print(f"{CELLS} cells: ours {total:.0f} s (what they share once), obvious {plain:.0f} s: {plain / total:.1f} times")


def against_a_commit(given: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "before"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), given.before], check=True)
        try:
            for turn in range(given.turns):
                for name, code in (("before", tree), ("now", ROOT)):
                    into = Path(scratch) / f"{name}-{turn}.json"
                    command = [sys.executable, __file__, "--code", str(code), "--into", str(into), *given.overrides]
                    subprocess.run(command, check=True)
                    found[name].append(json.loads(into.read_text(encoding="utf-8")))
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    lines = dict.fromkeys(line for runs in found.values() for run in runs for line in run["seconds"])
    middle = {
        name: {line: sorted(run["seconds"].get(line, 0.0) for run in runs)[len(runs) // 2] for line in lines}
        for name, runs in found.items()
    }
    own = {line: flag for runs in found.values() for run in runs for line, flag in run["own"].items()}
    print("stage                             before      now   ratio")
    for line in lines:
        old, new = middle["before"][line], middle["now"][line]
        print(f"{line:32} {old:7.1f} {new:8.1f} {old / new if new else 0:7.2f}")
    scoring = [line for line in lines if not line.startswith(("generate", "heal", "extract"))]
    for what, some in (("scoring", scoring), ("all", list(lines))):
        old, new = (whole({line: middle[name][line] for line in some}, own) for name in ("before", "now"))
        print(f"{CELLS} cells, {what}: {old:.0f} s before, {new:.0f} s now: {old / new:.2f} times as fast")


def main() -> None:
    from loguru import logger

    given = parsed()
    logger.remove()
    sys.path[:0] = [str(given.code), str(given.code / "hydra_plugins"), str(ROOT / "scripts")]
    if given.before:
        against_a_commit(given)
    elif given.into:
        meter, _, _ = ours(given.overrides, given.code)
        given.into.write_text(json.dumps({"seconds": meter.seconds, "own": meter.own}), encoding="utf-8")
    else:
        against_the_obvious(given)


if __name__ == "__main__":
    main()
