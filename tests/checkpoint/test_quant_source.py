"""Quantised checkpoints read as plain ones: each format against its formula and against its library."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lmtt.checkpoint import quant_formats
from lmtt.checkpoint.quant_source import QuantisedSource, open_quantised
from lmtt.checkpoint.safetensors_source import open_safetensors
from lmtt.errors import CheckpointError
from lmtt.testing_quantised import pack_across, pack_down

ROWS, COLUMNS, GROUP = 48, 192, 64  # groups = 3
STEM = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Case:
    """Stored tensors, what the config says, and what the weights are."""

    stored: dict[str, Tensor]
    facts: dict[str, Any]
    want: dict[str, Tensor]


def draw(*shape: int, below: int = 0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (
        torch.randint(0, below, shape, generator=g) if below else torch.rand(shape, generator=g) * 0.1 + 0.01
    )


def by_group(x: Tensor, dim: int) -> Tensor:
    return x.repeat_interleave(GROUP, dim)


def gptq(bits: int, version: str, act_order: bool) -> Case:
    q, zero = draw(COLUMNS, ROWS, below=1 << bits), draw(3, ROWS, below=(1 << bits) - 1) + 1
    scales = draw(3, ROWS).half()
    g_idx = draw(COLUMNS, below=3) if act_order else torch.arange(COLUMNS) // GROUP
    stored_zero = zero if version == "gptq_v2" else zero - 1
    return Case(
        {
            f"{STEM}.qweight": pack_down(q, bits),
            f"{STEM}.qzeros": pack_across(stored_zero, bits),
            f"{STEM}.scales": scales,
            f"{STEM}.g_idx": g_idx.int(),
            f"{STEM}.bias": draw(ROWS).half(),
        },
        {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version},
        {f"{STEM}.weight": ((q - zero[g_idx]) * scales.float()[g_idx]).T, f"{STEM}.bias": draw(ROWS).half()},
    )


def awq() -> Case:
    q, zero, scales = draw(COLUMNS, ROWS, below=16), draw(3, ROWS, below=16), draw(3, ROWS).half()
    # column 8 w + AWQ_ORDER[n] lies in bits 4 n of word w
    order = (torch.arange(0, ROWS, 8)[:, None] + torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])).flatten()
    return Case(
        {
            f"{STEM}.qweight": pack_across(q[:, order], 4),
            f"{STEM}.qzeros": pack_across(zero[:, order], 4),
            f"{STEM}.scales": scales,
        },
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        {f"{STEM}.weight": ((q - by_group(zero, 0)) * by_group(scales.float(), 0)).T},
    )


def nf4(double: bool) -> Case:
    levels = draw(16, seed=5).sort().values - 0.05
    q = draw(ROWS * COLUMNS, below=16)
    blocks = ROWS * COLUMNS // GROUP
    state = {"quant_type": "nf4", "blocksize": GROUP, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]}
    stored = {f"{STEM}.weight": (q[0::2] << 4 | q[1::2]).to(torch.uint8)[:, None]}
    if double:
        state |= {"nested_blocksize": 50, "nested_offset": 0.25, "nested_dtype": "float32"}
        codes, code_map, code_scale = draw(blocks, below=256), draw(256), draw(-(-blocks // 50))
        absmax = code_map[codes] * code_scale.repeat_interleave(50)[:blocks] + 0.25
        stored |= {
            f"{STEM}.weight.absmax": codes.to(torch.uint8),
            f"{STEM}.weight.nested_absmax": code_scale,
            f"{STEM}.weight.nested_quant_map": code_map,
        }
    else:
        absmax = draw(blocks)
        stored[f"{STEM}.weight.absmax"] = absmax
    text = json.dumps(state).encode()
    stored |= {
        f"{STEM}.weight.quant_map": levels,
        f"{STEM}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }
    want = (levels[q] * absmax.repeat_interleave(GROUP)).view(ROWS, COLUMNS)
    return Case(stored, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {f"{STEM}.weight": want})


def int8() -> Case:
    q, scb = draw(ROWS, COLUMNS, below=255) - 127, draw(ROWS) * 50
    return Case(
        {
            f"{STEM}.weight": q.to(torch.int8),
            f"{STEM}.SCB": scb,
            f"{STEM}.weight_format": torch.tensor(0, dtype=torch.uint8),
        },
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {f"{STEM}.weight": q * (scb / 127)[:, None]},
    )


def packed(bits: int, symmetric: bool, strategy: str = "group") -> Case:
    half = 1 << bits - 1
    groups = 3 if strategy == "group" else 1
    q, scale = draw(ROWS, COLUMNS, below=1 << bits) - half, draw(ROWS, groups).bfloat16()
    zero = (
        torch.zeros(ROWS, groups, dtype=torch.int64)
        if symmetric
        else draw(ROWS, groups, below=2 * half) - half
    )
    wide = [x.repeat_interleave(COLUMNS // groups, 1) for x in (zero, scale.float())]
    stored = {
        f"{STEM}.weight_packed": pack_across(q + half, bits),
        f"{STEM}.weight_scale": scale,
        f"{STEM}.weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    if not symmetric:
        stored[f"{STEM}.weight_zero_point"] = pack_down(zero + half, bits)
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    facts = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    return Case(stored, facts, {f"{STEM}.weight": (q - wide[0]) * wide[1]})


def int_rows() -> Case:
    q, scale = draw(ROWS, COLUMNS, below=256) - 128, draw(ROWS, 1).bfloat16()
    facts = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8}}}}
    stored = {
        f"{STEM}.weight": q.to(torch.int8),
        f"{STEM}.weight_scale": scale,
        f"{STEM}.input_scale": draw(1),
    }
    return Case(stored, facts, {f"{STEM}.weight": q * scale.float()})


def fp8(scale_shape: tuple[int, ...], method: str = "compressed-tensors") -> Case:
    q, scale = (draw(ROWS, COLUMNS) * 100).to(torch.float8_e4m3fn), draw(*scale_shape)
    want = q.float() * (scale if scale.dim() == 2 else scale.reshape(-1, 1))
    return Case(
        {f"{STEM}.weight": q, f"{STEM}.weight_scale": scale},
        {"quant_method": method},
        {f"{STEM}.weight": want},
    )


def fp8_blocks() -> Case:
    """The last block row has 48 - 32 = 16 rows."""
    q, scale = (draw(ROWS, COLUMNS) * 100).to(torch.float8_e4m3fn), draw(2, 3)
    wide = scale.repeat_interleave(32, 0)[:ROWS].repeat_interleave(64, 1)
    return Case(
        {f"{STEM}.weight": q, f"{STEM}.weight_scale_inv": scale},
        {"quant_method": "fp8", "weight_block_size": [32, 64], "activation_scheme": "dynamic"},
        {f"{STEM}.weight": q.float() * wide},
    )


def mxfp4() -> Case:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stem = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = draw(3, ROWS, 4, 16, below=256).to(torch.uint8)
    scales = (draw(3, ROWS, 4, below=20) + 115).to(torch.uint8)
    return Case(
        {f"{stem}_blocks": blocks, f"{stem}_scales": scales, f"{stem}_bias": draw(3, ROWS)},
        {"quant_method": "mxfp4"},
        {
            stem: convert_moe_packed_tensors(blocks, scales, dtype=torch.float32),
            f"{stem}_bias": draw(3, ROWS),
        },
    )


CASES: dict[str, Callable[[], Case]] = {
    "gptq 4": lambda: gptq(4, "gptq", False),
    "gptq 4 act-order": lambda: gptq(4, "gptq", True),
    "gptq 8": lambda: gptq(8, "gptq", False),
    "gptq 2, version 2": lambda: gptq(2, "gptq_v2", False),
    "awq": awq,
    "nf4": lambda: nf4(False),
    "nf4 double": lambda: nf4(True),
    "int8": int8,
    "packed 4": lambda: packed(4, True),
    "packed 4 with zeros": lambda: packed(4, False),
    "packed 8 with zeros": lambda: packed(8, False),
    "packed 4, one scale for a row": lambda: packed(4, True, "channel"),
    "int rows": int_rows,
    "fp8, one scale": lambda: fp8((1,)),
    "fp8, rows": lambda: fp8((ROWS, 1)),
    "fp8, rows, fbgemm": lambda: fp8((ROWS, 1), "fbgemm_fp8"),
    "fp8 blocks": fp8_blocks,
    "mxfp4": mxfp4,
}


def opened(folder: Path, case: Case) -> QuantisedSource:
    plain = {"model.embed_tokens.weight": draw(7, 6).bfloat16()}
    save_file(
        {name: x.contiguous() for name, x in (case.stored | plain).items()}, folder / "model.safetensors"
    )
    return open_quantised(open_safetensors(folder), SimpleNamespace(quantization_config=case.facts))


def read(source: QuantisedSource, name: str, dtype: torch.dtype, lead: int = 0) -> Tensor:
    """All of a weight, read in two parts into a buffer that begins `lead` bytes after an aligned address."""
    info = source.tensors[name]
    raw = torch.empty(lead + info.nbytes, dtype=torch.uint8)[lead:]
    view, half = memoryview(raw.numpy()), info.nbytes // 2
    source.read_into(name, view[half:], half)
    source.read_into(name, view[:half])
    out = torch.full(info.shape, torch.nan, dtype=dtype)
    source.decode(name, raw, out)
    return out


@pytest.mark.parametrize("name", CASES)
def test_weights_are_the_formula_s(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    source = opened(tmp_path, case)
    assert set(source.tensors) == {*case.want, "model.embed_tokens.weight"}
    for chunk in (quant_formats.CHUNK, 1000):  # in one piece, and in many with a smaller last one
        monkeypatch.setattr(quant_formats, "CHUNK", chunk)
        for weight, want in case.want.items():
            assert source.tensors[weight].shape == tuple(want.shape)
            for dtype in (torch.float32, torch.bfloat16):
                got = read(source, weight, dtype, lead=1)
                assert torch.equal(got, want.to(dtype)), f"{(got - want).abs().max()}"
    assert torch.equal(read(source, "model.embed_tokens.weight", torch.bfloat16), draw(7, 6).bfloat16())


def test_single_experts(tmp_path: Path) -> None:
    case = mxfp4()
    source = opened(tmp_path, case)
    name, want = next(iter(case.want.items()))
    info = source.tensors[name]
    assert info.rows
    size = info.nbytes // 3
    raw, out = torch.empty(size, dtype=torch.uint8), torch.empty(1, *info.shape[1:])
    source.read_into(name, memoryview(raw.numpy()), 2 * size)
    source.decode(name, raw, out, range(2, 3))
    assert torch.equal(out, want[2:])


def test_refusals(tmp_path: Path) -> None:
    case = CASES["gptq 4"]()
    stored = {name: x for name, x in case.stored.items() if not name.endswith("scales")}
    with pytest.raises(CheckpointError, match=r"qweight is there and .*\.scales is not"):
        opened(tmp_path, Case(stored, case.facts, {}))
    with pytest.raises(CheckpointError, match="got 3"):
        opened(tmp_path, Case(case.stored, case.facts | {"bits": 3}, {}))
    with pytest.raises(CheckpointError, match="got aqlm"):
        opened(tmp_path, Case(case.stored, {"quant_method": "aqlm"}, {}))
    source = opened(tmp_path, Case(awq().stored, awq().facts | {"version": "gemv"}, {}))
    with pytest.raises(CheckpointError, match="version gemm"):
        read(source, f"{STEM}.weight", torch.float32)
    broken = CASES["nf4"]()
    broken.stored[f"{STEM}.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="not a quantisation state"):
        opened(tmp_path, broken)


def test_bitsandbytes_own_dequantisation(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    for nested in (False, True):
        for kind in ("nf4", "fp4"):
            q, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
            stored = {f"{STEM}.weight": q}
            stored |= {f"{STEM}.weight.{key}": x for key, x in state.as_dict(packed=True).items()}
            source = opened(tmp_path, Case(stored, {"quant_method": "bitsandbytes"}, {}))
            want = functional.dequantize_4bit(q, state)
            torch.testing.assert_close(read(source, f"{STEM}.weight", torch.float32), want, rtol=2e-7, atol=0)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, False)])
def test_compressed_tensors_own_dequantisation(bits: int, symmetric: bool, tmp_path: Path) -> None:
    packing = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.base", reason="compressed-tensors is not installed"
    )
    quantization = pytest.importorskip("compressed_tensors.quantization")
    case = packed(bits, symmetric)
    arguments = quantization.QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=GROUP
    )
    local = {name.removeprefix(STEM + "."): x for name, x in case.stored.items()}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    want = packing.PackedQuantizationCompressor.decompress(local, scheme)["weight"]
    got = read(opened(tmp_path, case), f"{STEM}.weight", want.dtype)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)  # it multiplies in bfloat16


def test_transformers_own_fp8_dequantisation(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    q, scale = (draw(ROWS, COLUMNS) * 100).to(torch.float8_e4m3fn), draw(2, 3)
    facts = {"quant_method": "fp8", "weight_block_size": [ROWS // 2, 64]}
    source = opened(tmp_path, Case({f"{STEM}.weight": q, f"{STEM}.weight_scale_inv": scale}, facts, {}))
    want = Fp8Dequantize(None)._dequantize_one(q, scale, torch.float32)
    assert torch.equal(read(source, f"{STEM}.weight", torch.float32), want)
