"""Stored tensors of quantised checkpoints to weights: one function for each format, with its formula.

Every function takes the stored tensors of one weight by role and fills `out`, [rows, columns] as `nn.Linear`
has it, rounding once from float32. It works on pieces of CHUNK values, so that nothing of the weight's size
is held beside it. What a layer computes from such a weight is the dequantised model: kernels that multiply
quantised activations are not imitated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lmtt.errors import CheckpointError

CHUNK = 1 << 21  # values decoded at once
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1; the fourth bit is the sign
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each of a word's eight numbers, lowest bits first

Facts = Mapping[str, Any]  # what a checkpoint's config says of its quantisation
Decode = Callable[[Mapping[str, Tensor], Tensor, Facts], None]


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Of the rows, about CHUNK values each."""
    step = max(1, CHUNK // max(columns, 1))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def unpack(words: Tensor, bits: int) -> Tensor:
    """The numbers in int32 words, lowest bits first: [..., n] -> [..., n * 32 / bits], int32."""
    if words.dtype != torch.int32:
        raise CheckpointError("packed numbers are not in words", expected="int32", got=words.dtype)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def bits_of(facts: Facts) -> int:
    """Bits of a number, of those whose numbers fill a 32-bit word evenly.

    Raises CheckpointError for others.
    """
    bits = facts.get("bits", facts.get("num_bits"))
    if bits not in (2, 4, 8):
        raise CheckpointError(
            "quantised weights of this width are not read", expected="2, 4 or 8 bits", got=bits
        )
    return int(bits)


def gptq(stored: Mapping[str, Tensor], out: Tensor, facts: Facts) -> None:
    """W[o, i] = scales[g, o] (q[i, o] - zero[g, o]), g = g_idx[i].

    qweight : int32 [I bits / 32, O], numbers of one column under each other
    qzeros : int32 [G, O bits / 32]; the format "gptq" stores zero - 1, "gptq_v2" zero itself
    scales : [G, O]; g_idx : int32 [I], or absent: groups of group_size in order
    """
    bits = bits_of(facts)
    columns = out.shape[1]
    zeros = unpack(stored["qzeros"], bits)
    if facts.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = zeros + 1 & (1 << bits) - 1
    scales = stored["scales"].float()
    size = facts.get("group_size", -1)
    size = columns if size in (-1, None) else size
    group = stored.get("g_idx", torch.arange(columns) // size).long()
    per_word = 32 // bits
    for words in pieces(columns // per_word, out.shape[0] * per_word):
        q = unpack(stored["qweight"][words].T, bits)  # [O, some of I]
        at = slice(words.start * per_word, words.stop * per_word)
        out[:, at] = (q - zeros[group[at]].T).float().mul_(scales[group[at]].T)


def awq(stored: Mapping[str, Tensor], out: Tensor, facts: Facts) -> None:
    """W[o, i] = scales[g, o] (q[i, o] - zero[g, o]), g = i // group_size.

    qweight : int32 [I, O / 8] and qzeros : int32 [G, O / 8], eight columns in a word in the order AWQ_ORDER
    scales : [G, O]
    """
    if bits_of(facts) != 4 or facts.get("version", "gemm").lower() != "gemm":
        raise CheckpointError(
            "AWQ weights of this kind are not read", expected="4 bits, version gemm", got=dict(facts)
        )
    rows, columns = out.shape
    scales = stored["scales"].float()
    size = columns // len(scales)
    place = torch.tensor(AWQ_ORDER).argsort()  # of each column among a word's numbers

    def numbers(words: Tensor) -> Tensor:
        return unpack(words, 4).reshape(*words.shape, 8)[..., place].flatten(-2)

    zeros = numbers(stored["qzeros"])
    for at in pieces(columns, rows):
        group = torch.arange(at.start, at.stop) // size
        out[:, at] = ((numbers(stored["qweight"][at]) - zeros[group]).float() * scales[group]).T


def nf4(stored: Mapping[str, Tensor], out: Tensor, facts: Facts) -> None:
    """W.flat[n] = map[q[n]] absmax[n // blocksize]; of a byte's two numbers the high one comes first.

    Where absmax is quantised too, it is nested_map[absmax[b]] nested_absmax[b // nested_blocksize] + offset.
    Maps and the state (JSON) with the sizes are stored with the weight; FP4 differs in its map alone.
    """
    state = json.loads(bytes(stored["state"].tolist()))
    absmax = stored["absmax"]
    if "nested_absmax" in stored:
        nested = stored["nested_absmax"].float().repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        absmax = stored["nested_quant_map"][absmax.long()] * nested + state["nested_offset"]
    packed, levels = stored["weight"].flatten(), stored["quant_map"].float()
    flat, size = out.view(-1), int(state["blocksize"])
    for blocks in pieces(len(absmax), size):
        some = packed[blocks.start * size // 2 : blocks.stop * size // 2]
        values = levels[torch.stack([some >> 4, some & 15], -1).flatten().int()]
        scale = absmax[blocks].float().repeat_interleave(size)[: len(values)]
        flat[blocks.start * size : blocks.start * size + len(values)] = values.mul_(scale)


def int8_rows(stored: Mapping[str, Tensor], out: Tensor, facts: Facts) -> None:
    """W[o, i] = q[o, i] SCB[o] / 127, q int8: bitsandbytes' LLM.int8()."""
    if "weight_format" in stored and int(stored["weight_format"]) != 0:
        raise CheckpointError(
            "int8 weights are laid out for one GPU's kernels",
            expected="weight_format 0, rows",
            got=int(stored["weight_format"]),
        )
    scale = stored["SCB"].float() / 127
    for at in pieces(*out.shape):
        out[at] = stored["weight"][at].float().mul_(scale[at, None])


def packed_int(stored: Mapping[str, Tensor], out: Tensor, facts: Facts) -> None:
    """W[o, i] = scale[o, g] (q[o, i] - zero[o, g]), q = number - 2^(bits - 1): "pack-quantized".

    weight_packed : int32 [O, I bits / 32]
    weight_zero_point : int32 [O bits / 32, G], packed downwards, or absent
    weight_scale : [O, G], [O, 1] or [1]; weight_g_idx : [I], or absent: groups in order
    """
    bits = bits_of(facts)
    rows, columns = out.shape
    half = 1 << bits - 1
    scale = _grid(stored["weight_scale"], rows)
    zeros = None
    if "weight_zero_point" in stored:
        zeros = (unpack(stored["weight_zero_point"].T.contiguous(), bits)[:, :rows] - half).T
    group = _groups(stored, scale.shape[1], columns)
    for at in pieces(rows, columns):
        q = unpack(stored["weight_packed"][at], bits)[:, :columns] - half
        q = q if zeros is None else q - zeros[at][:, group]
        out[at] = q.float().mul_(scale[at][:, group])


def scaled(stored: Mapping[str, Tensor], out: Tensor, facts: Facts) -> None:
    """W[o, i] = scale[o, g] (q[o, i] - zero[o, g]), q int8 or float8: "int-quantized", "float-quantized".

    weight_scale : [O, G], [O, 1], [O], [1] or a scalar; weight_zero_point likewise, or absent
    """
    rows, columns = out.shape
    scale = _grid(stored["weight_scale"], rows)
    zeros = _grid(stored["weight_zero_point"], rows) if "weight_zero_point" in stored else None
    group = _groups(stored, scale.shape[1], columns)
    for at in pieces(rows, columns):
        q = stored["weight"][at].float()
        q = q if zeros is None else q - zeros[at][:, group]
        out[at] = q * scale[at][:, group]


def fp8_blocks(stored: Mapping[str, Tensor], out: Tensor, facts: Facts) -> None:
    """W[o, i] = q[o, i] weight_scale_inv[o // m, i // n], q float8; the last blocks may be smaller.

    A scale of one byte is a power of two, 2^(byte - 127). m and n are the config's `weight_block_size` where
    that makes as many blocks as there are scales, else what divides the weight into so many.
    """
    if not stored["weight"].is_floating_point():
        raise CheckpointError("FP8 weights of another type", expected="float8", got=stored["weight"].dtype)
    scale = stored["weight_scale_inv"]
    if scale.dtype == torch.uint8:
        scale = (scale.float() - 127).exp2()
    scale = scale.float().reshape(scale.shape if scale.dim() == 2 else (1, 1))
    m, n = _block(facts.get("weight_block_size"), out.shape, scale.shape)
    down, across = torch.arange(out.shape[0]) // m, torch.arange(out.shape[1]) // n
    for at in pieces(*out.shape):
        out[at] = stored["weight"][at].float().mul_(scale[down[at]][:, across])


def mxfp4(stored: Mapping[str, Tensor], out: Tensor, facts: Facts) -> None:
    """W[e, i, o] = FP4[q[e, o, i]] 2^(scale[e, o, i // 32] - 127): gpt-oss' experts, stored transposed.

    blocks : uint8 [E, O, G, 16], of a byte's two numbers the low one first; scales : uint8 [E, O, G]
    """
    levels = torch.tensor([*FP4, *(-x for x in FP4)])
    for e in range(len(out)):
        rows, groups, half = stored["blocks"].shape[1:]
        for at in pieces(rows, groups * half * 2):
            some = stored["blocks"][e, at]
            values = levels[torch.stack([some & 15, some >> 4], -1).flatten(-2).int()]
            scale = (stored["scales"][e, at].float() - 127).exp2()
            out[e][:, at] = values.mul_(scale[..., None]).flatten(-2).T


def _block(named: list[int] | None, weight: torch.Size, grid: torch.Size) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    if named is not None and tuple(grid) == tuple(-(-n // b) for n, b in zip(weight, named, strict=True)):
        return named[0], named[1]
    if weight[0] % grid[0] or weight[1] % grid[1]:
        raise CheckpointError(
            f"a weight of {list(weight)} has {list(grid)} scales", expected=f"one for each block of {named}"
        )
    return weight[0] // grid[0], weight[1] // grid[1]


def _grid(scale: Tensor, rows: int) -> Tensor:
    """[rows, groups] float32 of one scale for all, one for each row, or one for each group of a row."""
    scale = scale.float()
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    return scale.expand(rows, -1)


def _groups(stored: Mapping[str, Tensor], groups: int, columns: int) -> Tensor:
    """The group of each column."""
    if "weight_g_idx" in stored and (stored["weight_g_idx"] >= 0).all():
        return stored["weight_g_idx"].long()
    return torch.arange(columns) // -(-columns // groups)
