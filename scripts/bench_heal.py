"""Benchmark of a heal against the obvious code and against the model alone: python scripts/bench_heal.py [--help]

In one process and on the same completions:

(a) this stage: `steer_heal.heal.heal`, a step being the time between two rows of its curve
(b) the obvious implementation: one sequence at a time, log-softmax over the full vocabulary at all positions, the
    reference run again every step, history added into the weights and removed again around every forward and backward
(c) the floor: forward and backward of the model with its adapter, in (a)'s micro-batches, without a loss

They take turns, and each figure is the median over turns. (a) and (b) must agree in losses and gradients.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from peak import risen
from torch import Tensor

from steer_heal import lora as adapters
from steer_heal.artifacts import Adapter, Completion, Completions
from steer_heal.config import CONF, build
from steer_heal.experiment import Experiment
from steer_heal.heal import heal
from steer_heal.heal.reference import Targets, reference_states
from steer_heal.lm.attention import short_sequences
from steer_heal.lm.base import Base, head
from steer_heal.lm.batch import Pair, by_length, collate
from steer_heal.lm.student import Student
from steer_heal.model import load

SEED = 1


def completions(base: Base, exp: Experiment, n: int, length: int) -> Completions:
    """The trait's prompts, each answered with `length` random tokens, since token values do not affect speed."""
    rng = torch.Generator().manual_seed(SEED)
    rows = []
    for i in range(n):
        prompt = exp.trait.generate[i % len(exp.trait.generate)]
        ids = torch.randint(100, base.model.config.get_text_config().vocab_size, (length,), generator=rng)
        prompt_ids = base.chat.prompt(exp.trait.neutral, prompt)
        rows.append(Completion(prompt, prompt_ids, tuple(ids.tolist()), "", 0.5, False, kept=True))
    return Completions(rows=tuple(rows))


def made_up(base: Base, exp: Experiment, seed: int) -> Adapter:
    """An adapter whose change is about as large as a round's: a hundredth of the weights."""
    rng = torch.Generator().manual_seed(seed)
    with adapters.live_adapter(exp.lora, base.model, seed) as wrapped:
        drawn = {name: torch.randn(f.shape, generator=rng) * 0.01 for name, f in adapters.factors(wrapped).items()}
        record = adapters.config_record(wrapped)
    return Adapter(config=record, factors=drawn, curve=(), summary={}, key=f"made-up-{seed}")


@contextmanager
def baked(student: Student, wrapped: Any) -> Iterator[None]:
    """Add the history into the weights one adapter after the other, and restore the saved weights afterwards."""
    saved = []
    for adapter in student.history:
        for name in adapter.modules():
            layer = wrapped.base_model.model.get_submodule(name)
            weight = getattr(layer, "base_layer", layer).weight
            saved.append((weight, weight.data.clone()))
            weight.data += adapter.delta(name, weight.device).to(weight.dtype)
    yield
    for weight, data in reversed(saved):
        weight.data.copy_(data)


def obvious_step(exp: Experiment, student: Student, wrapped: Any, chosen: Sequence[Completion]) -> tuple[float, float]:
    """Leave the gradient of the loss over `chosen` in the adapter; return nll and kl."""
    nlls, kls = [], []
    for row in chosen:
        device = wrapped.device
        ids, start = torch.tensor([row.prompt_ids + row.ids], device=device), len(row.prompt_ids) - 1
        with torch.no_grad(), wrapped.disable_adapter():
            log_p = wrapped(input_ids=ids).logits.float().log_softmax(-1)
        with baked(student, wrapped):
            log_q = wrapped(input_ids=ids).logits.float().log_softmax(-1)
            nll = torch.nn.functional.nll_loss(log_q[0, start:-1], torch.tensor(row.ids, device=device))
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)[0, start:-1].mean()
            ((nll + exp.lam * (kl - exp.tau).relu()) / len(chosen)).backward()
        nlls.append(nll.item())
        kls.append(kl.item())
    return statistics.mean(nlls), statistics.mean(kls)


class Obvious:
    """(b): PEFT's model unchanged, stepped by AdamW."""

    def __init__(self, exp: Experiment, student: Student, rows: Sequence[Completion]) -> None:
        import peft

        self.exp, self.student, self.rows = exp, student, rows
        torch.manual_seed(SEED)
        self.wrapped: Any = peft.get_peft_model(student.base.model, exp.lora.peft_config())
        self.parameters = [p for p in self.wrapped.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=exp.heal.lr, weight_decay=0.0)

    def step(self, chosen: Sequence[Completion]) -> tuple[float, float]:
        figures = obvious_step(self.exp, self.student, self.wrapped, chosen)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return figures

    def close(self) -> None:
        self.wrapped.unload()


