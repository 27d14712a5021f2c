"""Tiny random models in which every feature bites: what tests run on instead of downloads.

A freshly initialised model proves little: its biases are zero and its norm weights one, so forgetting
either passes. Here every parameter is random and non-constant, multipliers differ from one, softcaps
are of the size of the logits, and windows are shorter than an odd number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

TOKENS = 11  # odd, longer than WINDOW
WINDOW = 4
VOCABULARY = 97

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GQA = {**_BASE, "num_key_value_heads": 2, "intermediate_size": 48}
_GPT = {
    **{k: _BASE[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
}
_GEMMA = {**_GQA, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
_MOE = {**_GQA, "num_experts_per_tok": 2}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GQA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", _GQA),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 8}),
    "gpt2": ("GPT2Config", _GPT),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            **{k: v for k, v in _BASE.items() if not k.startswith("num_")},
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {
            **_GEMMA,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "attn_implementation": "eager",  # sdpa leaves the softcap out
        },
    ),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "olmo2": ("Olmo2Config", _GQA),
    "granite": (
        "GraniteConfig",
        {
            **_GQA,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 3.0,
            "logits_scaling": 8.0,
            "attention_multiplier": 0.1,
        },
    ),
    "cohere": ("CohereConfig", {**_GQA, "logit_scale": 0.25, "attention_bias": True}),
    "gpt_neox": ("GPTNeoXConfig", {**_BASE, "intermediate_size": 48}),
    "phi": ("PhiConfig", {**_GQA, "partial_rotary_factor": 0.5}),
    "opt": ("OPTConfig", {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt_post_norm": (
        "OPTConfig",
        {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bloom": (
        "BloomConfig",
        {**{k: _GPT[k] for k in _GPT if k not in ("n_embd", "n_positions")}, "hidden_size": 32},
    ),
    "falcon": ("FalconConfig", {**_BASE, "multi_query": True, "bias": True, "alibi": False}),
    "falcon_sequential": (
        "FalconConfig",
        {**_BASE, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "stablelm": ("StableLmConfig", {**_GQA, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2Config", _GQA),
    "glm4": ("Glm4Config", {**_GQA, "head_dim": 8}),
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_MOE, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "afmoe": (  # a gate on the attention's output, sandwich norms, experts after dense layers
        "AfmoeConfig",
        {
            **_MOE,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "num_dense_layers": 1,
            "global_attn_every_n_layers": 2,
        },
    ),
    "deepseek_v3": (  # latent attention: values of another width than queries and keys
        "DeepseekV3Config",
        {
            **{k: v for k, v in _MOE.items() if k != "num_key_value_heads"},
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 8,
        },
    ),
    "bitnet": ("BitNetConfig", _GQA),  # a norm between the attention and W_O
    "diffllama": ("DiffLlamaConfig", {**_GQA, "num_hidden_layers": 2}),  # a difference of two attentions
    "doge": ("DogeConfig", {**_GQA, "num_hidden_layers": 2}),  # the stream itself rescaled by channel
    "gpt_neox_japanese": (  # a bias added beside the attention, in the last layer only
        "GPTNeoXJapaneseConfig",
        {**_BASE, "num_hidden_layers": 2, "intermediate_multiple_size": 2},
    ),
    "llama4": (  # experts in one batched product, the router's weight on their input; chunked attention
        "Llama4TextConfig",
        {
            **_MOE,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "attention_chunk_size": WINDOW,
        },
    ),
    "gemma4": (  # three additions, then a factor on all of it; keys and values shared between layers
        "Gemma4TextConfig",
        {
            **_GQA,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "global_head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "qwen3_next": (  # linear attention in one layer, gated attention in the other
        "Qwen3NextConfig",
        {
            **_MOE,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 8,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_MOE, "num_local_experts": 4, "head_dim": 8, "sliding_window": WINDOW},
    ),
}

# Models that older releases of transformers have not, or have wrong: tests of them are skipped there.
SINCE: dict[str, tuple[tuple[int, int], str]] = {
    "gemma4": ((5, 17), "older transformers has it not"),
    "afmoe": ((5, 17), "older transformers fills its experts' rows into a buffer, which is refused"),
    "doge": ((5, 23), "older transformers lets it attend to later tokens with sdpa, which is refused"),
}


def tiny_model(
    name: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int | None = None,
    **config: Any,
) -> Any:
    """A perturbed random model of CONFIGS[name], in eval mode, on the CPU.

    dtype: of the parameters; rotary tables stay float32 as `from_pretrained` leaves them.
    config: overrides of the configuration, such as attn_implementation="eager".
    Raises SkipTest where the installed transformers is too old for it (SINCE).
    """
    import transformers

    since, why = SINCE.get(name, ((5, 0), ""))
    if tuple(int(n) for n in transformers.__version__.split(".")[:2]) < since:
        raise SkipTest(f"{name} on transformers {transformers.__version__}: {why}")
    class_name, options = CONFIGS[name]
    options = {**options, **config}
    if layers is not None:
        key = next(k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in options)
        options[key] = layers
    # Configurations note keywords that they do not know; ours are tables for many classes.
    built = getattr(transformers, class_name)(**options)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(built, dtype=dtype).eval()
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    perturb(model, seed)
    return model


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter random, non-constant values of a size at which it matters.

    Matrices N(0, 0.25 or so), biases N(0, 0.5), norm weights U(0.5, 1.5) where they start at one and
    U(-0.5, 0.5) where they start at zero (the 1 + weight convention), sinks N(0, 1). Stored buffers, such as
    a router's correction or a layer's scale, are moved by U(-0.5, 0.5).
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: torch.Size, uniform: bool = False) -> Tensor:
        make: Callable[..., Tensor] = torch.rand if uniform else torch.randn
        return make(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                value = draw(parameter.shape) * 0.2
            elif name.endswith("sinks"):
                value = draw(parameter.shape)
            elif "norm" in name.lower() or "ln_" in name:
                centre = 1.0 if bool((parameter == 1).all()) else 0.0
                value = draw(parameter.shape, uniform=True) - 0.5 + centre
            else:
                value = draw(parameter.shape) * 0.5
            parameter.copy_(value.to(parameter.dtype))
        stored = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                moved = buffer.double() + draw(buffer.shape, uniform=True) - 0.5
                buffer.copy_(moved.to(buffer.dtype))


def tiny_prompt(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """Token ids [1, tokens] for any of these models."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, tokens), generator=generator)
