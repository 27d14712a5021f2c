"""Device functions that several Triton kernels share: products of rows, attention logits, bits of pairs.

A tile is BM destinations by BN sources of one head. Destinations are given by `rows`, so that any set of them
can be worked on; a destination of -1 pads a tile and sees nothing. Products of 16-bit operands run on tensor
cores with float32 accumulators, which is exact but for the order of the sum; float32 operands use plain
float32 ("ieee": no TF32).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Arguments that change with the prompt: a kernel is compiled once for all their values, and not again where
# one of them is 1 or a multiple of 16.
VARIES = ["count", "heads", "group", "tokens", "window", "mask_head", "out_head", "pairs", "first_head"]


@triton.jit
def load_rows(base, offsets, seen, first: tl.constexpr, width: tl.constexpr, step: tl.constexpr):
    """base[offsets[m] + first + e], [M, step]; 0 for rows not seen and beyond `width`."""
    e = first + tl.arange(0, step)
    if first + step <= width:
        return tl.load(base + offsets[:, None] + e[None, :], mask=seen[:, None], other=0.0)
    return tl.load(base + offsets[:, None] + e[None, :], mask=seen[:, None] & (e < width)[None, :], other=0.0)


@triton.jit
def load_columns(base, offsets, seen, first: tl.constexpr, width: tl.constexpr, step: tl.constexpr):
    """The transpose of `load_rows`, [step, N]."""
    e = first + tl.arange(0, step)
    if first + step <= width:
        return tl.load(base + offsets[None, :] + e[:, None], mask=seen[None, :], other=0.0)
    return tl.load(base + offsets[None, :] + e[:, None], mask=seen[None, :] & (e < width)[:, None], other=0.0)


@triton.jit
def dot_rows(acc, a, a_offsets, a_seen, b, b_offsets, b_seen, width: tl.constexpr, step: tl.constexpr):
    """acc[m, n] + sum_e a[a_offsets[m] + e] * b[b_offsets[n] + e]; float32."""
    for first in tl.static_range(0, width, step):
        x = load_rows(a, a_offsets, a_seen, first, width, step)
        y = load_columns(b, b_offsets, b_seen, first, width, step)
        acc = tl.dot(x, y, acc, input_precision="ieee")
    return acc


@triton.jit
def dot_rows_split(
    acc, high, low, a_offsets, a_seen, b, b_offsets, b_seen, width: tl.constexpr, step: tl.constexpr
):
    """`dot_rows` for a = high + low, two float16 terms that share each tile of b."""
    for first in tl.static_range(0, width, step):
        y = load_columns(b, b_offsets, b_seen, first, width, step)
        acc = tl.dot(load_rows(low, a_offsets, a_seen, first, width, step), y, acc)
        acc = tl.dot(load_rows(high, a_offsets, a_seen, first, width, step), y, acc)
    return acc


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a few float32 roundings: a series near 0, where 1 - 2 / (e^2x + 1) cancels."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -far, far))


@triton.jit
def capped(z, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(z / softcap) where there is a softcap."""
    if SOFTCAP:
        return softcap * tanh(z / softcap)
    return z


