"""Answers to prompts: one batch, one steering coefficient a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from steer_heal.artifacts import Completion, Completions, SteeringVector
from steer_heal.config import Config
from steer_heal.decode import decode
from steer_heal.model import chat_ids
from steer_heal.progress import bar
from steer_heal.runtime import Runtime
from steer_heal.student import Student


class Sampling(Config):
    """How tokens are drawn."""

    name: str
    max_new_tokens: int = Field(ge=1)
    n_samples: int = Field(ge=1)  # answers a prompt and dose
    temperature: float = Field(gt=0)
    top_k: int = Field(ge=1)  # most likely tokens considered; before top_p
    top_p: float = Field(gt=0, le=1)  # probability mass considered


class Draw:
    """Pick each row's next token by inverting its distribution at the row's own uniform number of this step.

    So what a row says depends on the seed and the row, not on the batch that it happens to be in.
    """

    def __init__(self, sampling: Sampling, uniforms: Tensor) -> None:
        self.sampling, self.uniforms = sampling, uniforms  # [rows, steps]

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """Ids [b] of logits [b, v] of some of the rows [b]."""
        s = self.sampling
        best, ids = logits.topk(min(s.top_k, logits.shape[-1]))  # [b, k], falling
        p = (best / s.temperature).softmax(-1)
        cumulative = p.cumsum(-1)
        inside = cumulative - p < s.top_p  # the token that crosses top_p still counts
        mass = (p * inside).sum(-1, keepdim=True)
        u = self.uniforms[rows, step, None] * mass
        rank = (cumulative < u).sum(-1, keepdim=True).clamp(max=inside.sum(-1, keepdim=True) - 1)
        return ids.gather(-1, rank)[:, 0]


def generate(
    sampling: Sampling, student: Student, system: str, prompts: Sequence[str], vector: SteeringVector | None,
    doses: Sequence[float], seed: int, *, runtime: Runtime,
) -> Completions:  # fmt: skip
    """Answer every prompt at every dose `n_samples` times; rows in the order prompt, dose, sample."""
    base = student.base
    encoded = {prompt: chat_ids(base.tokenizer, system, prompt) for prompt in prompts}
    jobs = [(prompt, dose) for prompt in prompts for dose in doses for _ in range(sampling.n_samples)]
    uniforms = _uniforms(seed, len(jobs), sampling.max_new_tokens).to(base.device)
    rows: list[Completion] = []
    with student.view():
        for start in range(0, len(jobs), runtime.generate_batch):
            part = jobs[start : start + runtime.generate_batch]
            draw = Draw(sampling, uniforms[start : start + runtime.generate_batch])
            strengths = torch.tensor([dose for _, dose in part], device=base.device)
            with bar("generate", sampling.max_new_tokens) as advance:
                answers = decode(
                    base, [encoded[p] for p, _ in part], vector, strengths, draw, sampling.max_new_tokens, advance
                )
            for (prompt, dose), ids in zip(part, answers, strict=True):
                ended = bool(ids) and ids[-1] in base.end_ids
                text = str(base.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)).strip()
                rows.append(Completion(prompt, encoded[prompt], ids, text, dose, ended))
    return Completions(rows=tuple(rows))


def _uniforms(seed: int, rows: int, steps: int) -> Tensor:
    """One stream of numbers in [0, 1) a row [rows, steps], each from its own generator."""
    return torch.stack(
        [torch.rand(steps, generator=torch.Generator().manual_seed(seed * 1_000_003 + row)) for row in range(rows)]
    )
