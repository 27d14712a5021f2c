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
    v, v_scale, w, w_low, w_scale, r, real, j, head, heads, group, tokens,
    E_V: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """<v[j], w[r, head]> [BM, BN], float32. With SPLIT, w is two float16 terms and both sides are scaled."""
    from_w = (r * heads + head).to(tl.int64) * E_V
    source = head // group * tokens + j
    from_v = source.to(tl.int64) * E_V
    zero = tl.zeros([BM, BN], tl.float32)
    if SPLIT:
        g = dot_rows_split(zero, w, w_low, from_w, real, v, from_v, j < tokens, E_V, BE)
        of_r = tl.load(w_scale + r * heads + head, mask=real, other=0.0)
        of_j = tl.load(v_scale + source, mask=j < tokens, other=0.0)
        return g * of_r[:, None] * of_j[None, :]
    return dot_rows(zero, w, from_w, real, v, from_v, j < tokens, E_V, BE)


@triton.jit
def positive(x):
    """max(0, x); NaN stays NaN."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def store_bits(which, bits, word, words, group, groups_real, BM: tl.constexpr, BN: tl.constexpr):
    """which [BM, BN] as bits[group, word], int32 [BM / 32, BN]: bit b of word m is row 32 m + b.

    A tile without any is not written: `bits` starts as zeros.
    """
    if tl.max(tl.max(which.to(tl.int32), 1), 0) > 0:
        bit = tl.arange(0, 32)[None, :, None]
        packed = tl.sum(tl.reshape(which.to(tl.int32), [BM // 32, 32, BN]) << bit, 1)
        at = group.to(tl.int64)[None, :] * words + word[:, None]
        tl.store(bits + at, packed, mask=(word < words)[:, None] & groups_real[None, :])