@triton.jit
def attention_logits(
    product, i, j, head, tokens, scale, softcap, window, mask, mask_head, alibi,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """softcap(scale * q.k) + mask - alibi * (i - j), and which pairs may be seen; -inf where not."""
    z = capped(product * scale, softcap, SOFTCAP)
    distance = i[:, None] - j[None, :]
    seen = distance >= 0
    if WINDOW:
        seen = seen & (distance < window)
    if MASK != 0:
        wide = i[:, None].to(tl.int64)  # [H, T, T] may have more elements than 32 bits count
        at = mask + wide * tokens + (wide * 0 + mask_head) * head + j[None, :]
        if MASK == 1:
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        else:
            z += tl.load(at, mask=seen, other=0.0).to(tl.float32)
    if ALIBI:
        z -= tl.load(alibi + head).to(tl.float32) * distance.to(tl.float32)
    return tl.where(seen, z, float("-inf")), seen


@triton.jit
def pair_weights(
    q, k, lse, i, j, head, group, tokens, scale, softcap, window, mask, mask_head, alibi,
    E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """A [BM, BN] of one head, 0 where not seen, from q, k and the rows' log-sum-exp [H, T]; and what is seen.

    A row with nothing to attend to has a log-sum-exp of +inf here.
    """
    real = i >= 0
    from_q = (head * tokens + i).to(tl.int64) * E
    from_k = (head // group * tokens + j).to(tl.int64) * E
    product = dot_rows(tl.zeros([BM, BN], tl.float32), q, from_q, real, k, from_k, j < tokens, E, BE)
    z, seen = attention_logits(
        product, i, j, head, tokens, scale, softcap, window, mask, mask_head, alibi,
        SOFTCAP, WINDOW, MASK, ALIBI,
    )  # fmt: skip
    total = tl.load(lse + head * tokens + i, mask=real, other=0.0)
    return tl.where(seen, tl.exp2((z - total[:, None]) * LOG2_E), 0.0), seen


@triton.jit
def pair_products(
    v, w, w_low, unit, r, real, j, head, heads, group, tokens,
    E_V: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """<v[j], w[r, head]> [BM, BN], float32. With SPLIT, w is two float16 terms in `unit` [R]."""
    from_w = (r * heads + head).to(tl.int64) * E_V
    from_v = (head // group * tokens + j).to(tl.int64) * E_V
    zero = tl.zeros([BM, BN], tl.float32)
    if SPLIT:
        g = dot_rows_split(zero, w, w_low, from_w, real, v, from_v, j < tokens, E_V, BE)
        return g * tl.load(unit + r, mask=real, other=0.0)[:, None]
    return dot_rows(zero, w, from_w, real, v, from_v, j < tokens, E_V, BE)


@triton.jit
def is_inside(
    row_block, source_block, rows, count, window, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr
):
    """Whether consecutive rows see all pairs of this tile: such a tile needs no mask of any kind."""
    first = tl.load(rows + row_block * BM)
    whole = ((row_block + 1) * BM <= count) & (source_block * BN + BN <= first + 1)
    if WINDOW:
        whole = whole & (first + BM - source_block * BN <= window)
    return whole


@triton.jit
def inside_pairs(
    q, w, w_low, lse, keys, values, at_q, at_w, i, head, tokens, log2_scale, E: tl.constexpr
):  # fmt: skip
    """A and <v, w> in units of the row, as two float32 terms, of a tile that `is_inside`: [BM, BN] each.

    Two accumulators and not one: of a chain of products the compiler does the first one twice.
    """
    queries = tl.load(q + (head * tokens).to(tl.int64) * E + at_q)
    high, low = tl.load(w + head * E + at_w), tl.load(w_low + head * E + at_w)
    total = tl.load(lse + head * tokens + i) * LOG2_E
    weight = tl.exp2(tl.dot(queries, keys) * log2_scale - total[:, None])
    return weight, tl.dot(high, values), tl.dot(low, values)


@triton.jit
def load_inside(base, kv, at, tokens, E: tl.constexpr):
    """Keys or values of one key/value head, [E, BN]."""
    return tl.load(base + (kv * tokens).to(tl.int64) * E + at)


@triton.jit
def fold(x, BM: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr):
    """Sums over a part of each row, [BM, BN / PART, 4], no two threads sharing one: the 4 remain to be added.

    This is how the results of a product lie in threads: 2 next to each other, 4 threads, and so on.
    """
    return tl.sum(tl.sum(tl.reshape(x, [BM, BN // PART, PART // 8, 4, 2]), 4), 2)


@triton.jit
def pack(which, BM: tl.constexpr, BN: tl.constexpr):
    """Bits of rows [BM, BN] as int32 [BM, BN / 32]: bit b of word m is source 32 m + b."""
    bit = tl.full([1, BN], 1, tl.int32) << (tl.arange(0, BN) % 32)[None, :]
    return tl.sum(tl.reshape(tl.where(which, bit, 0), [BM, BN // 32, 32]), 2)


@triton.jit
def positive(x):
    """max(0, x); NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
