"""The screen of all (head, source) pairs on a GPU: flash-attention-shaped, a program per tile.

1. `_screen`         any tile: A from q, k and log-sum-exp, g and its bound; first-order values summed over
                     heads, by head and in row statistics, and bits of the pairs that need more.
2. `_screen_inside`  the same for tiles in which consecutive rows see everything: no masks, sums that stay
                     within a thread until the last head is done, keys and values kept for their heads.
3. `_turn_bits`      bits by row to bits by source, the order in which pairs are evaluated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtt.kernels.directional_attention.fused import inside_arguments, tile_arguments
from lmtt.kernels.numerics import L2_NEARLY_EQUAL
from lmtt.kernels.triton_bricks import (
    LOG2_E,
    VARIES,
    fold,
    inside_pairs,
    is_inside,
    load_inside,
    pack,
    pair_products,
    pair_weights,
    positive,
)
from lmtt.kernels.triton_host import Directions, Operands

NEARLY_EQUAL = tl.constexpr(L2_NEARLY_EQUAL)
HUGE = tl.constexpr(1e18)  # of a part in units of the row: its square is still finite, and its proximity is 0
TURNED_WORDS = 4  # of 32 sources by 32 rows, of one program of `_turn_bits`


@triton.jit(do_not_specialize=VARIES)
def _screen(
    q, k, v, w, w_low, unit, lse, rows, count, heads, group, tokens, scale, softcap, window,
    mask, mask_head, alibi,
    stride, per_source, per_row, threshold, listed, whole_norm,
    edges, head_part, stats, bits, keep_bits,
    E: tl.constexpr, BE: tl.constexpr, E_V: tl.constexpr, BE_V: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, L2: tl.constexpr, KEEP: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """One tile of destinations and sources, all heads; not those of `_screen_inside`, where INSIDE is not 0.

    per_source [H, T]: rounding margin of g (L1), or |u[j, h]| (L2). per_row [R, H]: |row_scale| times the
    largest |gate| (L1), or in units of the row's largest coordinate (L2). stats [4, R] per block of sources:
    skipped, signed, absolute, positive.
    """
    block = tl.program_id(0)
    if INSIDE:  # noqa: SIM102  # Triton decides this one when it compiles, the next one when it runs
        if is_inside(tl.program_id(1), block * BN // INSIDE, rows, count, window, BM, INSIDE, WINDOW):
            return
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    real = r < count
    i = tl.load(rows + r, mask=real, other=-1)
    j = block * BN + tl.arange(0, BN)
    last = tl.max(i, 0)
    if block * BN > last:
        return
    if WINDOW:  # noqa: SIM102  # likewise
        if block * BN + BN <= tl.min(tl.where(real, i, last), 0) - window + 1:
            return
    limit = tl.load(threshold + r, mask=real, other=float("inf"))
    edge = tl.zeros([BM, BN], tl.float32)
    skipped = tl.zeros([BM], tl.float32)
    signed = tl.zeros([BM], tl.float32)
    absolute = tl.zeros([BM], tl.float32)
    hopeful = tl.zeros([BM], tl.float32)
    words = (tokens + 31) // 32
    word = block * (BN // 32) + tl.arange(0, BN // 32)
    for head in range(0, heads):
        weight, seen = pair_weights(
            q, k, lse, i, j, head, group, tokens, scale, softcap, window, mask, mask_head, alibi,
            E, BE, BM, BN, SOFTCAP, WINDOW, MASK, ALIBI,
        )  # fmt: skip
        g = pair_products(v, w, w_low, unit, r, real, j, head, heads, group, tokens, E_V, BE_V, BM, BN, SPLIT)
        d = tl.where(seen, weight * g, 0.0)
        row_factor = tl.load(per_row + r * heads + head, mask=real, other=0.0)
        of_source = tl.load(per_source + head * stride + j, mask=j < tokens, other=0.0)
        if L2:
            norm = tl.load(whole_norm + r, mask=real, other=0.0)[:, None]
            x = tl.minimum(weight * of_source[None, :] * row_factor[:, None], HUGE)
            d = tl.where(d > HUGE, HUGE, tl.where(d < -HUGE, -HUGE, d))
            numerator = 2 * d - x * x
            radicand = norm * norm - numerator
            value = tl.where(numerator <= 0, 0.0, numerator / (norm + tl.sqrt(positive(radicand))))
            above = (numerator > 0) & (radicand < NEARLY_EQUAL * norm * norm)
            hopeful += tl.sum((numerator > 0).to(tl.float32), 1)
        else:
            slack = weight * of_source[None, :] * row_factor[:, None]
            bound = tl.where(seen, d + slack, 0.0)
            above = bound > limit[:, None]
            value = positive(d)
            doubtful = (bound > 0) & (bound <= limit[:, None])
            skipped += tl.sum(tl.where(doubtful, value + slack, 0.0), 1)
            hopeful += tl.sum((bound > 0).to(tl.float32), 1)
        signed += tl.sum(d, 1)
        absolute += tl.sum(tl.abs(d), 1)
        first_order = tl.where(above, 0.0, value)
        edge += first_order
        part = (block * heads + head).to(tl.int64) * count + r
        tl.store(head_part + part, tl.sum(first_order, 1), mask=real)
        at = (head * count + r).to(tl.int64)[:, None] * words + word[None, :]
        there = real[:, None] & (word < words)[None, :]
        tl.store(bits + at, pack(above, BM, BN), mask=there)
        if KEEP:
            least = tl.load(listed + r, mask=real, other=float("inf"))
            tl.store(keep_bits + at, pack(first_order > least[:, None], BM, BN), mask=there)
    at = i[:, None].to(tl.int64) * stride + j[None, :]
    tl.store(edges + at, edge, mask=real[:, None] & (j < tokens)[None, :])
    at = stats + block.to(tl.int64) * 4 * count + r
    tl.store(at, skipped, mask=real)
    tl.store(at + count, signed, mask=real)
    tl.store(at + 2 * count, absolute, mask=real)
    tl.store(at + 3 * count, hopeful, mask=real)


@triton.jit(do_not_specialize=VARIES)
def _screen_inside(
    q, k, v, w, w_low, unit, lse, rows, count, heads, group, tokens, scale, window,
    stride, per_source, per_row, threshold, listed, edges, head_part, stats, bits, keep_bits,
    E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr, WINDOW: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """`_screen` for L1, of tiles that need no mask; rows are consecutive.

    Blocks of sources in results are PART wide. All is in units of the row until it is stored.
    """
    block = tl.program_id(0)
    if not is_inside(tl.program_id(1), block, rows, count, window, BM, BN, WINDOW):
        return
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    i = tl.load(rows + tl.program_id(1) * BM) + tl.arange(0, BM)
    j = block * BN + tl.arange(0, BN)
    e = tl.arange(0, E)
    at_q, at_k = i[:, None] * E + e[None, :], j[None, :] * E + e[:, None]
    at_w = r[:, None] * (heads * E) + e[None, :]  # of one chunk of rows: 32 bits count them
    units = tl.load(unit + r)
    per_unit = 1.0 / units
    limit = (tl.load(threshold + r) * per_unit)[:, None]
    least = (tl.load(listed + r) * per_unit)[:, None]
    edge = tl.zeros([BM, BN], tl.float32)
    slacks = tl.zeros([BM, BN // PART, 4], tl.float32)
    signed = tl.zeros([BM, BN // PART, 4], tl.float32)
    absolute = tl.zeros([BM, BN // PART, 4], tl.float32)
    hopeful = tl.zeros([BM, BN // PART, 4], tl.int32)
    words = (tokens + 31) // 32
    word = block * (BN // 32) + tl.arange(0, BN // 32)
    part = block * (BN // PART) + tl.arange(0, BN // PART)
    for kv in range(0, heads // group):
        keys, values = load_inside(k, kv, at_k, tokens, E), load_inside(v, kv, at_k, tokens, E)
        for head in range(kv * group, kv * group + group):
            weight, high, low = inside_pairs(
                q, w, w_low, lse, keys, values, at_q, at_w, i, head, tokens, scale * LOG2_E, E
            )
            row_factor = tl.load(per_row + r * heads + head) * per_unit
            of_source = tl.load(per_source + head * stride + j)
            d = weight * high
            d += weight * low
            slack = weight * row_factor[:, None] * of_source[None, :]
            bound = d + slack
            above, hope = bound > limit, bound > 0
            first_order = tl.where(above, 0.0, positive(d))
            edge += first_order
            slacks += fold(tl.where(hope & (bound <= limit), slack, 0.0), BM, BN, PART)
            signed += fold(d, BM, BN, PART)
            absolute += fold(tl.abs(d), BM, BN, PART)
            hopeful += fold(hope.to(tl.int32), BM, BN, PART)
            of_head = tl.sum(fold(first_order, BM, BN, PART), 2) * units[:, None]
            at = (part * heads + head).to(tl.int64)[None, :] * count + r[:, None]
            tl.store(head_part + at, of_head)
            at = (head * count + r).to(tl.int64)[:, None] * words + word[None, :]
            tl.store(bits + at, pack(above, BM, BN))
            if KEEP:
                tl.store(keep_bits + at, pack(first_order > least, BM, BN))
    edge *= units[:, None]
    tl.store(edges + i[:, None].to(tl.int64) * stride + j[None, :], edge)
    # What a first-order value may be wrong by is itself and its slack.
    skipped = tl.sum(slacks, 2) * units[:, None] + tl.sum(tl.reshape(edge, [BM, BN // PART, PART]), 2)
    at = stats + part.to(tl.int64)[None, :] * 4 * count + r[:, None]
    tl.store(at, skipped)
    tl.store(at + count, tl.sum(signed, 2) * units[:, None])
    tl.store(at + 2 * count, tl.sum(absolute, 2) * units[:, None])
    tl.store(at + 3 * count, tl.sum(hopeful, 2).to(tl.float32))


@triton.jit(do_not_specialize=VARIES)
def _turn_bits(by_row, by_source, count, tokens, WORDS: tl.constexpr):
    """by_source[g, j, m] bit b = by_row[g, 32 m + b, j / 32] bit j % 32; tiles without any stay unwritten."""
    g = tl.program_id(2).to(tl.int64)
    words_in, words_out = (tokens + 31) // 32, (count + 31) // 32
    r = tl.program_id(1) * 32 + tl.arange(0, 32)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    at = (g * count + r)[:, None] * words_in + word[None, :]
    found = tl.load(by_row + at, mask=(r < count)[:, None] & (word < words_in)[None, :], other=0)
    if tl.max(tl.max((found != 0).to(tl.int32), 1), 0) == 0:
        return
    b = tl.arange(0, 32)
    turned = tl.sum(((found[:, :, None] >> b[None, None, :]) & 1) << tl.arange(0, 32)[:, None, None], 0)
    j = word[:, None] * 32 + b[None, :]
    tl.store(by_source + (g * tokens + j) * words_out + tl.program_id(1), turned, mask=j < tokens)


def row_stride(tokens: int) -> int:
    """Elements from row to row of what the screen reads and writes by source: aligned, whatever the length.

    Without that its addresses take more registers than there are.
    """
    return -(-tokens // 16) * 16


def turn_bits(by_row: Tensor, tokens: int) -> Tensor:
    """int32 [H, R, ceil(T / 32)] to int32 [H, T, ceil(R / 32)]."""
    heads, count, words = by_row.shape
    out = torch.zeros(heads, tokens, triton.cdiv(count, 32), dtype=torch.int32, device=by_row.device)
    grid = (triton.cdiv(words, TURNED_WORDS), triton.cdiv(count, 32), heads)
    _turn_bits[grid](by_row, out, count, tokens, WORDS=TURNED_WORDS, num_warps=4)
    return out


class Screened(NamedTuple):
    """What a screen of R destinations leaves."""

    head_part: Tensor  # [blocks of sources, H, R]
    stats: Tensor  # float64 [4, R]: skipped, signed, absolute, positive
    bits: Tensor  # int32 [H, R, words of sources], pairs to be evaluated
    keep_bits: Tensor  # likewise, other pairs that may be kept; [0, ...] where none is asked for


def run_screen(
    of: Operands,
    lse: Tensor,
    towards: Directions,
    rows: Tensor,
    scalars: dict[str, Tensor],
    edges: Tensor,
    *,
    l2: bool,
    keep: bool,
    consecutive: bool,
) -> Screened:
    """Screen destinations `rows` [R]; `scalars` by the names of `_screen`. Writes rows of `edges` [T, T].

    Rows of `edges` and of `per_source` begin `row_stride` apart.
    """
    device, (heads, tokens), count = rows.device, of.attention.q.shape[:2], len(rows)
    inside = of.inside if consecutive and not l2 else 0
    blocks, words = triton.cdiv(tokens, of.tile.BN), triton.cdiv(tokens, 32)
    head_part = torch.zeros(blocks, heads, count, device=device)
    stats = torch.zeros(blocks, 4, count, device=device)
    bits = torch.zeros(heads, count, words, dtype=torch.int32, device=device)
    keep_bits = torch.zeros_like(bits) if keep else bits[:0]
    results = {
        "stride": row_stride(tokens),
        "edges": edges,
        "head_part": head_part,
        "stats": stats,
        "bits": bits,
        "keep_bits": keep_bits,
    }
    arguments = tile_arguments(of, lse, rows.int(), towards)
    row_blocks = triton.cdiv(count, of.tile.BM)
    if inside and tokens >= inside:
        taken = {name: x for name, x in scalars.items() if name != "whole_norm"}
        _screen_inside[(tokens // inside, row_blocks)](
            PART=of.tile.BN, KEEP=keep, **results, **taken, **inside_arguments(of, arguments)
        )
    _screen[(blocks, row_blocks)](
        L2=l2, KEEP=keep, INSIDE=inside, **results, **scalars,
        **{**arguments, "num_warps": of.tile.screen_warps},
    )  # fmt: skip
    return Screened(head_part, stats.sum(0, dtype=torch.float64), bits, keep_bits)
