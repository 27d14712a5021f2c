"""The k largest logits and their log-sum-exp by tiles of the vocabulary, in Triton; no logit is written.

1. `_best_logits`  some rows by a strip of the vocabulary, tile after tile: product, bias, scale, softcap; in
                   the epilogue the rows' best so far, their running largest logit and sum of exponentials.
2. merge           the k best of all strips' best, and their log-sum-exp.

A strip gives at most MOST_BEST of a row. A larger k takes as many passes, each below the last key of the one
before: exact, and each costs the product again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtt.kernels.budget import WORKSPACE
from lmtt.kernels.neurons.fused import LAST, LEAST
from lmtt.kernels.triton_bricks import VARIES, capped
from lmtt.kernels.triton_host import SMALL_SHARED, chip, chunks, interpreted
from lmtt.kernels.types import TopK

NONE = tl.constexpr(-(1 << 31))  # the order of no logit
INFINITY = tl.constexpr(0x7F800000)  # bits and order of it
NAN_ORDER = tl.constexpr(0x7FC00000)
MOST_BEST = 32  # of a row in a pass; also what a trace keeps
PROGRAMS = 256  # wanted at once: about two for each processor
MOST_TILES = 32  # of a strip: more save nothing, as its best settle early


@triton.jit
def _order(z):
    """Integers in the order of float32 numbers: bits of negative ones turned round; NaN is the largest."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)  # -0 is 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where((bits & 0x7FFFFFFF) > INFINITY, NAN_ORDER, order)


