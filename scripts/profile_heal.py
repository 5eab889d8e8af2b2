"""Profile of one step, ours and the obvious one: python scripts/profile_heal.py [overrides ...]

Self times by torch's profiler of a step in the steady state, by kind of work. The operations of matrix products are
counted too and divided by the machine's speed, which gives the time of a step if everything else cost nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from bench_heal import opened
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "matrix products of layers and head": {"mm", "addmm"},
    "products of rank r": {"addmm_"},
    "attention": {
        "bmm", "baddbmm", "_softmax", "_softmax_backward_data", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    },
    "casts and copies": {"copy_", "cat", "clone"},
    "log-softmax, exp": {"_log_softmax", "_log_softmax_backward_data", "exp", "exp_"},
    "products and sums by element": {
        "mul", "mul_", "add", "add_", "sub", "sub_", "div", "div_", "pow", "sum", "mean", "neg", "rsqrt", "silu",
        "silu_backward",
    },
}  # fmt: skip


class Products(TorchDispatchMode):
    """Counts the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.flops += 2 * out.numel() * args[0].shape[-1]
        elif name in ("addmm", "addmm_", "baddbmm"):
            self.flops += 2 * out.numel() * args[1].shape[-1]
        return out


def third_step(run: Callable[[], Any], watch: Any) -> Any:
    """Enter the context `watch` between the second and the third optimiser step of a run."""
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            watch.__enter__()
        elif steps == 3:
            watch.__exit__(None, None, None)

    hook = register_optimizer_step_post_hook(count)
    run()
    hook.remove()
    return watch


def table(run: Callable[[], Any], size: int) -> None:
    """Print the ms per sample of each kind of work."""
    times: dict[str, float] = defaultdict(float)
    for event in third_step(run, profile(activities=[ProfilerActivity.CPU])).key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, names in KINDS.items() if name in names), "all else")
        times[kind] += event.self_cpu_time_total / 1000 / size
    total = sum(times.values())
    for kind, ms in sorted(times.items(), key=lambda pair: -pair[1]):
        print(f"{kind:38} {ms:8.1f} {100 * ms / total:5.0f} %")
    flops = third_step(run, Products()).flops / size
    print(f"{'total':38} {total:8.1f} ms per sample; matrix products of {flops / 1e9:.1f} GFLOP, "
          f"at the machine's speed {1000 * flops / speed():.1f} ms", flush=True)  # fmt: skip


def speed() -> float:
    """Operations per second of one large matrix product in bfloat16."""
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    times = []
    for _ in range(9):
        begun = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begun)
    return float(2 * 2048**3 / statistics.median(times))


def main() -> None:
    bench = opened(sys.argv[1:], 64)
    size = bench.exp.heal.batch_size
    for k in (0, 1):
        ways = {"(a) ours": lambda k=k: bench.ours(k, 5), "(b) obvious": lambda k=k: bench.obvious(k, 4)}
        for name, run in ways.items():
            print(f"round {k}, {name}")
            table(run, size)


if __name__ == "__main__":
    main()
