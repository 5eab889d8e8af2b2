"""Benchmark of steered generation against plain `generate`: python scripts/bench_generate.py [--help]

In one process and on the same prompts:

(p) transformers' own `generate`, one row at a time, unsteered, sampling
(u) `steer_heal.generate`, rows side by side, unsteered
(s) the same, each row steered by a coefficient of its own
(0) the same at a dose of 0: it generates the text of (u), so the difference is the cost of steering
(n) on a GPU, (s) without CUDA graphs

`--shape 4b` does the same on random weights in the shape of a 4-billion-parameter model, for a GPU.

They take turns; each figure is the median over turns. "beside the model" is the share of the time outside the model's
forward pass: sampling, ended rows, masks, texts. The bound is the time to read all weights once per step, and the cache
of every token of every row, at this machine's copy bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from hydra import compose, initialize_config_dir

from steer_heal.artifacts import SteeringVector
from steer_heal.config import CONF, build
from steer_heal.experiment import Experiment
from steer_heal.generate import generate
from steer_heal.lm import decode
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.model import load
from steer_heal.steer import Method

DOSES = (0.3, 0.6, 0.9)


class Timed:
    """The model's forward pass, timed in seconds."""

    seconds = 0.0

    def __init__(self, forward: decode._Forward) -> None:
        self.forward, self.crowded, self.keep = forward, forward.crowded, forward.keep

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        begun = now(ids.device)
        logits = self.forward(ids, mask)
        Timed.seconds += now(ids.device) - begun
        return logits


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


SHAPES = {  # of Qwen3-4B, and a small one to check that this script runs
    "4b": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
}


def random_base(shape: str, like: Base) -> Base:
    """A base of random weights of a shape, with the device, dtype and tokenizer of another base."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SHAPES[shape], num_key_value_heads=SHAPES[shape]["num_attention_heads"] // 4, head_dim=128,
                         vocab_size=151936, max_position_embeddings=4096)  # fmt: skip
    with torch.device(like.device):
        torch.set_default_dtype(like.model.dtype)
        model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = sorted(like.end_ids)
    return Base(f"random {shape}", lambda: (model, like.tokenizer))


class Bench:
    """One base, its prompts, and a made-up vector of the size of the states."""

    def __init__(self, exp: Experiment, shape: str | None) -> None:
        self.exp, bundled = exp, load(exp.model)
        self.base = random_base(shape, bundled) if shape else bundled
        model, rng = self.base.model, torch.Generator().manual_seed(0)
        assert isinstance(exp.steer, Method)
        layers = exp.steer.blocks(len(self.base.blocks))
        directions = torch.randn(len(layers), model.config.get_text_config().hidden_size, generator=rng)
        self.vector = SteeringVector(layers=layers, directions=directions, snr=(1.0,) * len(layers))

    def ours(
        self, rows: int, vector: SteeringVector | None, strength: float = 1.0, graphs: bool = True
    ) -> tuple[float, float]:
        """Tokens per second, and the share of the time outside the model."""
        prompts = list(self.exp.trait.generate) * rows
        sampling = self.exp.generate.model_copy(update={"n_samples": 1})
        doses = [strength * dose for dose in (DOSES if rows >= len(DOSES) else DOSES[:1])]
        Timed.seconds, begun = 0.0, now(self.base.device)
        made = generate(
            sampling, Student(self.base), self.exp.trait.neutral, prompts[: rows // len(doses)], vector, doses, 0,
            runtime=self.exp.runtime.model_copy(update={"generate_batch": rows, "cuda_graphs": graphs}),
        )  # fmt: skip
        taken = now(self.base.device) - begun
        return sum(len(row.ids) for row in made.rows) / taken, 1 - Timed.seconds / taken

    def plain(self, rows: int) -> float:
        """Tokens per second of transformers' `generate`, one row at a time."""
        sampling, tokens, begun = self.exp.generate, 0, now(self.base.device)
        for prompt in self.exp.trait.generate[:rows]:
            ids = torch.tensor([self.base.chat.prompt(self.exp.trait.neutral, prompt)], device=self.base.device)
            out = self.base.model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=sampling.temperature,
                top_k=sampling.top_k, top_p=sampling.top_p, max_new_tokens=sampling.max_new_tokens,
                eos_token_id=sorted(self.base.end_ids), pad_token_id=self.base.pad_id,
            )  # fmt: skip
            tokens += out.shape[1] - ids.shape[1]
        return float(tokens / (now(self.base.device) - begun))


