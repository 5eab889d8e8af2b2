"""Tiny random models of many families, and batches of random ids that begin alike."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from steer_heal.batch import Batch, Pair, collate

WINDOW = 5  # shorter than the text of every test that is about windows
V = 60
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": V,
    "max_position_embeddings": 400,
}  # fmt: skip
GROUPED = {**SIZE, "num_key_value_heads": 2}
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {  # those that every test of attention and of prefixes is about
    "llama": ("LlamaConfig", GROUPED),
    "one_key_head": ("LlamaConfig", {**SIZE, "num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 4, "attn_logit_softcapping": 2.0, **WINDOWED}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 4, **WINDOWED}),
    "qwen2": ("Qwen2Config", {**GROUPED, "use_sliding_window": True, **WINDOWED}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 6}),
    "phi": ("PhiConfig", SIZE),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 400, "vocab_size": V}),
    "gpt_neox": ("GPTNeoXConfig", SIZE),
    "olmo2": ("Olmo2Config", GROUPED),
}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "narrow_values": ("DeepseekV2Config", {**SIZE, **LATENT, "first_k_dense_replace": 9}),
    "viewing": ("AfmoeConfig", {**GROUPED, "head_dim": 4, "num_dense_layers": 9, **WINDOWED}),
    "mask_a_head": ("DogeConfig", GROUPED),
    "own_sdpa": ("FalconConfig", {**SIZE, "alibi": True, "multi_query": False, "new_decoder_architecture": False}),
    "no_cache": ("OpenAIGPTConfig", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 99, "vocab_size": V}),
    "mamba": ("MambaConfig", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": V}),
    "keys_and_states": (
        "FalconH1Config",
        {**GROUPED, "mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4, "mamba_n_groups": 1},
    ),
    "hybrid": ("Lfm2Config", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
}


@functools.cache
def family(name: str, attention: str | None = None) -> PreTrainedModel:
    """The model of a name in PLAIN or ODD, with the attention that it has by default or another."""
    kind, fields = (PLAIN | ODD)[name]
    return built(kind, attention, **fields)


def built(kind: str, attention: str | None = None, **fields: Any) -> PreTrainedModel:
    """A model of random weights, which are large enough for each part of it to matter."""
    config = getattr(transformers, kind)(**fields, **NO_IDS)
    how = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, **how)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def ids(count: int, seed: int) -> tuple[int, ...]:
    """Random ids; those of seeds that differ by less than 20 differ in the first."""
    rng = torch.Generator().manual_seed(seed)
    return tuple([3 + seed % 20, *torch.randint(3, V, (count,), generator=rng).tolist()][:count])


def alike(prefix: int, tails: Sequence[int] = (3, 1, 6), completions: Sequence[int] = (4, 9, 1)) -> Batch:
    """Sequences whose prompts begin with the same `prefix` tokens and go on for `tails`, each from its first token."""
    shared = ids(prefix, 1000)
    pairs = [
        Pair(shared + ids(tail, 7 + i), ids(completion, 50 + i))
        for i, (tail, completion) in enumerate(zip(tails, completions, strict=True))
    ]
    return collate(pairs, 0, torch.device("cpu"))