@triton.jit(do_not_specialize=[*VARIES, "tiles"])
def _best_logits(
    states, w_u, bias, last_order, last_token, keys, largest, exponentials,
    count, vocabulary, width, stride, tiles, scale, softcap,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """keys [R, strips, K] of z[r, t] = softcap(scale * (<states[r], w_u[t]> + bias[t])), in any order.

    A key is a logit's order above LAST - t: at ties the lower token is the larger. Taken are those below the
    row's `last_order` and `last_token` (int32 [R]); where there are fewer than K, the rest are of order NONE.
    largest and exponentials [strips, R]: the row's largest logit m in the strip, and its sum of exp(z - m).
    """
    strip = tl.program_id(0)
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    real = r < count
    from_r = r.to(tl.int64) * width
    order_end = tl.load(last_order + r, mask=real, other=NONE)
    token_end = tl.load(last_token + r, mask=real, other=0)
    best = tl.zeros([BM, K], tl.int64) + LEAST + tl.arange(0, K)[None, :]  # no two alike
    most = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    for at in range(strip * tiles, strip * tiles + tiles):
        t = at * BN + tl.arange(0, BN)
        exists = t < vocabulary
        from_t = t.to(tl.int64) * stride
        total = tl.zeros([BM, BN], tl.float32)
        for first in range(0, width, BD):
            d = first + tl.arange(0, BD)
            inside = d < width
            x = tl.load(
                states + from_r[:, None] + d[None, :], mask=real[:, None] & inside[None, :], other=0.0
            )
            y = tl.load(w_u + from_t[None, :] + d[:, None], mask=exists[None, :] & inside[:, None], other=0.0)
            total = tl.dot(x, y.to(x.dtype), total, input_precision="ieee")
        if BIAS:
            total += tl.load(bias + t, mask=exists, other=0.0).to(tl.float32)[None, :]
        z = tl.where(exists[None, :], capped(total * scale, softcap, SOFTCAP), float("-inf"))
        before = most
        most = tl.maximum(most, tl.max(z, 1))
        shift = tl.where(most == float("-inf"), 0.0, most)
        mass = mass * tl.exp(before - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        order = _order(z)
        open_ = (order < order_end[:, None]) | (
            (order == order_end[:, None]) & (t[None, :] > token_end[:, None])
        )
        order = tl.where(open_ & exists[None, :], order, NONE)
        # One by one into K places, all rows at once: after a few tiles hardly any row's best still change.
        top = tl.max(order, 1)
        least = tl.min(best, 1)
        better = top > (least >> 32).to(tl.int32)
        while tl.max(better.to(tl.int32), 0) > 0:
            token = tl.min(tl.where(order == top[:, None], t[None, :], LAST), 1)
            key = (top.to(tl.int64) << 32) | (-token + LAST).to(tl.int64)
            best = tl.where((best == least[:, None]) & better[:, None], key[:, None], best)
            order = tl.where(t[None, :] == token[:, None], NONE, order)
            top = tl.max(order, 1)
            least = tl.min(best, 1)
            better = top > (least >> 32).to(tl.int32)
    row = (r.to(tl.int64) * tl.num_programs(0) + strip) * K
    tl.store(keys + row[:, None] + tl.arange(0, K)[None, :], best, mask=real[:, None])
    to = strip.to(tl.int64) * count + r
    tl.store(largest + to, most, mask=real)
    tl.store(exponentials + to, mass, mask=real)


class _Tile(NamedTuple):
    BM: int
    BN: int
    BD: int
    warps: int
    stages: int


def _tile(dtype: torch.dtype, chip: int) -> _Tile:
    """As `triton_host.tile`: the orders of a tile and the best of its rows are all in registers."""
    if interpreted():
        return _Tile(16, 32, 32, 4, 1)
    if dtype == torch.float32:
        return _Tile(64, 64, 16, 8, 3)
    if chip < 90 or chip in SMALL_SHARED:
        return _Tile(64, 128, 64, 8, 3)
    return _Tile(128, 128, 64, 8, 3)


@torch.no_grad()
def unembed_topk(
    x: Tensor,
    w_u: Tensor,
    k: int,
    norm: Callable[[Tensor], Tensor] | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    workspace: int = WORKSPACE,
) -> TopK:
    """As `reference.unembed_topk`. States and weights of different dtypes are multiplied in float32."""
    states = x if norm is None else norm(x)
    same = states.dtype == w_u.dtype
    states = states.contiguous() if same else states.float().contiguous()
    w_u = w_u if w_u.stride(1) == 1 else w_u.contiguous()
    bias = None if bias is None else bias.contiguous()
    (count, width), vocabulary = states.shape, w_u.shape[0]
    values = torch.empty(count, k, device=x.device)
    indices = torch.empty(count, k, dtype=torch.int64, device=x.device)
    logsumexp = torch.empty(count, device=x.device)
    size = _tile(w_u.dtype if same else torch.float32, chip(x))
    places = triton.next_power_of_2(min(k, MOST_BEST))
    blocks = triton.cdiv(vocabulary, size.BN)
    tiles = min(MOST_TILES, max(1, blocks * triton.cdiv(count, size.BM) // PROGRAMS))
    strips = triton.cdiv(blocks, tiles)
    # Of a row in each strip: keys, as many again where they are ordered, and what the log-sum-exp takes.
    rows_at_once = max(size.BM, workspace // (strips * (16 * places + 48)))

    def below(states: Tensor, order: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n, places], falling, of logits below those given, int32 [n] each; log-sum-exp [n] of all."""
        n = len(states)
        keys = torch.empty(n, strips * places, dtype=torch.int64, device=x.device)
        largest, exponentials = torch.empty(2, strips, n, device=x.device)
        _best_logits[(strips, triton.cdiv(n, size.BM))](
            states, w_u, w_u if bias is None else bias, order, token, keys, largest, exponentials,
            n, vocabulary, width, w_u.stride(0), tiles, float(scale), float(softcap or 1.0),
            BM=size.BM, BN=size.BN, BD=size.BD, K=places, BIAS=bias is not None, SOFTCAP=softcap is not None,
            num_warps=size.warps, num_stages=size.stages,
        )  # fmt: skip
        return keys.topk(places).values, (largest.double() + exponentials.double().log()).logsumexp(0)

    def work(rows: Tensor) -> None:
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        order = torch.full((len(rows),), torch.iinfo(torch.int32).max, dtype=torch.int32, device=x.device)
        token = torch.zeros_like(order)
        for start in range(0, k, places):
            keys, total = below(states[here], order, token)
            order, index = (keys >> 32).int(), LAST.value - (keys & 0xFFFFFFFF)
            end = min(k, start + places)
            bits = order ^ ((order >> 31) & 0x7FFFFFFF)
            values[here, start:end] = bits.view(torch.float32)[:, : end - start]
            indices[here, start:end] = index[:, : end - start]
            logsumexp[here] = total.float()
            order, token = order[:, -1].contiguous(), index[:, -1].int()

    if count:
        chunks(torch.arange(count, device=x.device), rows_at_once, work)
    return TopK(values, indices, logsumexp)
