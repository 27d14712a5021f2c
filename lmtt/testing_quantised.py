"""Tiny quantised checkpoints made from drawn numbers: the stored tensors, and the weights they stand for.

Nothing of this uses a quantisation library or the functions it is there to test: numbers are drawn, packed
as each format stores them, and the weight is written down from the same numbers. `write_checkpoint` makes a
Llama (or gpt-oss, for MXFP4) of them, and its plain twin.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32  # columns that share a scale
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # in this order eight columns lie in a word, lowest bits first
MXFP4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Stored:
    """One weight: `tensors` by what follows its stem, and `weight` in float32, [O, I] or [E, I, O]."""

    tensors: dict[str, Tensor]
    weight: Tensor


Make = Callable[[int, int, torch.Generator], Stored]


@dataclass(frozen=True)
class Scheme:
    """A format: what the config says of it, and how a weight [O, I] is drawn."""

    facts: dict[str, Any]
    make: Make


def below(n: int, *shape: int, g: torch.Generator) -> Tensor:
    """Whole numbers in [0, n)."""
    return torch.randint(0, n, shape, generator=g)


def scales(*shape: int, g: torch.Generator) -> Tensor:
    """Between 0.01 and 0.05, float32."""
    return torch.rand(shape, generator=g) * 0.04 + 0.01


def pack_down(numbers: Tensor, bits: int) -> Tensor:
    """Consecutive rows into the words of one, lowest bits first: [n, m] -> int32 [n bits / 32, m]."""
    per = 32 // bits
    words = torch.zeros(numbers.shape[0] // per, numbers.shape[1], dtype=torch.int64)
    for n in range(per):
        words |= numbers[n::per].long() << bits * n
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def pack_across(numbers: Tensor, bits: int) -> Tensor:
    """Consecutive columns likewise: [n, m] -> int32 [n, m bits / 32]."""
    return pack_down(numbers.T, bits).T.contiguous()


def gptq(bits: int, version: str = "gptq", act_order: bool = False) -> Scheme:
    def make(rows: int, columns: int, g: torch.Generator) -> Stored:
        groups = columns // GROUP
        q, zero = below(1 << bits, columns, rows, g=g), below((1 << bits) - 1, groups, rows, g=g) + 1
        scale = scales(groups, rows, g=g).half()
        order = torch.randperm(columns, generator=g) if act_order else torch.arange(columns)
        g_idx = order // GROUP
        stored_zero = zero if version == "gptq_v2" else zero - 1
        tensors = {
            ".qweight": pack_down(q, bits),
            ".qzeros": pack_across(stored_zero, bits),
            ".scales": scale,
            ".g_idx": g_idx.int(),
        }
        return Stored(tensors, ((q - zero[g_idx]) * scale.float()[g_idx]).T)

    facts = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
    return Scheme(facts | {"desc_act": act_order, "sym": False}, make)


def awq() -> Scheme:
    def make(rows: int, columns: int, g: torch.Generator) -> Stored:
        groups = columns // GROUP
        q, zero = below(16, columns, rows, g=g), below(16, groups, rows, g=g)
        scale = scales(groups, rows, g=g).half()
        order = (torch.arange(0, rows, 8)[:, None] + torch.tensor(AWQ_COLUMNS)).flatten()
        tensors = {
            ".qweight": pack_across(q[:, order], 4),
            ".qzeros": pack_across(zero[:, order], 4),
            ".scales": scale,
        }
        wide = [x.repeat_interleave(GROUP, 0) for x in (zero, scale.float())]
        return Stored(tensors, ((q - wide[0]) * wide[1]).T)

    return Scheme({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, make)


def four_bit(kind: str, *, nested: bool) -> Scheme:
    """bitsandbytes NF4 and FP4: a table of 16 levels and a scale for 64 consecutive values."""
    block, nested_block = 64, 50

    def make(rows: int, columns: int, g: torch.Generator) -> Stored:
        levels = torch.rand(16, generator=g).sort().values - 0.5
        q, blocks = below(16, rows * columns, g=g), rows * columns // block
        state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [rows, columns]}
        tensors = {".weight": (q[0::2] << 4 | q[1::2]).to(torch.uint8)[:, None], ".weight.quant_map": levels}
        if nested:
            state |= {"nested_blocksize": nested_block, "nested_offset": 0.25, "nested_dtype": "float32"}
            code, code_map = below(256, blocks, g=g), torch.rand(256, generator=g)
            code_scale = scales(-(-blocks // nested_block), g=g)
            absmax = code_map[code] * code_scale.repeat_interleave(nested_block)[:blocks] + 0.25
            tensors |= {
                ".weight.absmax": code.to(torch.uint8),
                ".weight.nested_absmax": code_scale,
                ".weight.nested_quant_map": code_map,
            }
        else:
            absmax = scales(blocks, g=g) * 10
            tensors[".weight.absmax"] = absmax
        text = list(json.dumps(state).encode())
        tensors[f".weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(text, dtype=torch.uint8)
        return Stored(tensors, (levels[q] * absmax.repeat_interleave(block)).view(rows, columns))

    facts = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
    return Scheme({"quant_method": "bitsandbytes", "load_in_4bit": True, **facts}, make)


def int8() -> Scheme:
    """bitsandbytes LLM.int8()."""

    def make(rows: int, columns: int, g: torch.Generator) -> Stored:
        q, scb = below(255, rows, columns, g=g) - 127, scales(rows, g=g) * 10
        tensors = {
            ".weight": q.to(torch.int8),
            ".SCB": scb,
            ".weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return Stored(tensors, q * (scb / 127)[:, None])

    return Scheme({"quant_method": "bitsandbytes", "load_in_8bit": True}, make)


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def packed(bits: int, *, symmetric: bool, by_row: bool = False) -> Scheme:
    """compressed-tensors, integers in words."""

    def make(rows: int, columns: int, g: torch.Generator) -> Stored:
        half, groups = 1 << bits - 1, 1 if by_row else columns // GROUP
        q = below(1 << bits, rows, columns, g=g) - half
        scale = scales(rows, groups, g=g).bfloat16()
        zero = torch.zeros(rows, groups, dtype=torch.int64)
        tensors = {
            ".weight_packed": pack_across(q + half, bits),
            ".weight_scale": scale,
            ".weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            zero = below(2 * half, rows, groups, g=g) - half
            tensors[".weight_zero_point"] = pack_down(zero + half, bits)
        wide = [x.repeat_interleave(columns // groups, 1) for x in (zero, scale.float())]
        return Stored(tensors, (q - wide[0]) * wide[1])

    strategy = {"strategy": "channel"} if by_row else {"strategy": "group", "group_size": GROUP}
    facts = _compressed("pack-quantized", num_bits=bits, type="int", symmetric=symmetric, **strategy)
    return Scheme(facts, make)


def int_rows() -> Scheme:
    """compressed-tensors, one byte each and a scale for a row; the activations' scale is not the weight's."""

    def make(rows: int, columns: int, g: torch.Generator) -> Stored:
        q, scale = below(256, rows, columns, g=g) - 128, scales(rows, 1, g=g).bfloat16() / 8
        tensors = {".weight": q.to(torch.int8), ".weight_scale": scale}
        return Stored(tensors, q * scale.float())

    facts = _compressed("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel")
    return Scheme(facts, make)


def _float8(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return (torch.randn(rows, columns, generator=g) * 8).to(torch.float8_e4m3fn)


def float8(method: str = "compressed-tensors", *, by_row: bool = False) -> Scheme:
    def make(rows: int, columns: int, g: torch.Generator) -> Stored:
        q, scale = _float8(rows, columns, g), scales(*((rows, 1) if by_row else (1,)), g=g)
        return Stored({".weight": q, ".weight_scale": scale}, q.float() * scale)

    if method != "compressed-tensors":
        return Scheme({"quant_method": method}, make)
    strategy = "channel" if by_row else "tensor"
    facts = _compressed("float-quantized", num_bits=8, type="float", symmetric=True, strategy=strategy)
    return Scheme(facts, make)


def float8_blocks(m: int, n: int) -> Scheme:
    """The last blocks of a row or column may be smaller. m = 0: one scale for the whole weight."""

    def make(rows: int, columns: int, g: torch.Generator) -> Stored:
        q = _float8(rows, columns, g)
        if not m:
            scale = scales(g=g)
            return Stored({".weight": q, ".weight_scale_inv": scale}, q.float() * scale)
        scale = scales(-(-rows // m), -(-columns // n), g=g)
        wide = scale.repeat_interleave(m, 0)[:rows].repeat_interleave(n, 1)[:, :columns]
        return Stored({".weight": q, ".weight_scale_inv": scale}, q.float() * wide)

    size = [m, n] if m else None
    return Scheme({"quant_method": "fp8", "weight_block_size": size, "activation_scheme": "dynamic"}, make)


def mxfp4(experts: int, rows: int, columns: int, g: torch.Generator) -> Stored:
    """gpt-oss' experts, [E, I, O] of `rows` outputs and `columns` inputs."""
    q = below(16, experts, rows, columns, g=g)
    exponent = below(4, experts, rows, columns // GROUP, g=g) - 6
    blocks = (q[..., 0::2] | q[..., 1::2] << 4).view(experts, rows, columns // GROUP, GROUP // 2)
    levels = torch.tensor([*MXFP4_LEVELS, *(-x for x in MXFP4_LEVELS)])
    weight = levels[q] * (2.0 ** exponent.float()).repeat_interleave(GROUP, -1)
    tensors = {"_blocks": blocks.to(torch.uint8), "_scales": (exponent + 127).to(torch.uint8)}
    return Stored(tensors, weight.transpose(1, 2).contiguous())


SCHEMES: dict[str, Scheme] = {
    "GPTQ 4 bits": gptq(4),
    "GPTQ 4 bits, columns in any order": gptq(4, act_order=True),
    "GPTQ 8 bits": gptq(8),
    "GPTQ 2 bits, version 2": gptq(2, "gptq_v2"),
    "AWQ": awq(),
    "NF4": four_bit("nf4", nested=False),
    "NF4, scales quantised too": four_bit("nf4", nested=True),
    "FP4": four_bit("fp4", nested=False),
    "LLM.int8": int8(),
    "packed 4 bits": packed(4, symmetric=True),
    "packed 4 bits with zeros": packed(4, symmetric=False),
    "packed 8 bits with zeros": packed(8, symmetric=False),
    "packed 4 bits by row": packed(4, symmetric=True, by_row=True),
    "int8 rows": int_rows(),
    "FP8": float8(),
    "FP8 rows": float8(by_row=True),
    "FP8 rows, fbgemm": float8("fbgemm_fp8", by_row=True),
    "FP8 in blocks": float8_blocks(32, 32),
    "FP8 in blocks that do not divide": float8_blocks(32, 64),
    "FP8, one scale": float8_blocks(0, 0),
}


def _model(config: Any) -> Any:
    """Random, with norms and biases that are not constant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                draw = torch.randn_like(parameter) * 0.2
                parameter.copy_(1 + draw if "norm" in name else draw)
    return model


def write_checkpoint(folder: Path, name: str) -> tuple[Path, Path]:
    """A checkpoint in a format of `SCHEMES`, or "MXFP4", in two shards, and its plain float32 twin."""
    quantised, plain = folder / "quantised", folder / "plain"
    g = torch.Generator().manual_seed(1)
    gpt_oss = name == "MXFP4"
    if gpt_oss:
        config: Any = transformers.GptOssConfig(
            **SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
        )
        facts: dict[str, Any] = {"quant_method": "mxfp4"}
    else:
        config = transformers.LlamaConfig(**SIZES, attention_bias=True)
        facts = SCHEMES[name].facts
    _model(config).save_pretrained(plain)
    weights = load_file(plain / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for key, value in list(weights.items()):
        if gpt_oss and key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stem, made = key, mxfp4(value.shape[0], value.shape[2], value.shape[1], g)
        elif not gpt_oss and key.endswith("_proj.weight"):
            stem, made = key.removesuffix(".weight"), SCHEMES[name].make(value.shape[0], value.shape[1], g)
        else:
            stored[key] = value
            continue
        assert made.weight.shape == value.shape, key
        stored |= {stem + end: tensor.contiguous() for end, tensor in made.tensors.items()}
        weights[key] = made.weight.contiguous()
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    _write_shards(quantised, stored)
    text = json.loads((plain / "config.json").read_text()) | {"quantization_config": facts}
    (quantised / "config.json").write_text(json.dumps(text))
    return quantised, plain


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Every other tensor in the second one: the parts of a weight lie in both."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    place = {name: f"model-{n % 2 + 1:05d}-of-00002.safetensors" for n, name in enumerate(names)}
    for shard in sorted(set(place.values())):
        part = {name: tensors[name].contiguous() for name in names if place[name] == shard}
        save_file(part, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
