"""A vocabulary of 262,144, like Gemma's: what is said, learned and kept in memory with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.families import GROUPED, built, ids
from helpers.toys import RUNTIME, healed, regulariser, rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steer_heal.generate import Draw, Sampling
from steer_heal.lm.base import Base
from steer_heal.lm.decode import decode
from steer_heal.lm.student import Student
from steer_heal.model.tiny import tiny_tokenizer

V, NEW = 262_144, 5
PROMPTS = [ids(n, n) for n in (3, 9, 6)]
GREEDY = Sampling(name="test", n_prompts=None, max_new_tokens=NEW, n_samples=1, temperature=1.0, top_k=1, top_p=1.0)


class Widest(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary that an operation made."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (V,):
                of_the_head = tensor.shape == (GROUPED["hidden_size"], V)  # its weight, turned
                self.rows = max(self.rows, 0 if of_the_head else tensor.numel() // V)
        return out


@pytest.fixture(scope="module")
def base() -> Base:
    """A Gemma2 of 262,144 words, whose logits are soft-capped."""
    model: Any = built("Gemma2Config", **{**GROUPED, "head_dim": 4, "vocab_size": V, "final_logit_softcapping": 3.0})
    return Base("test", lambda: (model, tiny_tokenizer()))


def test_what_it_says_is_what_it_says_alone(base: Base) -> None:
    """Reference: transformers' own greedy generate, unpadded; only the last tokens' logits ever stand in memory."""
    draw = Draw(GREEDY, torch.full((len(PROMPTS), NEW), 0.5))
    with Widest() as seen:
        said = decode(base, PROMPTS, None, torch.zeros(len(PROMPTS)), draw, NEW, lambda steps: None)
    assert seen.rows == len(PROMPTS), f"logits of {seen.rows} positions at once, not of {len(PROMPTS)}"
    model: Any = base.model
    for prompt, answer in zip(PROMPTS, said, strict=True):
        given = torch.tensor([prompt])
        out = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=NEW,
            eos_token_id=sorted(base.end_ids), pad_token_id=0,
        )  # fmt: skip
        assert answer == tuple(out[0, len(prompt) :].tolist())
    assert max(max(answer) for answer in said) > 2**16, "no word beyond the first 65,536 was said"


def test_a_heal_keeps_logits_of_few_positions(base: Base) -> None:
    """Reference: the chunk that 64 MiB of logits make, and a heal that counts positions one by one."""
    made = rows(6, vocab=V, prompt=6, completion=40)
    positions = sum(len(row.ids) for row in made.rows)
    auto = RUNTIME.model_copy(update={"head_chunk": "auto"})
    chunk = auto.positions(V)
    assert positions > chunk, f"{positions} positions fit into one pass of {chunk}"
    with Widest() as seen:
        adapter = healed(
            Student(base), regulariser("kl_rev"), made=made, held=rows(1, vocab=V), how=auto, batch_size=6, steps=1
        )
    assert 0 < seen.rows <= chunk, f"logits of {seen.rows} positions at once; {chunk} are allowed"
    row = adapter.curve[0]
    assert row["nll"] > 0
    assert row["gnorm"] > 0
    assert abs(row["kl"]) < 1e-6, "the student is its reference at first"
