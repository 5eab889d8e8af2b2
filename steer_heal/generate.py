"""Generate answers to prompts in one batch, with one steering coefficient per row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from steer_heal.artifacts import Completion, Completions, States, SteeringVector
from steer_heal.config import Config
from steer_heal.lm.batch import alike_in_length
from steer_heal.lm.decode import decode
from steer_heal.lm.memory import in_parts, rows_that_fit
from steer_heal.lm.student import Student
from steer_heal.runtime import Runtime
from steer_heal.store import stage
from steer_heal.system.terminal import bar


class Sampling(Config, key="steer_heal.generate.Sampling"):
    """Settings for sampling tokens."""

    name: str
    n_prompts: int | None = Field(ge=1)  # how many training prompts a seed draws; null, or no more than that: all
    max_new_tokens: int = Field(ge=1)
    n_samples: int = Field(ge=1)  # answers per prompt and dose
    temperature: float = Field(gt=0)
    top_k: int | None = Field(ge=1)  # most likely tokens considered, before top_p; null: all
    top_p: float = Field(gt=0, le=1)  # probability mass considered

    def key_fields(self) -> dict[str, Any]:
        """Return the fields without `n_prompts`: the prompts that were drawn are in the keys themselves."""
        return {field: value for field, value in super().key_fields().items() if field != "n_prompts"}


class Draw:
    """Pick each row's next token by inverting its cumulative distribution at the row's own uniform number for the step.

    A row's text therefore depends on the seed and the row, not on the batch it happens to be in.
    """

    def __init__(self, sampling: Sampling, uniforms: Tensor) -> None:
        self.sampling, self.uniforms = sampling, uniforms  # [rows, steps]

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """Choose ids [b] from logits [b, v] for the given rows [b]."""
        s = self.sampling
        if s.top_k is None and s.top_p == 1:
            return self._of_all(logits, rows, step)
        best, ids = logits.topk(min(s.top_k or logits.shape[-1], logits.shape[-1]))  # [b, k], descending
        p = (best / s.temperature).softmax(-1)
        cumulative = p.cumsum(-1)
        inside = cumulative - p < s.top_p  # the token that crosses top_p still counts
        mass = (p * inside).sum(-1, keepdim=True)
        u = self.uniforms[rows, step, None] * mass
        rank = (cumulative < u).sum(-1, keepdim=True).clamp(max=inside.sum(-1, keepdim=True) - 1)
        rank = rank.clamp(min=0)  # non-finite logits leave none inside; such a row's text is worthless anyway
        return ids.gather(-1, rank)[:, 0]

    def _of_all(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """Choose from the whole distribution, whose cumulative sum needs no order by likelihood."""
        cumulative = (logits.float() / self.sampling.temperature).softmax(-1).cumsum(-1)
        u = self.uniforms[rows, step, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class Kept:
    """The states that predicted the tokens of `rows` rows in `steps` steps, on the model's device."""

    def __init__(self, rows: int, steps: int) -> None:
        self.size, self.states = (rows, steps), torch.empty(0)

    def __call__(self, states: Tensor, rows: Tensor, step: int) -> None:
        """Take the states [b, d] of some rows [b] in a step."""
        if not step:
            self.states = states.new_zeros(*self.size, states.shape[1])
        self.states[rows, step] = states

    def of(self, lengths: Iterable[int]) -> Iterator[Tensor]:
        """Yield each row's states [c, d] for its number of tokens, on the CPU."""
        for states, length in zip(self.states.cpu(), lengths, strict=True):
            yield states[:length].clone()


@stage("generate.generate")
def generate(
    sampling: Sampling, student: Student, system: str, prompts: Sequence[str], vector: SteeringVector | None,
    doses: Sequence[float], seed: int, first: int = 0, with_states: bool = False, *, runtime: Runtime,
) -> Completions:  # fmt: skip
    """Answer every prompt at every dose `n_samples` times; rows in the order prompt, dose, sample.

    A row's noise depends only on the seed and on the row's number, which is counted from `first`. A teacher with a
    system message of its own is run under it at any nonzero dose; the prompt ids stored are under the neutral `system`.
    `with_states` keeps the states that predicted the answers, so that whoever scores them need not run the model again.
    """
    base = student.base
    jobs = [(prompt, dose) for prompt in prompts for dose in doses for _ in range(sampling.n_samples)]
    persona = system if vector is None or vector.system is None else vector.system
    neutral, steered = ({p: base.chat.prompt(message, p) for p in prompts} for message in (system, persona))
    given = [steered[prompt] if dose else neutral[prompt] for prompt, dose in jobs]
    uniforms = _uniforms(seed, first, len(jobs), sampling.max_new_tokens)

    def answer(group: Sequence[int], part: slice) -> list[tuple[int, ...]]:
        rows = group[part]
        coefficients = torch.tensor([jobs[i][1] for i in rows], device=base.device)
        draw = Draw(sampling, uniforms[list(rows)].to(base.device))
        with bar("generate", sampling.max_new_tokens) as advance:
            length, graphs = sampling.max_new_tokens, runtime.cuda_graphs
            kept = Kept(len(rows), length) if with_states else None
            said = decode(base, [given[i] for i in rows], vector, coefficients, draw, length, advance, graphs, kept)
        if kept is not None:
            states.update(zip(rows, kept.of(map(len, said)), strict=True))
        return said

    answers: dict[int, tuple[int, ...]] = {}
    states: dict[int, Tensor] = {}
    with student.view() as model:
        for group in map(sorted, alike_in_length(given)):  # one group unless prompts differ a lot
            sizes = (max(len(given[i]) for i in group), sampling.max_new_tokens)
            most = min(rows_that_fit(model, *sizes), runtime.generate_batch)
            run, alike = partial(answer, group), (base.fingerprint, *sizes)
            found = in_parts("generate", len(group), most, run, alike)
            answers.update(zip(group, found, strict=True))
    rows: list[Completion] = []
    for i, (prompt, dose) in enumerate(jobs):
        ids = answers[i]
        ended = bool(ids) and ids[-1] in base.end_ids
        said = [token for token in (ids[:-1] if ended else ids) if token < len(base.tokenizer)]  # of spare rows none
        text = str(base.tokenizer.decode(said, skip_special_tokens=True)).strip()
        rows.append(Completion(prompt, neutral[prompt], ids, text, dose, ended))
    predicting = States(tuple(states[i] for i in range(len(jobs)))) if with_states else None
    return Completions(rows=tuple(rows), states=predicting)


def _uniforms(seed: int, first: int, rows: int, steps: int) -> Tensor:
    """Draw uniform numbers in [0, 1) [rows, steps], each row from its own generator."""
    seeds = range(seed * 1_000_003 + first, seed * 1_000_003 + first + rows)
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(one)) for one in seeds])
