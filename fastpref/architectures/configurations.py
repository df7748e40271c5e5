# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of transformers' causal language models: every class's own defaults, with
sizes by the names that they go by, and what single architectures need beside.

Sizes fit each other: heads times head size is the hidden size, groups divide experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

VOCABULARY = 160
FIRST_WORD = 64  # ids below are special somewhere

# By the name of a field, wherever a configuration or a part of one has it.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "n_vocab"), VOCABULARY
    ),
    **dict.fromkeys(
        (
            *("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "dim"),
            *("input_embedding_size", "output_embedding_size", "out_hidden_size", "input_size"),
            *("backbone_hidden_size", "hidden_size_global", "kv_channels", "mm_embed_dim"),
            *("projector_input_dim", "projector_output_dim", "output_proj_dims"),
        ),
        32,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"),
            *("moe_intermediate_size", "shared_expert_intermediate_size", "dim_ff", "dff"),
            *("shared_intermediate_size", "shared_experts_intermediate_size", "mlp_dim"),
            *("intermediate_size_mlp", "ffn_hidden_size", "expert_ffn_hidden_size", "d_inner"),
            *("moe_shared_expert_intermediate_size", "dense_intermediate_size"),
            "feed_forward_size",
        ),
        48,
    ),
    **dict.fromkeys(
        (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
            *("encoder_layers", "num_encoder_layers", "num_decoder_layers", "depth"),
            *("conf_num_hidden_layers", "num_blocks", "num_global_layers"),
        ),
        2,
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
            *("encoder_attention_heads", "attention_heads", "num_encoder_attention_heads"),
            *("num_decoder_attention_heads", "conf_num_attention_heads", "linear_num_heads"),
            *("linear_num_value_heads", "index_n_heads", "swa_num_attention_heads"),
            *("num_key_value_heads", "kv_n_heads", "linear_num_key_heads"),
            *("swa_num_key_value_heads", "num_global_key_value_heads"),
        ),
        4,
    ),
    **dict.fromkeys(
        (
            *("head_dim", "dim_head", "attention_head_size", "qk_rope_head_dim", "v_head_dim"),
            *("qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim"),
            *("index_head_dim", "linear_head_dim", "kv_lora_rank", "q_lora_rank", "o_lora_rank"),
            *("rotary_dim", "global_head_dim", "router_hidden_size", "laurel_rank"),
            *("hidden_size_per_layer_input", "gated_norm_rank", "adapter_rank", "d_rel"),
            *("query_pre_attn_scalar", "pronunciation_embed_dim", "shape_embed_dim"),
        ),
        8,
    ),
    **dict.fromkeys(
        (
            *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
            *("zero_expert_num", "expert_num"),
        ),
        4,
    ),
    **dict.fromkeys(
        (
            *("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "topk", "top_k_experts"),
            *("n_group", "topk_group", "o_groups", "index_topk_blocks"),
        ),
        2,
    ),
    **dict.fromkeys(
        (
            *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_length"),
            *("context_length", "max_target_positions", "sliding_window", "local_attention"),
            *("attention_window_size", "sliding_window_size", "attention_chunk_size", "rel_extent"),
            *("window_size", "index_topk", "index_block_size", "keep_window_size", "mem_len"),
            *("original_max_position_embeddings",),
        ),
        64,
    ),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "num_kv_shared_layers"), 0),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("image_size", "crop_size"), 16),
    "patch_size": 8,
    "time_step_rank": 4,
    "mamba_d_ssm": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# BERT's family predicts the next token only as a decoder.
FLAGS = {"is_decoder": True, "use_cache": False}

# Of single architectures, over the above.
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"head_dim": 8, "n_shared_experts": 1},
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense", "dense"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "moshi": {"audio_vocab_size": 32},
    "reformer": {
        "axial_pos_shape": (3, 4),
        "axial_pos_embds_dim": (16, 16),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "rwkv": {"attention_hidden_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny(name: str) -> Any:
    """The configuration of architecture ``name``, a key of transformers' causal language models.

    Raises:
        Exception: any that the configuration's class raises.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    return kind(**_merged(_sizes(kind), OVERRIDES.get(name, {})))


def _sizes(kind: type[Any]) -> dict[str, Any]:
    """Of the fields of a configuration's class, and of those within it."""
    names = inspect.signature(kind).parameters
    found = {name: SIZES[name] for name in names if name in SIZES}
    special = [name for name in names if name not in SIZES and _is_token(name)]
    found |= {name: 3 + index for index, name in enumerate(special)}
    found |= {name: value for name, value in FLAGS.items() if name in names}
    # Numbers of a call must repeat, in train mode too.
    for name, field in names.items():
        if ("drop" in name or "jitter" in name) and _is_rate(field.default):
            found[name] = type(field.default)(0)
    return found | {name: part for name, part in _parts(kind) if name in names}


def _parts(kind: type[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configurations within one, of a text, a picture, an attention."""
    from transformers import CONFIG_MAPPING, AutoConfig

    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        default = getattr(kind, "sub_configs_defaults", {}).get(name)
        if part is not AutoConfig:
            yield name, _sizes(part)
        elif default is not None:
            model_type = default.model_type
            yield name, {**_sizes(CONFIG_MAPPING[model_type]), "model_type": model_type}


def _is_token(name: str) -> bool:
    return name.endswith(("_token_id", "_token_index"))


def _is_rate(default: Any) -> bool:
    return isinstance(default, (int, float)) and not isinstance(default, bool)


def _merged(given: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {**given, **over}
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            both[name] = _merged(given[name], value)
    return both
