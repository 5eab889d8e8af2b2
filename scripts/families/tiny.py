"""A tiny random model of any family that transformers knows: generic sizes by field name, and what some need besides.

Sizes follow from the names of a configuration's fields, at any depth of nesting, so that a family needs an entry of its
own only where its fields depend on each other in a way that no name tells.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from steer_heal.config import ConfigError
from steer_heal.model import maker
from steer_heal.model.tiny import tiny_tokenizer

FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})
DEPTH = 4
SPARE = 24  # ids beyond the tokenizer's, for the special tokens of images and sounds
SIZES: dict[float, str] = {  # value -> names of fields
    640: "max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length",
    48: "intermediate_size ffn_dim d_ff dff dim_ff n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size d_inner "
        "intermediate_size_mlp dense_intermediate_size",
    32: "hidden_size n_embd d_model embedding_dim dim out_hidden_size embed_dim emb_dim word_embed_proj_dim "
        "projection_dim text_hidden_size embedding_size hidden_size_global adapter_in_dim adapter_out_dim "
        "audio_hidden_size thinker_hidden_size adapter_input_size",
    24: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size",
    16: "index_n_heads q_lora_rank kv_lora_rank sliding_window attention_window_size sliding_window_size "
        "local_attention attention_chunk_size local_attention_window_len chunk_size mamba_chunk_size",
    8: "head_dim swa_head_dim v_head_dim qk_head_dim dim_head d_kv attention_head_size kv_channels mamba_n_heads "
       "mamba_d_head mamba_d_state mamba_num_heads mamba_head_dim ssm_state_size state_size linear_key_head_dim "
       "linear_value_head_dim linear_head_dim index_head_dim index_topk hidden_size_per_layer_input",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
       "num_decoder_attention_heads swa_num_attention_heads num_experts n_routed_experts num_local_experts "
       "moe_num_experts qk_rope_head_dim qk_nope_head_dim rotary_dim linear_num_value_heads linear_num_heads",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_k moe_topk "
       "num_experts_per_token num_key_value_groups linear_num_key_heads attn_layer_period laurel_rank "
       "num_kv_shared_layers",
    1: "n_group topk_group num_expert_group first_k_dense_replace attn_layer_offset",
    0.5: "logit_scale",  # Cohere's own leaves all words about equally likely
}  # fmt: skip
DEPTHS = [
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks",
    "encoder_layers", "num_encoder_layers", "depth",
]  # fmt: skip
BY_NAME = {name: size for size, names in SIZES.items() for name in names.split()} | dict.fromkeys(DEPTHS, DEPTH)
UNSET = {  # where the default is null: what real configurations always give
    "head_dim": 8, "num_key_value_heads": 4, "num_attention_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SECTIONS = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
TYPED: dict[str, dict[str, Any]] = {  # model type, at any depth -> fields that no general rule gives
    "chameleon": {"vocabulary_map": {"<image>": 400, "IMGIMGA": 401}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 48}},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 8, "swa_qk_nope_head_dim": 4, "swa_v_head_dim": 8,
    },
    "emu3": {
        "vocabulary_map": {"<image>": 400, "<|visual token 000001|>": 401, "<|extra_200|>": 402},
        "vq_config": {"base_channels": 32},
    },
    "dots1": {"n_shared_experts": 1},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "glm5_next": {"text_config": {"index_kpool": 4, "qk_rope_head_dim": 0, "head_dim": 8}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 1]]},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 32}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 24},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [2, 1, 1]}}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}, "moe_intermediate_size": [24, 24],
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"layer_types": ALTERNATING, "activation_sparsity_pattern": None},
    "gemma4_unified_text": {"layer_types": ALTERNATING},
    "glm46v_text": SECTIONS,
    "glm4v_text": SECTIONS,
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0]}},
    "glm_ocr_text": SECTIONS,
    "glmga_text": SECTIONS,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_vl_text": SECTIONS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "paddleocr_vl_text": SECTIONS,
    "qwen2_5_omni_text": SECTIONS,
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_vl_text": SECTIONS,
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "hc_lowrank": 8, "ple_embed_dim": 16, "ngram_vocab_size_base": 64,
        "split_ngram_parts": 4, "make_ngram_vocab_size_divisible_by": 8,
    },
    "reformer": {
        "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (32, 32), "attn_layers": ["local", "lsh"] * 2,
        "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "feed_forward_size": 48,
    },
    "step3p5": {"sliding_window": 16, "num_sliding_attention_heads": 4},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
NOT_TRIED = {
    "gemma4_assistant": "drafts for gemma4 and needs its states; it is no language model by itself",
    "granite4_vision": "no tiny configuration of its tower is known",
    "moshi": "transformers' own `generate` differs from its forward pass beyond the window",
}


def tiny_config(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Return the family's configuration at tiny sizes, with the ids of `tokenizer`.

    Raises whatever the family's own class raises for sizes that do not fit each other.
    """
    words = len(tokenizer)
    spare = itertools.cycle(range(words, words + SPARE))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    kind = CONFIG_MAPPING[family]
    return kind(**_fields(kind(), words + SPARE, spare, ends))


