"""Log-sum-exp and directional contributions by tiles, in Triton: the pattern is recomputed, never stored.

    d[h, i, j] = A[h, i, j] * <v[j], w[i, h]>,     w[i, h] = row_scale[i] * gate[i, h] * (W_O[h] @ r[i])

1. `_row_logsumexp`  one program per (block of rows, head) runs over the sources: q.k only.
2. `_tiles`          one program per (block of rows, block of sources): all heads in turn for reduce="heads",
                     so that nothing is added atomically, or one head for the whole [H, T, T]. Tiles in which
                     consecutive rows see everything have `_tiles_inside`: no masks, and keys and values stay
                     on the chip for all the heads that share them.
3. `_row_sums`       one program per (block of rows, head) runs over the sources, as flash attention does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtt.kernels.budget import WORKSPACE
from lmtt.kernels.directional_attention.reference import Reduce
from lmtt.kernels.triton_bricks import (
    LOG2_E,
    VARIES,
    attention_logits,
    dot_rows,
    inside_pairs,
    is_inside,
    load_inside,
    pair_products,
    pair_weights,
)
from lmtt.kernels.triton_host import Directions, Operands, chunks, depth_step, operands
from lmtt.kernels.types import Attention


@triton.jit(do_not_specialize=VARIES)
def _row_logsumexp(
    q, k, sinks, lse, group, tokens, scale, softcap, window, mask, mask_head, alibi,
    E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """lse[h, i] = log(sum_j exp(logit[h, i, j]) + exp(sink[h])); +inf for a row without anything."""
    head = tl.program_id(1)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    real = i < tokens
    i = tl.where(real, i, -1)
    from_q = (head * tokens + i).to(tl.int64) * E
    first = 0
    if WINDOW:
        first = tl.maximum(tl.program_id(0) * BM - window + 1, 0) // BN * BN
    largest = tl.full([BM], float("-inf"), tl.float32)
    if SINKS:
        largest = tl.zeros([BM], tl.float32) + tl.load(sinks + head).to(tl.float32)
    total = tl.where(largest == float("-inf"), 0.0, 1.0)
    for start in range(first, tl.minimum((tl.program_id(0) + 1) * BM, tokens), BN):
        j = start + tl.arange(0, BN)
        from_k = (head // group * tokens + j).to(tl.int64) * E
        product = dot_rows(tl.zeros([BM, BN], tl.float32), q, from_q, real, k, from_k, j < tokens, E, BE)
        z, _ = attention_logits(
            product, i, j, head, tokens, scale, softcap, window, mask, mask_head, alibi,
            SOFTCAP, WINDOW, MASK, ALIBI,
        )  # fmt: skip
        new = tl.maximum(largest, tl.max(z, 1))
        safe = tl.where(new == float("-inf"), 0.0, new) * LOG2_E
        total = total * tl.exp2(largest * LOG2_E - safe) + tl.sum(tl.exp2(z * LOG2_E - safe[:, None]), 1)
        largest = new
    nothing = total == 0
    result = tl.where(nothing, float("inf"), largest + tl.log(tl.where(nothing, 1.0, total)))
    tl.store(lse + head * tokens + i, result, mask=real)


@triton.jit(do_not_specialize=VARIES)
def _tiles(
    q, k, v, w, w_low, unit, lse, rows, out, count, out_head, heads, group, tokens,
    scale, softcap, window, mask, mask_head, alibi,
    E: tl.constexpr, BE: tl.constexpr, E_V: tl.constexpr, BE_V: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, PER_HEAD: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """out[r, j] = sum over heads of d, or out[h, r, j]; `out` is zero where no tile is visible.

    Not of tiles that lie in one of INSIDE sources that `is_inside`, where INSIDE is not 0.
    """
    if INSIDE:  # noqa: SIM102  # as below
        if is_inside(
            tl.program_id(1), tl.program_id(0) * BN // INSIDE, rows, count, window, BM, INSIDE, WINDOW
        ):
            return
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    real = r < count
    i = tl.load(rows + r, mask=real, other=-1)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    last = tl.max(i, 0)
    if tl.program_id(0) * BN > last:
        return
    if WINDOW:  # noqa: SIM102  # Triton decides this one when it compiles, the next one when it runs
        if tl.program_id(0) * BN + BN <= tl.min(tl.where(real, i, last), 0) - window + 1:
            return
    at = out + i[:, None].to(tl.int64) * tokens + j[None, :]
    here = real[:, None] & (j < tokens)[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    first_head = 0
    end_head = heads
    if PER_HEAD:
        first_head = tl.program_id(2)
        end_head = first_head + 1
    for head in range(first_head, end_head):
        weight, seen = pair_weights(
            q, k, lse, i, j, head, group, tokens, scale, softcap, window, mask, mask_head, alibi,
            E, BE, BM, BN, SOFTCAP, WINDOW, MASK, ALIBI,
        )  # fmt: skip
        g = pair_products(v, w, w_low, unit, r, real, j, head, heads, group, tokens, E_V, BE_V, BM, BN, SPLIT)
        total += tl.where(seen, weight * g, 0.0)
    if PER_HEAD:
        at += tl.program_id(2).to(tl.int64) * out_head
    tl.store(at, total, mask=here)


@triton.jit(do_not_specialize=VARIES)
def _tiles_inside(
    q, k, v, w, w_low, unit, lse, rows, out, count, heads, group, tokens, scale, window,
    E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """`_tiles`, summed over heads, of tiles that need no mask; rows are consecutive."""
    if not is_inside(tl.program_id(1), tl.program_id(0), rows, count, window, BM, BN, WINDOW):
        return
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    i = tl.load(rows + tl.program_id(1) * BM) + tl.arange(0, BM)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    e = tl.arange(0, E)
    at_q, at_k = i[:, None] * E + e[None, :], j[None, :] * E + e[:, None]
    at_w = r[:, None] * (heads * E) + e[None, :]  # of one chunk of rows: 32 bits count them
    total = tl.zeros([BM, BN], tl.float32)
    for kv in range(0, heads // group):
        keys, values = load_inside(k, kv, at_k, tokens, E), load_inside(v, kv, at_k, tokens, E)
        for head in range(kv * group, kv * group + group):
            weight, high, low = inside_pairs(
                q, w, w_low, lse, keys, values, at_q, at_w, i, head, tokens, scale * LOG2_E, E
            )
            total += weight * high
            total += weight * low
    at = out + i[:, None].to(tl.int64) * tokens + j[None, :]
    tl.store(at, total * tl.load(unit + r)[:, None])


@triton.jit(do_not_specialize=VARIES)
def _row_sums(
    q, k, v, w, w_low, unit, lse, rows, out, count, heads, group, tokens,
    scale, softcap, window, mask, mask_head, alibi,
    E: tl.constexpr, BE: tl.constexpr, E_V: tl.constexpr, BE_V: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, POSITIVE: tl.constexpr,
):  # fmt: skip
    """out[h, i] = sum over sources of d, or of max(0, d)."""
    head = tl.program_id(1)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    real = r < count
    i = tl.load(rows + r, mask=real, other=-1)
    last = tl.max(i, 0)
    first = 0
    if WINDOW:
        first = tl.maximum(tl.min(tl.where(real, i, last), 0) - window + 1, 0) // BN * BN
    total = tl.zeros([BM], tl.float32)
    for start in range(first, last + 1, BN):
        j = start + tl.arange(0, BN)
        weight, seen = pair_weights(
            q, k, lse, i, j, head, group, tokens, scale, softcap, window, mask, mask_head, alibi,
            E, BE, BM, BN, SOFTCAP, WINDOW, MASK, ALIBI,
        )  # fmt: skip
        g = pair_products(v, w, w_low, unit, r, real, j, head, heads, group, tokens, E_V, BE_V, BM, BN, SPLIT)
        d = tl.where(seen, weight * g, 0.0)
        if POSITIVE:
            d = tl.where(d <= 0, 0.0, d)
        total += tl.sum(d, 1)
    tl.store(out + head * tokens + i, total, mask=real)


def row_logsumexp(of: Operands) -> Tensor:
    """[H, T] float32, the given one or computed; +inf where a row has nothing to attend to."""
    a = of.attention
    if a.lse is not None:
        given = a.lse.float().contiguous()
        return given.masked_fill(given == -torch.inf, torch.inf)
    heads, tokens = a.q.shape[:2]
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=a.q.device)
    _row_logsumexp[(triton.cdiv(tokens, of.tile.BM), heads)](
        sinks=a.q if a.sinks is None else a.sinks.contiguous(),
        lse=lse,
        SINKS=a.sinks is not None,
        BM=of.tile.BM,
        BN=of.tile.BN,
        **of.arguments,
        **of.tile.launch,
    )
    return lse


def tile_arguments(of: Operands, lse: Tensor, rows: Tensor, towards: Directions) -> dict[str, object]:
    """What every kernel takes that forms pairs of `rows` (int32 [R])."""
    width = of.attention.v.shape[2]
    return {
        **of.arguments,
        "v": of.v,
        "w": towards.w,
        "w_low": towards.w_low,
        "unit": towards.unit,
        "lse": lse,
        "rows": rows,
        "count": len(rows),
        "heads": of.attention.heads,
        "E_V": width,
        "BE_V": depth_step(width),
        "BM": of.tile.BM,
        "BN": of.tile.BN,
        "SPLIT": of.split,
        **of.tile.launch,
    }


def inside_arguments(of: Operands, arguments: dict[str, object]) -> dict[str, object]:
    """What the kernels for tiles without masks take, of `tile_arguments`."""
    names = (
        *("q", "k", "v", "w", "w_low", "unit", "lse", "rows", "count", "heads", "group", "tokens"),
        *("scale", "window", "E", "WINDOW", "BM"),
    )
    launch = {"num_warps": of.tile.inside_warps, "num_stages": of.tile.stages}
    return {**{name: arguments[name] for name in names}, "BN": of.inside, **launch}


@torch.no_grad()
def directional_attention(
    attention: Attention, direction: Tensor, reduce: Reduce = None, workspace: int = WORKSPACE
) -> Tensor:
    """As `reference.directional_attention`. Holds W_O r of as many destinations as fit the workspace."""
    of = operands(attention)
    heads, tokens = attention.q.shape[:2]
    shape = {None: (heads, tokens, tokens), "heads": (tokens, tokens), "sources": (heads, tokens)}[reduce]
    out = torch.zeros(shape, dtype=torch.float32, device=direction.device)
    lse = row_logsumexp(of)

    def work(rows: Tensor) -> None:
        towards = of.directions(direction[rows], rows)
        launch_tiles(of, lse, rows, towards, out, reduce)

    row_bytes = heads * attention.v.shape[2] * 12
    chunks(torch.arange(tokens, device=direction.device), max(of.tile.BM, workspace // row_bytes), work)
    return out


def launch_tiles(
    of: Operands,
    lse: Tensor,
    rows: Tensor,
    towards: Directions,
    out: Tensor,
    reduce: Reduce,
    positive: bool = False,
) -> None:
    """The tile pass alone, given W_O r and the log-sum-exp: consecutive rows (int64 [R]) of `out`.

    positive : of sums over sources, add the positive contributions only.
    """
    heads, tokens = of.attention.q.shape[:2]
    arguments = tile_arguments(of, lse, rows.int(), towards)
    blocks = triton.cdiv(len(rows), of.tile.BM)
    if reduce == "sources":
        _row_sums[(blocks, heads)](out=out, POSITIVE=positive, **arguments)
        return
    inside = of.inside if reduce == "heads" else 0
    if inside:
        _tiles_inside[(tokens // inside, blocks)](out=out, **inside_arguments(of, arguments))
    grid = (triton.cdiv(tokens, of.tile.BN), blocks, heads if reduce is None else 1)
    _tiles[grid](out=out, out_head=tokens * tokens, PER_HEAD=reduce is None, INSIDE=inside, **arguments)
