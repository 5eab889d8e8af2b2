"""Filters: which completions to learn from. Each completion keeps its scores and the filters that it failed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steer_heal.artifacts import Completion, Completions, Likelihoods, RoundFailed, States
from steer_heal.config import Config
from steer_heal.lm.batch import Pair
from steer_heal.lm.score import logprobs, score, target_ids
from steer_heal.lm.student import Student
from steer_heal.runtime import Runtime
from steer_heal.store import stage


class TooFew(RoundFailed):
    """Too few completions passed to train on; the message counts the filters that the others failed."""

    def __init__(self, message: str, filtered: Completions | None = None) -> None:
        super().__init__(message)
        self.filtered = filtered


@dataclass(frozen=True)
class FilterInput:
    """Input of a filter."""

    completion: Completion
    logprobs: Tensor  # [c], of the completion's tokens under base with the neutral system message
    narration: Sequence[str]  # the trait's patterns for text about the persona

    @property
    def text(self) -> str:
        """The completion's text with straight apostrophes, as in the patterns."""
        return self.completion.text.replace("\u2019", "'")


class Filter(Config):
    """Subclasses set `name` and implement both methods."""

    name: str

    def score(self, item: FilterInput) -> float:
        """A finite score, which is stored with the completion."""
        raise NotImplementedError(type(self))

    def passes(self, score: float) -> bool:
        raise NotImplementedError(type(self))

    def compared_with(self) -> dict[str, float]:
        """What the score is compared with, shown beside the score of a completion that fails.

        By default the fields `min` and `max`; of a filter with neither, all its numbers.
        """
        numbers = {
            name: value
            for name, value in self.model_dump().items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        return {name: value for name, value in numbers.items() if name in ("min", "max")} or numbers


@stage("filter.likelihoods")
def likelihoods(
    completions: Completions, pristine: Student, personas: tuple[str, str],
    neutral: Callable[[], States] | None = None, *, runtime: Runtime,
) -> Likelihoods:  # fmt: skip
    """Every completion's log-probabilities under base, for the filters and for the logged figures.

    `neutral`, if given, returns base's states under the neutral system message, which then need not be computed.
    """
    base, rows = pristine.base, completions.rows

    def under(persona: str | None) -> list[Tensor]:
        pairs = [Pair(base.chat.prompt(persona, row.prompt) if persona else row.prompt_ids, row.ids) for row in rows]
        with pristine.view() as model:
            return score(model, pairs, pad_id=base.pad_id, micro_batch=runtime.score_batch, what="filter")

    if neutral is None:
        plain = under(None)
    else:
        states, ids = torch.cat(neutral().states).to(base.device), target_ids((row.ids for row in rows), base.device)
        found = logprobs(base.model, states, ids).cpu()
        plain = list(found.split([len(row.ids) for row in rows]))
    positive, negative = under(personas[0]), under(personas[1])
    trait = tuple(float((a - b).mean()) for a, b in zip(positive, negative, strict=True))
    return Likelihoods(logprobs=tuple(plain), trait=trait)


@stage("filter.sift")
def apply_filters(
    filters: Mapping[str, Filter], parts: Sequence[Completions], scored: Sequence[Likelihoods],
    narration: Sequence[str], n_keep: int | None, seed: int,
) -> Completions:  # fmt: skip
    """Apply every filter to the completions of several batches, and keep up to `n_keep` that pass (None: all)."""
    rows = []
    every = [row for part in parts for row in part.rows]
    logprobs = [values for part in scored for values in part.logprobs]
    traits = [value for part in scored for value in part.trait]
    for row, likely, trait in zip(every, logprobs, traits, strict=True):
        item = FilterInput(row, likely, narration)
        scores = {name: option.score(item) for name, option in filters.items()}
        reasons = tuple(name for name, option in filters.items() if not option.passes(scores[name]))
        scores["trait"] = trait
        rows.append(replace(row, scores=scores, reasons=reasons))
    chosen = draw_evenly([i for i, row in enumerate(rows) if not row.reasons], rows, n_keep, seed)
    return Completions(rows=tuple(replace(row, kept=i in chosen) for i, row in enumerate(rows)))


def require(filtered: Completions, n: int, max_len: int) -> None:
    """Raise TooFew, naming the causes, unless `n` kept completions have a token left within `max_len`."""
    kept, total = len(filtered.kept()), len(filtered.rows)
    fit = sum(len(row.prompt_ids) < max_len for row in filtered.kept())
    if fit < n <= kept:
        raise TooFew(
            f"{fit} of {kept} kept completions fit heal.max_len={max_len}, fewer than heal.min_train={n}; raise it",
            filtered,
        )
    if kept < n:
        failed = Counter(reason for row in filtered.rows for reason in row.reasons)
        causes = ", ".join(f"{name} {count}" for name, count in failed.most_common()) or "none"
        made, passed = (Counter(row.dose for row in rows) for rows in (filtered.rows, filtered.passed()))
        doses = ", ".join(f"{dose:g}: {passed[dose]} of {made[dose]}" for dose in sorted(made)) or "none"
        raise TooFew(
            f"{kept} of {total} completions kept, fewer than heal.min_train={n}; failed by filter: {causes}; passed "
            f"by dose: {doses}. Lower the dose, loosen the filter that failed most, or raise heal.top_ups",
            filtered,
        )


def draw_evenly(indices: Sequence[int], rows: Sequence[Completion], n: int | None, seed: int) -> set[int]:
    """Draw `n` of the rows so that prompts, then doses, are represented as evenly as possible."""
    pool = list(indices)
    random.Random(seed).shuffle(pool)
    prompts: Counter[str] = Counter()
    doses: Counter[float] = Counter()
    chosen: set[int] = set()
    while pool and (n is None or len(chosen) < n):
        best = min(pool, key=lambda i: (prompts[rows[i].prompt], doses[rows[i].dose]))
        pool.remove(best)
        chosen.add(best)
        prompts[rows[best].prompt] += 1
        doses[rows[best].dose] += 1
    return chosen
