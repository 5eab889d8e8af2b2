"""Answers to prompts: one batch, one steering coefficient a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from steer_heal.artifacts import Completion, Completions, SteeringVector
from steer_heal.config import Config
from steer_heal.lm.decode import decode
from steer_heal.lm.memory import in_parts, rows_that_fit
from steer_heal.lm.student import Student
from steer_heal.model import chat_ids
from steer_heal.runtime import Runtime
from steer_heal.system.terminal import bar


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
        rank = rank.clamp(min=0)  # of logits that are not finite none is inside; what such a row says is worth nothing
        return ids.gather(-1, rank)[:, 0]


def generate(
    sampling: Sampling, student: Student, system: str, prompts: Sequence[str], vector: SteeringVector | None,
    doses: Sequence[float], seed: int, first: int = 0, *, runtime: Runtime,
) -> Completions:  # fmt: skip
    """Answer every prompt at every dose `n_samples` times; rows in the order prompt, dose, sample.

    A row's noise is that of the seed and of its number, which is counted from `first`. A teacher that is told who to be
    is asked under that system message at any dose but 0; the ids kept of a prompt are under the neutral `system`.
    """
    base = student.base
    jobs = [(prompt, dose) for prompt in prompts for dose in doses for _ in range(sampling.n_samples)]
    told = system if vector is None or vector.system is None else vector.system
    encoded, asked = ({p: chat_ids(base.tokenizer, who, p) for p in prompts} for who in (system, told))
    given = [asked[prompt] if dose else encoded[prompt] for prompt, dose in jobs]
    uniforms = _uniforms(seed, first, len(jobs), sampling.max_new_tokens)

    def answered(part: slice) -> list[tuple[int, ...]]:
        strengths = torch.tensor([dose for _, dose in jobs[part]], device=base.device)
        draw = Draw(sampling, uniforms[part].to(base.device))
        with bar("generate", sampling.max_new_tokens) as advance:
            length, graphs = sampling.max_new_tokens, runtime.cuda_graphs
            return decode(base, given[part], vector, strengths, draw, length, advance, graphs)

    rows: list[Completion] = []
    with student.view() as model:
        sizes = (max(map(len, given)), sampling.max_new_tokens)
        most = min(rows_that_fit(model, *sizes), runtime.generate_batch)
        answers = in_parts("generate", len(jobs), most, answered, alike=(base.fingerprint, *sizes))
        for (prompt, dose), ids in zip(jobs, answers, strict=True):
            ended = bool(ids) and ids[-1] in base.end_ids
            text = str(base.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)).strip()
            rows.append(Completion(prompt, encoded[prompt], ids, text, dose, ended))
    return Completions(rows=tuple(rows))


def _uniforms(seed: int, first: int, rows: int, steps: int) -> Tensor:
    """One stream of numbers in [0, 1) a row [rows, steps], each from its own generator."""
    seeds = range(seed * 1_000_003 + first, seed * 1_000_003 + first + rows)
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(one)) for one in seeds])
