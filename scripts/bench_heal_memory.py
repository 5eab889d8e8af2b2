"""Peak memory of a heal's step with a vocabulary of 262,144: python scripts/bench_heal_memory.py

A model of one narrow block and a wide head, so that memory is dominated by what the loss makes of the logits. (a) is
this stage; (b) is log-softmax over all logits at once, for as many tokens as fit, since its memory grows linearly.
Each runs in a process of its own, on Linux.
"""

from __future__ import annotations

import multiprocessing

import torch
from omegaconf import OmegaConf
from peak import risen
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from steer_heal.config import CONF, build
from steer_heal.heal.chunked_nll import positions
from steer_heal.lm.batch import Pair, collate, shared_states
from steer_heal.reg.kl_rev import KlRev
from steer_heal.runtime import Runtime

VOCABULARY, WIDTH, LENGTH = 262_144, 1024, 64


def model() -> PreTrainedModel:
    """One block and a head, bfloat16."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=8, intermediate_size=WIDTH
    )
    made = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    made.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    return made


def ours(tokens: int, chunk: int) -> float:
    """GB at the peak of (a)."""
    one = model()
    pairs = [Pair((1, 2, 3), tuple(range(10 + i, 10 + i + LENGTH))) for i in range(tokens // LENGTH)]
    batch = collate(pairs, 0, torch.device("cpu"))
    with torch.no_grad():
        fixed = shared_states(one, batch) * 1.01

    def step() -> None:
        found = positions(
            one, shared_states(one, batch), fixed, batch.targets, KlRev(name="kl_rev", lam=1, tau=0), chunk
        )
        (found.nll.mean() + found.d.mean()).backward()

    return risen(step)


def obvious(tokens: int, _: int) -> float:
    """GB at the peak of (b)."""
    one, ids = model(), torch.arange(10, 10 + tokens).view(-1, LENGTH)

    def step() -> None:
        with torch.no_grad():
            log_p = one(input_ids=ids).logits.float().log_softmax(-1) * 1.01
        log_q = one(input_ids=ids).logits.float().log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        (torch.nn.functional.nll_loss(log_q.flatten(0, 1), ids.flatten()) + kl).backward()

    return risen(step)


def main() -> None:
    runtime: Runtime = build(OmegaConf.load(CONF / "runtime/local.yaml"))
    chunk = runtime.positions(VOCABULARY)
    weights = 2 * VOCABULARY * WIDTH / 1e9
    print(f"vocabulary {VOCABULARY:,}, width {WIDTH}, head of {weights:.2f} GB, {chunk} positions a pass of the head")
    for way, run, tokens in (("(a) ours", ours, 4096), ("(b) obvious", obvious, 1024)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(f"{way:>12} {tokens:5} completion tokens: {pool.apply(run, (tokens, chunk)):6.2f} GB at the peak")


if __name__ == "__main__":
    main()
