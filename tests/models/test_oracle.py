"""Each model of this list is right in full: heads, neurons, biases and blocks equal what taking them away
from the running model changes, and looking at the model changes no bit of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

import lmtt
from lmtt.structure.replay import dry_run, find_layers, finish
from lmtt.testing_models import perturb
from lmtt.testing_oracle import Layout, Parts, assert_complete, assert_trace, plain_run, take_away
from lmtt.testing_types import prompt, tiny_of_type

HEADS, NEURONS, EXPERTS = 4, 20, 8  # D = 32: the oracle tells neurons from the stream by their number

LLAMA = Layout("self_attn.o_proj", ("mlp.down_proj.weight",))
PACKED = replace(LLAMA, down=("mlp.experts.down_proj",))
GPT = Layout("attn.c_proj", ("mlp.c_proj.weight",))
SANDWICH = replace(
    LLAMA,
    attention_norm="post_attention_layernorm",
    mlp_norm="post_feedforward_layernorm",
)
DEEPSEEK = replace(LLAMA, down=("mlp.experts.down_proj", "mlp.shared_experts.down_proj.weight"))


@dataclass(frozen=True)
class Case:
    """A model type, its options, and where its layers keep their parts (the last layout is repeated)."""

    model_type: str
    layouts: tuple[Layout, ...]
    options: dict[str, Any]


def case(model_type: str, *layouts: Layout, **options: Any) -> Case:
    return Case(model_type, layouts, {**SMALL, **options})


SMALL: dict[str, Any] = {
    "intermediate_size": NEURONS,
    "moe_intermediate_size": EXPERTS,
}
CASES = {
    "llama": case("llama", LLAMA, attention_bias=True, mlp_bias=True),
    "llama_lora": case(
        "llama",
        replace(LLAMA, down=("mlp.down_proj.base_layer.weight+mlp.down_proj.lora_A.default.weight",)),
    ),
    "mistral": case("mistral", LLAMA),
    "mixtral": case("mixtral", PACKED, intermediate_size=EXPERTS),
    "qwen2": case("qwen2", LLAMA),
    "qwen2_moe": case(
        "qwen2_moe",
        replace(LLAMA, down=("mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight")),
        shared_expert_intermediate_size=8,
    ),
    "qwen3": case("qwen3", LLAMA),
    "qwen3_moe": case("qwen3_moe", LLAMA, PACKED, mlp_only_layers=[0]),
    "gemma": case("gemma", LLAMA),
    "gemma2": case(
        "gemma2", SANDWICH, attn_logit_softcapping=1.5, final_logit_softcapping=2.0, query_pre_attn_scalar=16
    ),
    "gemma3_text": case("gemma3_text", SANDWICH, query_pre_attn_scalar=16),
    "phi": case("phi", Layout("self_attn.dense", ("mlp.fc2.weight",)), partial_rotary_factor=0.5),
    "phi3": case("phi3", LLAMA),
    "gpt2": case("gpt2", GPT, n_inner=NEURONS),
    "gpt_neo": case("gpt_neo", Layout("attn.attention.out_proj", ("mlp.c_proj.weight",))),
    "gpt_neox": case("gpt_neox", Layout("attention.dense", ("mlp.dense_4h_to_h.weight",))),
    "gpt_neox_sequential": case(
        "gpt_neox", Layout("attention.dense", ("mlp.dense_4h_to_h.weight",)), use_parallel_residual=False
    ),
    "gptj": case("gptj", Layout("attn.out_proj", ("mlp.fc_out.weight",)), n_inner=NEURONS),
    "opt": case("opt", Layout("self_attn.out_proj", ("fc2.weight",)), ffn_dim=NEURONS),
    "opt_post_norm": case(
        "opt",
        Layout(
            "self_attn.out_proj", ("fc2.weight",),
            attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm", around=True,
        ),
        ffn_dim=NEURONS, do_layer_norm_before=False, word_embed_proj_dim=16,
    ),
    "bloom": case("bloom", Layout("self_attention.dense", ("mlp.dense_4h_to_h.weight",))),
    "falcon_7b": case(
        "falcon",
        Layout("self_attention.dense", ("mlp.dense_4h_to_h.weight",)),
        multi_query=True, new_decoder_architecture=False, alibi=False, bias=True, ffn_hidden_size=NEURONS,
    ),
    "falcon_40b": case(
        "falcon",
        Layout("self_attention.dense", ("mlp.dense_4h_to_h.weight",)),
        num_kv_heads=2, new_decoder_architecture=True, alibi=False, ffn_hidden_size=NEURONS,
    ),
    "falcon_alibi": case(
        "falcon",
        Layout("self_attention.dense", ("mlp.dense_4h_to_h.weight",)),
        multi_query=False, parallel_attn=False, alibi=True, bias=True, ffn_hidden_size=NEURONS,
    ),
    "mpt": case("mpt", Layout("attn.out_proj", ("ffn.down_proj.weight",))),
    "olmo": case("olmo", LLAMA),
    "olmo2": case("olmo2", SANDWICH),
    "olmoe": case("olmoe", PACKED, intermediate_size=EXPERTS),
    "granite": case(
        "granite", LLAMA,
        residual_multiplier=0.22, embedding_multiplier=3.0, logits_scaling=8.0, attention_multiplier=0.1,
    ),
    "granitemoe": case(
        "granitemoe", replace(LLAMA, down=("block_sparse_moe.experts.down_proj",)),
        intermediate_size=EXPERTS, residual_multiplier=0.22, attention_multiplier=0.1,
    ),
    "cohere": case("cohere", LLAMA, logit_scale=0.25, attention_bias=True),
    "cohere2": case("cohere2", LLAMA, logit_scale=0.25),
    "stablelm": case("stablelm", LLAMA, use_qkv_bias=True),
    "stablelm_parallel": case("stablelm", LLAMA, use_parallel_residual=True, qk_layernorm=True),
    "starcoder2": case("starcoder2", Layout("self_attn.o_proj", ("mlp.c_proj.weight",))),
    "nemotron": case("nemotron", LLAMA),
    "glm4": case(
        "glm4", replace(LLAMA, attention_norm="post_self_attn_layernorm", mlp_norm="post_mlp_layernorm")
    ),
    "exaone4": case("exaone4", SANDWICH),
    "smollm3": case("smollm3", LLAMA),
    "codegen": case("codegen", Layout("attn.out_proj", ("mlp.fc_out.weight",)), n_inner=NEURONS),
    "dbrx": case("dbrx", Layout("norm_attn_norm.attn.out_proj", ("ffn.experts.mlp.w2",))),
    "deepseek_v2": case("deepseek_v2", LLAMA, DEEPSEEK),
    "deepseek_v3": case("deepseek_v3", LLAMA, DEEPSEEK),
    "gpt_oss": case("gpt_oss", PACKED, intermediate_size=EXPERTS),
    "llama4_text": case(
        "llama4_text",
        replace(
            LLAMA, down=("feed_forward.experts.down_proj", "feed_forward.shared_expert.down_proj.weight")
        ),
        intermediate_size=EXPERTS,
    ),
    "gemma4_text": case(
        "gemma4_text",
        replace(
            SANDWICH,
            second=("per_layer_projection.weight", "post_per_layer_input_norm"),
            scale="layer_scalar",
        ),
    ),
    "qwen3_next": case(
        "qwen3_next",
        replace(LLAMA, down=("mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight"), attends=False),
        replace(LLAMA, down=("mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight")),
        shared_expert_intermediate_size=8,
    ),
}  # fmt: skip
NO_SDPA = {
    "gemma2",
    "gpt_neo",
    "gptj",
    "bloom",
    "mpt",
    "codegen",
    "gpt_oss",
}  # transformers has none for them
# Elsewhere both compute the same; falcon rounds and scales ALiBi differently in each.
DIFFERENT_SDPA = {"falcon_alibi"}
RUNS = [
    (name, attention)
    for name in CASES
    for attention in ("eager", "sdpa")
    if attention == "eager" or name not in NO_SDPA
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str, attention: str, dtype: torch.dtype) -> Any:
    known = CASES[name]
    model = tiny_of_type(known.model_type, dtype=dtype, attn_implementation=attention, **known.options)
    return with_adapters(model) if name.endswith("_lora") else model


def with_adapters(model: Any) -> Any:
    """The model in PEFT's wrapper, low-rank adapters on every kind of projection that matters here."""
    import peft

    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).eval()
    perturb(wrapped)
    return wrapped


