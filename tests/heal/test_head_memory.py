"""Memory of the head with a vocabulary of 262,144, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.compose import composed

pytestmark = [pytest.mark.slow(30), pytest.mark.long]

N, D, V = 4096, 8, 262_144
GIB = 2**30
LIMIT = 1.5e9  # bytes above what the process holds before; [N, V] alone would be 4.3e9 in float32
SCRIPT = """
import json, resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from steer_heal.heal.chunked_nll import positions
from steer_heal.reg.kl_rev import KlRev

n, d, v, chunk = json.loads(sys.argv[1])
reg = KlRev(name="kl_rev", lam=1.0, tau=0.0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=d, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=v,
    bos_token_id=None, eos_token_id=None,
)).eval().requires_grad_(False)
hidden = torch.randn(n, d)
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def step(rows):
    state = hidden[:rows].clone().requires_grad_()
    found = positions(model, state, hidden[:rows] + 0.1, torch.arange(rows), reg, chunk, measure=True)
    (found.nll.mean() + found.d.mean()).backward()
    assert state.grad.isfinite().all() and found.nll.isfinite().all()
step(1)  # what is loaded at first use is no matter of size
before = peak()
step(n)
print(json.dumps([before, peak()]))
"""


def test_a_large_vocabulary() -> None:
    """Reference: the most memory that the process ever held (ru_maxrss), by the chunk of a laptop's sizes."""
    chunk = composed().runtime.positions(V)
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([N, D, V, chunk])],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    before, after = json.loads(ran.stdout.splitlines()[-1])
    assert after - before < LIMIT, f"{after - before:.2e} bytes above the {before:.2e} before"
