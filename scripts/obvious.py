"""The work of a round as one would first write it, for `bench_sweep.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_heal import Obvious as Heal

from steer_heal.lm.batch import Pair
from steer_heal.lm.student import Student
from steer_heal.model import load


class Obvious:
    """The same work as one would first write it; each method returns seconds for an item, from a few of them."""

    def __init__(self, exp: Any, made: dict[str, list[Any]], share: int) -> None:
        self.exp, self.made, self.share, self.base = exp, made, share, load(exp.model)

    def timed(self, items: Sequence[Any], work: Callable[[Any], Any]) -> float:
        work(items[0])
        begun = time.perf_counter()
        few = items[: self.share]
        for item in few:
            work(item)
        return (time.perf_counter() - begun) / len(few)

    def logprobs(self, ids: Sequence[int]) -> Any:
        with torch.no_grad():
            return self.base.model(input_ids=torch.tensor([ids])).logits.float().log_softmax(-1)

    def text(self, items: Sequence[Any]) -> float:
        """Score one text."""
        return self.timed(items, lambda pair: self.logprobs(pair.prompt + pair.completion))

    def answer(self, rows: Sequence[Any]) -> float:
        """Generate one answer, whatever its length, by transformers' own `generate`."""
        sampling = self.exp.generate

        def work(row: Any) -> None:
            ids = torch.tensor([row.prompt_ids])
            self.base.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                temperature=sampling.temperature, max_new_tokens=sampling.max_new_tokens,
                pad_token_id=self.base.pad_id,
            )  # fmt: skip

        return self.timed(rows, work)

    def sequence(self, rows: Sequence[Any]) -> float:
        """Train on one sequence, with the reference run again for it."""
        way = Heal(self.exp, Student(self.base), rows)
        try:
            return self.timed(rows, lambda row: way.step([row]))
        finally:
            way.close()

    def seconds(self) -> dict[str, float]:
        """Of one separate run, by line of the table."""
        exp, made = self.exp, self.made
        drawn = [(inputs, found.rows) for inputs, found in made["generate.generate"]]
        train = [row for inputs, rows in drawn if inputs[3] != exp.trait.held_out for row in rows]
        held = next(rows for inputs, rows in drawn if inputs[3] == exp.trait.held_out)
        (inputs, adapter) = made["heal.heal"][0]
        kept = inputs[5].kept()
        fixed = [
            list(option.sequences(self.base.chat, exp.trait, exp.trait.neutral).values())
            for option in exp.eval.values()
        ]
        texts = [pair for some in fixed for pair in some]
        pairs = [Pair(row.prompt_ids, row.ids) for row in train]
        prompts = [self.base.chat.prompt(exp.trait.positive, one) for one in exp.contexts.draw(exp.seed).prompts]
        text, answer = self.text(pairs), self.answer(train)
        fixed_seconds = self.text(texts) * len(texts)
        # of answers: two models for text, two personas; when steered also two for strength and three for validation
        return {
            "extract": 2 * len(prompts) * self.timed(prompts, self.logprobs),
            "generate": answer * (len(train) + 2 * len(held)),
            "generate, healed": answer * len(held),
            "filter likelihoods": 3 * len(train) * text,
            "reference": 0.0,  # run in every step
            "evaluate, base and steered": 2 * fixed_seconds + (4 + 9) * len(held) * text,
            "evaluate, healed": fixed_seconds + 4 * len(held) * text,
            "heal": self.sequence(kept) * len(adapter.curve) * exp.heal.batch_size,
            "drift": 2 * len(kept) * text,
        }