@cache
def parts_of(name: str, attention: str = "eager") -> list[Parts]:
    """The oracle's answer for every layer of a model."""
    known = CASES[name]
    model = build(name, attention, torch.float64)
    _, stack = find_layers(model)
    run = plain_run(model, stack, prompt())
    layouts = [known.layouts[min(i, len(known.layouts) - 1)] for i in range(len(stack))]
    return [
        take_away(layer, layout, given, HEADS)
        for layer, layout, given in zip(stack, layouts, run.given, strict=True)
    ]


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_itself_is_complete(name: str) -> None:
    """What was taken away piece by piece is all that there was, and no piece was nothing."""
    for parts in parts_of(name):
        assert_complete(parts)
        assert (parts.pairs.abs().amax((-2, -1)) > 0).all(), "a head or source adds nothing"


@pytest.mark.parametrize(("name", "attention"), RUNS)
def test_heads_neurons_and_blocks_are_the_oracles(name: str, attention: str) -> None:
    engine = lmtt.load(build(name, attention, torch.float64))
    trace = engine.trace(input_ids=prompt()[0].numpy(), floor=0.0, neurons=1000)
    own = attention if name in DIFFERENT_SDPA else "eager"
    for layer, parts in enumerate(parts_of(name, own)):
        assert_trace(trace, layer, parts, f"{name}, layer {layer}")


@pytest.mark.parametrize(("name", "attention"), RUNS)
def test_looking_changes_no_bit(name: str, attention: str) -> None:
    """States and logits of a traced run are those of an ordinary one, and so is the model afterwards."""
    model, ids = build(name, attention, torch.float32), prompt()
    _, stack = find_layers(model)
    before = plain_run(model, stack, ids)
    trace = lmtt.load(model).trace(input_ids=ids[0].numpy())
    after = plain_run(model, stack, ids)
    assert trace.data.resid_pre is not None
    states = torch.from_numpy(trace.data.resid_pre)
    for layer, returned in enumerate(before.returned):
        assert torch.equal(states[layer + 1], returned[0]), f"resid_post of layer {layer}"
    traced = finish(model, ids, states[-1:], dry_run(model, ids))
    assert torch.equal(traced, before.logits)
    assert torch.equal(after.logits, before.logits)


@pytest.mark.parametrize("name", sorted(NO_SDPA))
def test_a_model_listed_without_sdpa_has_none(name: str) -> None:
    with pytest.raises(ValueError, match="does not support"):
        build(name, "sdpa", torch.float32)
