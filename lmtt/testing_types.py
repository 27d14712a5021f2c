"""A tiny random model of any causal-LM type that the installed transformers knows, and of some wrappers.

Configurations of all types share most of their names for sizes, so one table makes nearly every type
tiny; what a type needs beyond it stands in `OWN`, each entry a size that its code demands.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lmtt.testing_models import perturb

TOKENS = 7  # odd, longer than WINDOW
WINDOW = 3
VOCABULARY = 97
MAX_PARAMETERS = 3_000_000

SIZES: dict[str, Any] = {
    # width and depth
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim_model": 32, "num_hidden_layers": 2, "n_layer": 2,
    "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64,
    "word_embed_proj_dim": 32, "embedding_size": 32, "attention_hidden_size": 32, "d_embed": 32,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "dim_head": 8, "attention_head_dim": 8, "rotary_dim": 4, "global_head_dim": 8, "swa_head_dim": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "num_global_key_value_heads": 2,
    "swa_v_head_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8,
    "o_lora_rank": 16, "index_head_dim": 8, "index_n_heads": 4, "index_topk": 4, "sliding_window": WINDOW,
    "sliding_window_size": WINDOW, "window_size": WINDOW, "attention_chunk_size": WINDOW,
    # feed-forward and experts
    "intermediate_size": 20, "ffn_dim": 20, "decoder_ffn_dim": 20, "encoder_ffn_dim": 20, "n_inner": 20,
    "ffn_hidden_size": 20, "dim_ff": 20, "dff": 20,
    "block_multiple_of": 4, "intermediate_size_mlp": 20, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8,
    "expert_ffn_hidden_size": 8,
    "shared_intermediate_size": 8, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2,
    "num_selected_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0, "laurel_rank": 4, "zero_expert_num": 1,
    # states and convolutions
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "ssm_state_size": 8, "state_size": 8, "n_mamba_heads": 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "lru_width": 32,
    "time_step_rank": 4, "mamba_dt_rank": 4,
    # tokens that exist in so small a vocabulary
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "image_token_id": 3, "video_token_id": 4, "audio_token_id": 5, "image_token_index": 3,
    "video_token_index": 4, "audio_token_index": 5, "boi_token_id": 6, "eoi_token_id": 7,
    "vision_start_token_id": 8, "vision_end_token_id": 9,
    # what makes decoders of the types that are encoders by default
    "is_decoder": True,
}  # fmt: skip
ONE_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")
# What one type needs beyond SIZES: its validator or its code says so. `...` leaves a size as it is.
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROTARY, "mrope_section": [1, 1, 2]}}
_DOTS3 = {
    "num_key_value_heads": 4, "head_dim": 10, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 10, "swa_qk_nope_head_dim": 6,
    "swa_v_head_dim": 8, "shared_experts_intermediate_size": 8,
}  # fmt: skip
_QWEN4 = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2, "hc_lowrank": 8,
}  # fmt: skip
_ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
    "num_key_value_heads": 4, "attention_head_dim": 16, "attention_hidden_size": 64,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 50, "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32}, "vocab_size": 260,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROTARY, "full_attention": _ROTARY},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 2.0},
        "ffn_config": {"moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": _DOTS3, "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "falcon": {"head_dim": ...},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4": {"text_config": {"global_head_dim": 8}},
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified": {"text_config": {"global_head_dim": 8}},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "nemotron_h": {"n_groups": 2},
    "phi4_multimodal": {
        "audio_config": {
            "nemo_conv_channels": 8, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
            "num_blocks": 1,
        }
    },
    "prophetnet": {
        "num_hidden_layers": ..., "num_encoder_layers": 2, "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    },
    "qwen2_vl": {"text_config": _MROPE, "vision_config": {"embed_dim": 32, "depth": 2}},
    "qwen2_5_vl": {"text_config": _MROPE, "vision_config": {"depth": 2, "out_hidden_size": 32}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "roc_bert": {
        "pronunciation_embed_dim": 8, "pronunciation_vocab_size": 11, "shape_embed_dim": 8,
        "shape_vocab_size": 13,
    },
    "whisper": {"num_key_value_heads": ...},
    "xlnet": {"max_position_embeddings": ..., "d_inner": 20},
    "xlstm": {"v_head_dim": ..., "head_dim": ...},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
# Models of images and text that are no causal-LM types by themselves: their text decoders, given text only.
WRAPPERS = (
    "aya_vision", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3", "paligemma",
    "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm",
)  # fmt: skip
# Types whose causal language model is built from a part of their configuration.
DECODER_PART = {"musicgen": "decoder", "musicgen_melody": "decoder"}


def causal_types() -> list[str]:
    """Model types with a causal language model, as the installed transformers lists them."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def swept_types() -> list[str]:
    """All types that the sweep builds."""
    return sorted({*causal_types(), *WRAPPERS})


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A configuration of `model_type` with every size that it has made tiny; `overrides` win."""
    default = CONFIG_MAPPING[model_type]()
    config = CONFIG_MAPPING[model_type](**_tiny(default, {**OWN.get(model_type, {}), **overrides}))
    return getattr(config, DECODER_PART[model_type]) if model_type in DECODER_PART else config


def _tiny(default: Any, own: dict[str, Any]) -> dict[str, Any]:
    stored = default.to_dict()
    options = {k: v for k, v in SIZES.items() if k in stored or hasattr(default, k)}
    if "qk_rope_head_dim" in options:  # latent attention: every head has its own keys, rotated in part
        options |= {"num_key_value_heads": 4, "head_dim": options["qk_rope_head_dim"]}
    options |= _kinds_of_layers(default, stored)
    for name in getattr(default, "sub_configs", {}):
        inner = getattr(default, name, None)
        if inner is not None and not isinstance(inner, dict):
            options[name] = _tiny(inner, own.get(name, {}))
    options |= {k: v for k, v in own.items() if not isinstance(options.get(k), dict)}
    return {k: v for k, v in options.items() if v is not ...}


def _kinds_of_layers(default: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the default configuration lists, and a depth that fits."""
    given: dict[str, Any] = {n: getattr(default, n, None) for n in ONE_PER_LAYER if n in stored}
    lists = {n: v for n, v in given.items() if isinstance(v, list) and len(v) > 1}
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=False))
    first = sorted({kind: kinds.index(kind) for kind in kinds}.values())
    if len(first) == 1:
        first = [0, 1]
    depths = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    options: dict[str, Any] = {n: [v[i] for i in first] for n, v in lists.items()}
    return options | {n: len(first) for n in depths if n in stored}


def tiny_of_type(
    model_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Any:
    """A perturbed random model of `model_type`, in eval mode, on the CPU."""
    built = tiny_config(model_type, **overrides)
    wrapper = model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = transformers.AutoModelForImageTextToText if wrapper else transformers.AutoModelForCausalLM
    make = auto.from_config
    if model_type in DECODER_PART:
        make = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])._from_config
    with torch.device("meta"):
        size = sum(p.numel() for p in make(copy.deepcopy(built)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{model_type} has {size} parameters with every known size made tiny")
    torch.manual_seed(seed)
    model = make(built, dtype=dtype).eval()
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    perturb(model, seed)
    return model


def prompt(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCABULARY, (1, tokens), generator=generator)