class Noting(torch.optim.AdamW):
    """AdamW that keeps the parameters and gradients of its last step."""

    last: tuple[list[Tensor], list[Tensor]]

    def step(self, closure: Any = None) -> Any:
        chosen = [p for group in self.param_groups for p in group["params"]]
        Noting.last = [p.detach().clone() for p in chosen], [p.grad.clone() for p in chosen]
        return super().step(closure)


class Bench:
    """One base, one set of completions, and the three methods to train on them."""

    def __init__(self, exp: Experiment, n: int, length: int) -> None:
        self.exp = exp
        self.base = load(exp.model)
        self.made = completions(self.base, exp, n, length)
        self.history = [made_up(self.base, exp, seed) for seed in range(8)]

    def ours(self, k: int, steps: int, reg: Any = None, **changes: int) -> tuple[list[float], Adapter]:
        """Seconds of the steps that do not measure, and the adapter.

        The first step also pays for the reference and the set-up; the first and the last one measure.
        """
        times: list[float] = []
        config = self.exp.heal.model_copy(update={"steps": steps} | changes)
        student = Student(self.base, tuple(self.history[:k]))
        targets = Targets.of(self.made.kept(), config.max_len)
        reference = lambda: reference_states(student.pristine(), targets, runtime=self.exp.runtime)  # noqa: E731
        adapter = heal(
            config, self.exp.lora, reg or self.exp.reg, student, reference, self.made, Completions(rows=()), SEED,
            runtime=self.exp.runtime, log=lambda _: times.append(time.perf_counter()),
        )  # fmt: skip
        return [b - a for a, b in pairwise(times)][:-1], adapter

    def obvious(self, k: int, steps: int) -> list[float]:
        way = Obvious(self.exp, Student(self.base, tuple(self.history[:k])), self.made.rows)
        size, times = self.exp.heal.batch_size, []
        for step in range(steps):
            begun = time.perf_counter()
            way.step(self.made.rows[step * size % len(self.made.rows) :][:size])
            times.append(time.perf_counter() - begun)
        way.close()
        return times

    def floor(self, steps: int) -> list[float]:
        pairs = [Pair(row.prompt_ids, row.ids) for row in self.made.rows[: self.exp.heal.batch_size]]
        model, times = self.base.model, []
        with short_sequences(model), adapters.live_adapter(self.exp.lora, model, SEED):
            for _ in range(steps):
                begun = time.perf_counter()
                for group in by_length(pairs, self.exp.runtime.micro_batch):
                    batch = collate([pairs[i] for i in group], self.base.pad_id, model.device)
                    hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
                    hidden.float().sum().backward()
                times.append(time.perf_counter() - begun)
        return times

    def ways(self, steps: int) -> dict[str, Callable[[int], list[float]]]:
        """Methods by name, each from a number of earlier adapters to the seconds of its steps."""
        return {
            "(a) ours": lambda k: self.ours(k, steps + 2)[0],
            "(b) obvious": lambda k: self.obvious(k, max(1, steps // 2)),
            "(c) floor": lambda _: self.floor(steps),
        }

    @torch.no_grad()
    def head_pass(self) -> float:
        """Seconds of the head alone over an optimiser batch's completion positions."""
        n = self.exp.heal.batch_size * len(self.made.rows[0].ids)
        hidden = torch.randn(n, self.base.model.config.get_text_config().hidden_size).to(self.base.model.dtype)
        begun = time.perf_counter()
        for part in hidden.split(self.exp.runtime.positions(self.base.model.config.get_text_config().vocab_size)):
            head(self.base.model, part)
        return time.perf_counter() - begun

    def agree(self, k: int) -> str:
        """Compare the second step of (a), whose B is no longer 0, with (b) at the same parameters."""
        plain = torch.optim.AdamW
        torch.optim.AdamW = Noting  # type: ignore[misc]
        try:  # all completions in one step, so that their order does not matter
            _, adapter = self.ours(k, 2, batch_size=len(self.made.rows))
        finally:
            torch.optim.AdamW = plain  # type: ignore[misc]
        parameters, gradients = Noting.last
        way = Obvious(self.exp, Student(self.base, tuple(self.history[:k])), self.made.rows)
        for parameter, value in zip(way.parameters, parameters, strict=True):
            parameter.data = value
        nll, kl = obvious_step(self.exp, way.student, way.wrapped, self.made.rows)
        torch.nn.utils.clip_grad_norm_(way.parameters, 1.0)
        mine, theirs = (
            torch.cat([g.flatten() for g in some]) for some in (gradients, [p.grad for p in way.parameters])
        )
        way.close()
        off = float((mine - theirs).norm() / theirs.norm())
        row, bound = adapter.curve[1], 1e-3 if self.base.model.dtype == torch.float32 else 0.1
        report = f"nll {row['nll']:.5f} and {nll:.5f}, kl {row['kl']:.5f} and {kl:.5f}, gradients differ by {off:.1e}"
        if off > bound or abs(row["nll"] - nll) > bound or abs(row["kl"] - kl) > bound:
            sys.exit(f"(a) and (b) do not agree: {report}")
        return report


def peak(overrides: list[str], way: str, k: int, length: int) -> float:
    """Peak GB of one method above what the process held before, in a process of its own (on Linux)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (overrides, way, k, length))


def _peak(overrides: list[str], way: str, k: int, length: int) -> float:
    bench = opened(overrides, length)
    return risen(lambda: bench.ways(2)[way](k))


def opened(overrides: list[str], length: int) -> Bench:
    """A bench of the configuration with overrides. Only the first and the last step measure."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        exp: Experiment = build(compose("config", ["tau=0.05", "heal.measure_every=100000", *overrides]))
    exp.runtime.apply()
    return Bench(exp, 2 * exp.heal.batch_size, length)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rounds", type=int, nargs="+", default=[0, 1, 3, 7], help="numbers of adapters in the history")
    ask.add_argument("--turns", type=int, default=3, help="turns of each method")
    ask.add_argument("--steps", type=int, default=4, help="steps of (a) and (c) per turn; (b) does half")
    ask.add_argument("--length", type=int, default=64, help="tokens per completion")
    ask.add_argument("--check", action="store_true", help="only check that (a) and (b) agree")
    ask.add_argument("overrides", nargs="*", help="configuration overrides, such as model.dtype=float32")
    given = ask.parse_args()
    bench = opened(given.overrides, given.length)
    exp, size = bench.exp, bench.exp.heal.batch_size
    tokens = sum(len(row.prompt_ids) + len(row.ids) for row in bench.made.rows) / len(bench.made.rows)
    print(f"{exp.model.name} {exp.model.dtype}, {torch.get_num_threads()} threads, {exp.reg.name}, r {exp.lora.r}, "
          f"{size} sequences per step, {tokens:.0f} tokens each, {given.length} of them completion")  # fmt: skip
    for k in sorted({given.rounds[0], given.rounds[-1]}):
        print(f"round {k}: (a) and (b) agree: {bench.agree(k)}", flush=True)
    if given.check:
        return
    print(f"{'round':>5} {'way':>12} {'ms/sample':>10} {'tokens/s':>9} {'peak GB':>8} {'over (a)':>9}")
    ways = bench.ways(given.steps)
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for _ in range(given.turns):
        for k in given.rounds:
            for way, run in ways.items():
                times[k, way] += run(k)
    per = {place: statistics.median(some) / size for place, some in times.items()}
    for (k, way), seconds in per.items():
        high = peak(given.overrides, way, k, given.length)
        print(f"{k:5} {way:>12} {1000 * seconds:10.1f} {tokens / seconds:9.0f} {high:8.2f} "
              f"{seconds / per[k, '(a) ours']:9.2f}", flush=True)  # fmt: skip
    print_barrier(bench, given.turns, given.steps)


def print_barrier(bench: Bench, turns: int, steps: int) -> None:
    """Print the barrier's cost per step, beside passes of the head."""
    from steer_heal.reg.nll import Nll

    barrier, plain, once = [], [], []
    for _ in range(turns):
        barrier += bench.ours(0, steps + 2)[0]
        plain += bench.ours(0, steps + 2, Nll(name="nll"))[0]
        once += [bench.head_pass() for _ in range(3)]
    with_, without, one = (1000 * statistics.median(some) for some in (barrier, plain, once))
    allowed = without * 1.1 + 2 * one
    print(f"a step: {bench.exp.reg.name} {with_:.0f} ms, nll {without:.0f} ms, a pass of the head {one:.0f} ms; "
          f"allowed (nll + 10 % + two passes): {allowed:.0f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