def bound(base: Base, rows: int, length: int, bandwidth: float) -> float:
    """Tokens per second that memory bandwidth allows for rows of `length` tokens."""
    config = base.model.config.get_text_config()
    weights: int = sum(p.numel() * p.element_size() for p in base.model.parameters())
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kept: int = 2 * config.num_hidden_layers * heads * width * length * base.model.dtype.itemsize
    return rows / ((weights + rows * kept) / bandwidth)


def copied(device: torch.device) -> float:
    """Bytes per second read and written in a large copy."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(7):
        begun = now(device)
        target.copy_(source)
        times.append(now(device) - begun)
    return 2 * 2**28 / statistics.median(times)


def main(argv: Sequence[str] | None = None) -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", type=int, nargs="+", default=[1, 6, 24, 96, 255], help="rows side by side")
    ask.add_argument("--turns", type=int, default=3, help="turns of each method")
    ask.add_argument("--plain", type=int, default=2, help="rows of plain generate per turn")
    ask.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of the model's")
    ask.add_argument("overrides", nargs="*", help="configuration overrides, such as generate.max_new_tokens=128")
    given = ask.parse_args(argv)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        exp: Experiment = build(compose("config", given.overrides))
    exp.runtime.apply()
    bench, forward = Bench(exp, given.shape), decode._forward
    decode._forward = lambda *how: Timed(forward(*how))  # type: ignore[arg-type,assignment,return-value]
    base, bandwidth = bench.base, copied(bench.base.device)
    length = exp.generate.max_new_tokens // 2 + len(base.chat.prompt(exp.trait.neutral, exp.trait.generate[0]))
    print(f"{given.shape or exp.model.name} {exp.model.dtype} on {base.device}, {torch.get_num_threads()} threads, "
          f"up to {exp.generate.max_new_tokens} tokens per row, memory copies {bandwidth / 1e9:.1f} GB/s")  # fmt: skip
    bench.ours(given.rows[0], bench.vector)
    plain: list[float] = []
    found: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for _ in range(given.turns):
        plain.append(bench.plain(given.plain))
        for rows in given.rows:
            found[rows, "unsteered"].append(bench.ours(rows, None))
            found[rows, "steered"].append(bench.ours(rows, bench.vector))
            found[rows, "dose 0"].append(bench.ours(rows, bench.vector, 0.0))
            if base.device.type == "cuda":
                found[rows, "no graphs"].append(bench.ours(rows, bench.vector, graphs=False))
    one = statistics.median(plain)
    print(f"{'rows':>5} {'way':>10} {'tokens/s':>9} {'over plain':>10} {'beside the model':>17} {'bound':>8}")
    print(f"{1:5} {'plain':>10} {one:9.0f} {1:10.1f} {'':>17} {bound(base, 1, length, bandwidth):8.0f}")
    for (rows, way), turns in found.items():
        speed, beside = (statistics.median(values) for values in zip(*turns, strict=True))
        print(f"{rows:5} {way:>10} {speed:9.0f} {speed / one:10.1f} {100 * beside:15.0f} % "
              f"{bound(base, rows, length, bandwidth):8.0f}")  # fmt: skip
    for rows in given.rows:
        costs = [u[0] / s[0] - 1 for u, s in zip(found[rows, "unsteered"], found[rows, "dose 0"], strict=True)]
        print(f"steering {rows} rows costs {100 * statistics.median(costs):.1f} % of the unsteered time")


if __name__ == "__main__":
    main()
