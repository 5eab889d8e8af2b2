"""Tiny random models of many families, and batches of random ids that begin alike."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from steer_heal.lm.batch import Batch, Pair, collate
from steer_heal.model import maker

WINDOW = 5  # shorter than the text of every test that is about windows
V = 60
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": V,
    "max_position_embeddings": 400,
}  # fmt: skip
GROUPED = {**SIZE, "num_key_value_heads": 2}
WINDOWED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
CAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {  # those that every test of attention and of prefixes is about
    "llama": ("LlamaConfig", GROUPED),
    "one_key_head": ("LlamaConfig", {**SIZE, "num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", {**GROUPED, **CAPPED, "head_dim": 4, **WINDOWED}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 4, **WINDOWED}),
    "qwen2": ("Qwen2Config", {**GROUPED, "use_sliding_window": True, **WINDOWED}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 6}),
    "phi": ("PhiConfig", SIZE),
    "phi3": ("Phi3Config", GROUPED),
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
    "selected_keys": (  # asks for its attention by name, to know whether to mask what it has not selected
        "DeepseekV32Config",
        {
            **SIZE,
            **LATENT,
            "num_key_value_heads": 4,
            "mlp_layer_types": ["dense"] * 2,
            "index_topk": 3,
            "index_n_heads": 16,
            "index_head_dim": 8,
        },
    ),
    "hybrid": ("Lfm2Config", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
}


INNER = {**GROUPED, **NO_IDS}
ROTARY = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1]}}
TOWER = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
WINDOWS = {"depth": 2, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1, "patch_size": 14}
SOUND = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "output_proj_dims": 16,
    "subsampling_conv_channels": [4, 4],
}  # fmt: skip
WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {  # language models beside towers of as many blocks as they have
    "gemma3_wrapped": (
        "Gemma3Config",
        {"text_config": {**INNER, "head_dim": 4, **WINDOWED}, "vision_config": TOWER, "mm_tokens_per_image": 4},
    ),
    "gemma4_wrapped": (
        "Gemma4Config",
        {
            "text_config": {
                **INNER, **WINDOWED, "layer_types": WINDOWED["layer_types"] * 2, "num_hidden_layers": 4, "head_dim": 4,
                "global_head_dim": 8, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 4,
                "vocab_size_per_layer_input": V, "pad_token_id": 0,
            },
            "vision_config": {**TOWER, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 4},
            "audio_config": SOUND,
        },
    ),
    "mistral3": (
        "Mistral3Config",
        {"text_config": {**INNER, "model_type": "mistral"}, "vision_config": {**TOWER, "model_type": "pixtral"}},
    ),
    "qwen2_vl": ("Qwen2VLConfig", {"text_config": {**INNER, **ROTARY}, "vision_config": WINDOWS}),
}  # fmt: skip


@functools.cache
def family(name: str, attention: str | None = None) -> PreTrainedModel:
    """The model of a name in PLAIN, ODD or WRAPPED, with its default attention or another."""
    kind, fields = (PLAIN | ODD | WRAPPED)[name]
    return built(kind, attention, **fields)


def built(kind: str, /, attention: Any = None, **fields: Any) -> PreTrainedModel:
    """A model of random weights that are large enough for each of its parts to matter."""
    config = getattr(transformers, kind)(**fields, **({} if "text_config" in fields else NO_IDS))
    how = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = maker(config).from_config(config, **how)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


BLOCKS = {  # where the families of `taller` keep them
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "gemma2": "model.layers",
    "gemma3": "model.layers",
    "gemma3_wrapped": "model.language_model.layers",
    "gemma4_wrapped": "model.language_model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "phi": "model.layers",
    "phi3": "model.layers",
    "olmo2": "model.layers",
    "qwen2_vl": "model.language_model.layers",
    "mistral3": "model.language_model.layers",
}
MORE = {"num_hidden_layers": 4, "n_layer": 4, "depth": 4, "max_position_embeddings": 640, "n_positions": 640}


def taller(name: str) -> PreTrainedModel:
    """The family's model with four blocks, towers as high beside it, and the tiny tokenizer's words and a few more."""

    def grown(fields: dict[str, Any]) -> dict[str, Any]:
        words = {key: 404 for key in fields if key.startswith("vocab_size")}
        inner = {key: grown(value) for key, value in fields.items() if isinstance(value, dict)}
        kinds = {key: (2 * value)[:4] for key, value in fields.items() if key == "layer_types"}
        return fields | {key: value for key, value in MORE.items() if key in fields} | words | inner | kinds

    kind, fields = (PLAIN | WRAPPED)[name]
    return built(kind, **grown(fields))


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
