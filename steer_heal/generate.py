"""Answers to prompts: one batch, one steering coefficient a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from steer_heal.artifacts import Completion, Completions, SteeringVector
from steer_heal.config import Config
from steer_heal.model import Base, chat_ids
from steer_heal.progress import bar
from steer_heal.runtime import Runtime
from steer_heal.steer import steered
from steer_heal.student import Student


class Sampling(Config):
    """How tokens are drawn."""

    name: str
    max_new_tokens: int = Field(ge=1)
    n_samples: int = Field(ge=1)  # answers a prompt and dose
    temperature: float = Field(gt=0)
    top_k: int = Field(ge=1)  # most likely tokens considered; before top_p
    top_p: float = Field(gt=0, le=1)  # probability mass considered


class _Draw:
    """Pick each row's next token by inverting its distribution at the row's own uniform number of this step.

    So what a row says depends on the seed and the row, not on the batch that it happens to be in.
    """

    def __init__(self, sampling: Sampling, uniforms: Tensor, advance: object) -> None:
        self.sampling, self.uniforms, self.step, self.advance = sampling, uniforms, 0, advance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        s = self.sampling
        logits, ids = scores.float().topk(min(s.top_k, scores.shape[-1]))  # [b, k], falling
        p = (logits / s.temperature).softmax(-1)
        cumulative = p.cumsum(-1)
        inside = cumulative - p < s.top_p  # the token that crosses top_p still counts
        mass = (p * inside).sum(-1, keepdim=True)
        u = self.uniforms[:, self.step, None] * mass
        rank = (cumulative < u).sum(-1, keepdim=True).clamp(max=inside.sum(-1, keepdim=True) - 1)
        self.step += 1
        self.advance(1)  # type: ignore[operator]
        return torch.full_like(scores, -torch.inf).scatter_(-1, ids.gather(-1, rank), 0.0)


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
            drawn = uniforms[start : start + runtime.generate_batch]
            answers = _decode(
                base, [encoded[prompt] for prompt, _ in part], vector, [d for _, d in part], sampling, drawn
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


@torch.no_grad()
def _decode(
    base: Base, prompts: Sequence[tuple[int, ...]], vector: SteeringVector | None, doses: Sequence[float],
    sampling: Sampling, uniforms: Tensor,
) -> list[tuple[int, ...]]:  # fmt: skip
    from transformers import LogitsProcessorList

    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[base.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    end_ids = sorted(base.end_ids)
    # The last position is a strided slice of the prompt pass, for which a linear layer copies its weight once a row.
    contiguous = base.model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: (args[0].contiguous(),))
    with steered(base, vector, torch.tensor(doses)), bar("generate", sampling.max_new_tokens) as advance, contiguous:
        out = base.model.generate(  # type: ignore[operator]
            input_ids=ids.to(base.device), attention_mask=mask.to(base.device), do_sample=False,
            logits_processor=LogitsProcessorList([_Draw(sampling, uniforms, advance)]),
            max_new_tokens=sampling.max_new_tokens, eos_token_id=end_ids, pad_token_id=base.pad_id,
        )  # fmt: skip
    return [_until_end(row, base.end_ids) for row in out[:, width:].tolist()]


def _until_end(ids: list[int], end_ids: frozenset[int]) -> tuple[int, ...]:
    """The ids up to and including the first end of turn."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids) - 1)
    return tuple(ids[: end + 1])