def _fields(usual: PreTrainedConfig, words: int, spare: Iterator[int], ends: dict[str, int | None]) -> dict[str, Any]:
    """Return arguments that make a tiny configuration like the usual one, those of its parts as dictionaries."""
    found = dict[str, Any]()
    depth = getattr(usual, "num_hidden_layers", None)
    for name, value in vars(usual).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = _part(value, words, spare, ends)
        elif name in ends:
            found[name] = next(spare) if name == "bos_token_id" and isinstance(value, int) else ends[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            found[name] = next(spare)
        elif name.startswith("vocab_size"):
            found[name] = words
        elif isinstance(value, int | float) and not isinstance(value, bool) and name in BY_NAME:
            found[name] = BY_NAME[name]
        elif value is None and name in UNSET:
            found[name] = UNSET[name]
        elif isinstance(value, list | tuple) and len(value) == depth != DEPTH:
            found[name] = _shortened(list(value), BY_NAME.get(name.removesuffix("_per_layer")))
        elif isinstance(value, dict) and "mrope_section" in value:
            found[name] = value | {
                "mrope_section": [2, 1, 1] if value.get("partial_rotary_factor", 1) == 1 else [1, 1, 0]
            }
    if "qk_rope_head_dim" in found:  # latent attention: only this part of a head is rotated
        found |= {"head_dim": found["qk_rope_head_dim"], "num_key_value_heads": found["num_attention_heads"]}
    if not usual.is_encoder_decoder and hasattr(usual, "is_decoder"):
        found["is_decoder"] = True  # as BERT is made a causal language model
    for name, value in TYPED.get(usual.model_type, {}).items():
        found[name] = found.get(name, {}) | value if name.endswith("_config") else value
    return found


def _part(usual: PreTrainedConfig, words: int, spare: Iterator[int], ends: dict[str, int | None]) -> dict[str, Any]:
    """Return the tiny configuration of a tower or of the text, with what the whole sets otherwise than by default."""
    alone, plain = vars(type(usual)()), (int, float, str)
    own = {k: v for k, v in vars(usual).items() if isinstance(v, plain) and not k.startswith("_") and alone.get(k) != v}
    return own | _fields(usual, words, spare, ends) | {"model_type": usual.model_type}


def _shortened(values: list[Any], size: float | None) -> list[Any]:
    """Return a value per block for few blocks: every kind there is, or the blocks' numbers that are left, or a size."""
    if size is not None:
        return [size] * DEPTH
    if values == list(range(len(values))):
        return list(range(DEPTH))
    kinds = list(dict.fromkeys(map(str, values)))
    ordered = [next(value for value in values if str(value) == kind) for kind in kinds]
    return (ordered * DEPTH)[:DEPTH]


def random_model(config: PreTrainedConfig, **how: Any) -> PreTrainedModel:
    """Return a model of random weights that are large enough for each of its parts to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        whole = AutoModelForMultimodalLM if type(config) in AutoModelForMultimodalLM._model_mapping else maker(config)
        model: PreTrainedModel = whole.from_config(config, **how)  # as published, even if the text alone is to be used
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("A_log"):
                nn.init.normal_(parameter, std=0.2)
            else:  # scales of norms, decays of state spaces: about where the family starts them
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def put_down(family: str, folder: Path) -> PreTrainedConfig:
    """Write the family's tiny model and the tiny tokenizer to a folder.

    Where no causal language model is made of the family, there is one weight in place of the model.
    """
    tokenizer = tiny_tokenizer()
    config = tiny_config(family, tokenizer)
    tokenizer.save_pretrained(folder)
    try:
        maker(config)
    except ConfigError:
        config.save_pretrained(folder)
        save_file({"weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
        return config
    model = random_model(config)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return config
