"""Contributions of every (head, source) pair on a GPU: one fused pass screens, few pairs are evaluated.

For as many destinations at a time as the workspace has room for:

1. `run_screen`   (screen.py) g and its bound for all pairs, and from these sums of first-order values, row
                  statistics, a bit for each pair that must be evaluated exactly, and one for those that
                  may be kept. Nothing of size [H, R, T] but bits.
2. `list_pairs`   the bits as a list sorted by (head, source, destination).
3. evaluation     of the listed pairs in D dimensions, u[j, h] = v[j] W_O[h] formed once per source that needs
                  it. `Evaluator` says how: `_evaluate` below, or csrc/cuda.
4. `deposit`      (rows.py) exact values are added as integers (2^-40 of |whole|): their order does not
                  matter, and every run gives the same bits.

For L2 the screen itself is exact (a Gram matrix gives |u|); only parts nearly equal to the whole are listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtt.kernels.directional_attention.fused import row_logsumexp
from lmtt.kernels.measures import l2
from lmtt.kernels.numerics import SPLIT_LOSS, certificate, divide, ieee_matmul, sign, tensor_core_margin
from lmtt.kernels.proximity.reference import _join, _other_parts, _Rows
from lmtt.kernels.proximity.rows import deposit, edge_shares, part_sums
from lmtt.kernels.proximity.screen import row_stride, run_screen, turn_bits
from lmtt.kernels.triton_bricks import VARIES, pair_weights, positive, tanh
from lmtt.kernels.triton_host import (
    Directions,
    Operands,
    chunks,
    depth_step,
    interpreted,
    operands,
    pieces,
    product,
)
from lmtt.kernels.types import AttentionResult, AttentionTask, Pairs

COEFFICIENT_PAIRS = 32  # of one program of `_coefficients`
LIST_PAIRS, LIST_DEPTH = 4, 512  # tile of `_evaluate`
LEAST_SOURCES = 64  # whose u are formed at once, whatever the workspace: fewer are no matrix product
LEAST_LISTED = 1 << 14  # pairs evaluated at once, likewise
OTHER_ROWS = 128  # destinations whose residual, bias and others are evaluated at once, for L2
LISTED_BYTES = 48  # per listed pair: indices, coefficient, value and what sorting them takes


@triton.jit(do_not_specialize=VARIES)
def _coefficients(
    q, k, lse, rows, scale, softcap, window, mask, mask_head, alibi, row_scale,
    v, w, w_low, unit, pair_head, pair_source, pair_row, out, out_g, pairs, heads, group, tokens,
    E: tl.constexpr, BE: tl.constexpr, E_V: tl.constexpr, BE_V: tl.constexpr, BL: tl.constexpr,
    SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """row_scale[i] * A[h, i, j] and g = A[h, i, j] <v[j], w[r, h]> of listed pairs, gathered one by one."""
    n = tl.program_id(0) * BL + tl.arange(0, BL)
    real = n < pairs
    head = tl.load(pair_head + n, mask=real, other=0)
    j = tl.load(pair_source + n, mask=real, other=0)
    r = tl.load(pair_row + n, mask=real, other=0)
    i = tl.load(rows + r, mask=real, other=0)
    total = tl.zeros([BL], tl.float32)
    from_q = (head * tokens + i).to(tl.int64) * E
    from_k = (head // group * tokens + j).to(tl.int64) * E
    for first in tl.static_range(0, E, BE):
        e = first + tl.arange(0, BE)
        inside = real[:, None] & (e < E)[None, :]
        x = tl.load(q + from_q[:, None] + e[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(k + from_k[:, None] + e[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(x * y, 1)
    z = total * scale
    if SOFTCAP:
        z = softcap * tanh(z / softcap)
    if MASK == 2:
        wide = i.to(tl.int64)
        at = mask + wide * tokens + (wide * 0 + mask_head) * head + j
        z += tl.load(at, mask=real, other=0.0).to(tl.float32)
    if ALIBI:
        z -= tl.load(alibi + head, mask=real, other=0.0).to(tl.float32) * (i - j).to(tl.float32)
    c = tl.exp(z - tl.load(lse + head * tokens + i, mask=real, other=0.0))
    g = tl.zeros([BL], tl.float32)
    from_w = (r * heads + head).to(tl.int64) * E_V
    from_v = (head // group * tokens + j).to(tl.int64) * E_V
    for first in tl.static_range(0, E_V, BE_V):
        e = first + tl.arange(0, BE_V)
        inside = real[:, None] & (e < E_V)[None, :]
        x = tl.load(w + from_w[:, None] + e[None, :], mask=inside, other=0.0).to(tl.float32)
        if SPLIT:
            x += tl.load(w_low + from_w[:, None] + e[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(v + from_v[:, None] + e[None, :], mask=inside, other=0.0).to(tl.float32)
        g += tl.sum(x * y, 1)
    if SPLIT:
        g *= tl.load(unit + r, mask=real, other=0.0)
    tl.store(out_g + n, g * c, mask=real)
    if ROW_SCALE:
        c *= tl.load(row_scale + i, mask=real, other=0.0).to(tl.float32)
    tl.store(out + n, c, mask=real)


@triton.jit(do_not_specialize=VARIES)
def _evaluate(
    u, u_row, row, coefficient, whole, out, pairs, width,
    BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """max(0, sum_d min(t, 2|y| - t)), t = c u[u_row] sign(y), y = whole[row]: L1, listed pairs."""
    n = tl.program_id(0) * BL + tl.arange(0, BL)
    real = n < pairs
    c = tl.load(coefficient + n, mask=real, other=0.0)
    from_u = tl.load(u_row + n, mask=real, other=0).to(tl.int64) * width
    from_y = tl.load(row + n, mask=real, other=0).to(tl.int64) * width
    total = tl.zeros([BL, BD], tl.float32)
    for first in range(0, width, BD):
        d = first + tl.arange(0, BD)
        inside = real[:, None] & (d < width)[None, :]
        x = tl.load(u + from_u[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32) * c[:, None]
        y = tl.load(whole + from_y[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        t = tl.where(y < 0, -x, x)
        total += tl.minimum(t, 2 * tl.abs(y) - t, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + n, positive(tl.sum(total, 1)), mask=real)


@triton.jit(do_not_specialize=VARIES)
def _dense(
    q, k, v, lse, w_o, whole, rows, tiles, values, first_head, count, heads, group, tokens, width,
    scale, softcap, window, mask, mask_head, alibi, row_scale,
    E: tl.constexpr, BE: tl.constexpr, E_V: tl.constexpr, BE_V: tl.constexpr, BJ: tl.constexpr,
    BD: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """All pairs of tiles of 32 destinations by BJ sources that hold many listed pairs: L1, exact.

    tiles [n, 3]: head after `first_head`, block of sources, word of destinations; those worth it are in it.
    u is formed on chip, BD coordinates at a time, and used for all 32 destinations. values [n, 32, BJ].
    """
    at = tiles + tl.program_id(0) * 3
    head = first_head + tl.load(at)
    j = tl.load(at + 1) * BJ + tl.arange(0, BJ)
    r = tl.load(at + 2) * 32 + tl.arange(0, 32)
    real = r < count
    i = tl.load(rows + r, mask=real, other=-1)
    weight, seen = pair_weights(
        q, k, lse, i, j, head, group, tokens, scale, softcap, window, mask, mask_head, alibi,
        E, BE, 32, BJ, SOFTCAP, WINDOW, MASK, ALIBI,
    )  # fmt: skip
    c = tl.where(seen, weight, 0.0)
    if ROW_SCALE:
        c *= tl.load(row_scale + i, mask=real, other=0.0).to(tl.float32)[:, None]
    from_v = (head // group * tokens + j).to(tl.int64) * E_V
    from_y = i.to(tl.int64) * width
    total = tl.zeros([32, BJ], tl.float32)
    for first in range(0, width, BD):
        d = first + tl.arange(0, BD)
        inside = d < width
        u = tl.zeros([BJ, BD], tl.float32)
        for e0 in tl.static_range(0, E_V, BE_V):
            e = e0 + tl.arange(0, BE_V)
            x = tl.load(
                v + from_v[:, None] + e[None, :], mask=(j < tokens)[:, None] & (e < E_V)[None, :], other=0.0
            )
            from_w = (head * E_V + e).to(tl.int64) * width
            z = tl.load(
                w_o + from_w[:, None] + d[None, :], mask=(e < E_V)[:, None] & inside[None, :], other=0.0
            )
            u = tl.dot(x, z, u, input_precision="ieee")
        y = tl.load(whole + from_y[None, :] + d[:, None], mask=real[None, :] & inside[:, None], other=0.0)
        y = y.to(tl.float32)[:, :, None]
        t = c[None, :, :] * tl.trans(u)[:, None, :]
        t = tl.where(y < 0, -t, t)
        total += tl.sum(tl.minimum(t, 2 * tl.abs(y) - t, propagate_nan=tl.PropagateNan.ALL), 0)
    out = values + (tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32))[:, None] * BJ
    tl.store(out + tl.arange(0, BJ)[None, :], positive(total))


class Listed(NamedTuple):
    """Pairs to be evaluated exactly, sorted by (head, source, row); int32 [N] each, `row` into the chunk."""

    head: Tensor
    source: Tensor
    row: Tensor


@dataclass(frozen=True)
class Chunk:
    """Some destinations: what listing and evaluation need."""

    task: AttentionTask
    of: Operands
    rows: Tensor  # int64 [R]
    lse: Tensor
    others: _Rows
    towards: Directions  # W_O sign(whole)


# The exact proximities [N] of listed pairs with coefficients c and first-order values g [N]; how is the
# backend's choice.
Evaluator = Callable[[Chunk, Listed, Tensor, Tensor], Tensor]
# [H, T, words] of bits over rows to a list.
Lister = Callable[[Tensor], Listed]


def list_pairs(bits: Tensor) -> Listed:
    """The set bits of int32 [H, T, words] as pairs, in order; row = 32 * word + bit."""
    h, j, m = bits.nonzero(as_tuple=True)
    shift = torch.arange(32, dtype=torch.int32, device=bits.device)
    n, b = ((bits[h, j, m][:, None] >> shift) & 1).nonzero(as_tuple=True)
    return Listed(h[n].int(), j[n].int(), (m[n] * 32 + b).int())


def u_vectors(chunk: Chunk, listed: Listed) -> Tensor:
    """v[source] @ W_O[head] in float32 [n, D] of pairs sorted by head; v times the gate, if any."""
    a = chunk.task.attention
    out = torch.empty(len(listed.head), a.w_o.shape[2], dtype=torch.float32, device=listed.head.device)
    which, counts = torch.unique_consecutive(listed.head, return_counts=True)
    start = 0
    for h, n in zip(which.tolist(), counts.tolist(), strict=True):
        some = slice(start, start + n)
        v = a.v[h // a.group][listed.source[some].long()]
        if a.gate is not None:
            v = v.float() * a.gate[chunk.rows[listed.row[some].long()], h].float()
        out[some] = product(v, a.w_o[h].T)
        start += n
    return out


def by_source(chunk: Chunk, listed: Listed, evaluate: Callable[[Tensor, Tensor, slice], Tensor]) -> Tensor:
    """evaluate(u [n, D], row of u for each pair, the pairs) for as many sources at a time as there is room.

    Pairs of one (head, source) share their u; with a gate each pair has its own.
    """
    tokens = chunk.task.attention.q.shape[1]
    if chunk.task.attention.gate is None:
        _, which, counts = torch.unique_consecutive(
            listed.head.long() * tokens + listed.source, return_inverse=True, return_counts=True
        )
        ends = counts.cumsum(0)
    else:
        which = torch.arange(len(listed.head), device=listed.head.device)
        ends = which + 1
    last = Listed(*(column[ends - 1] for column in listed))  # one pair of each group
    ends_list = ends.tolist()
    step = max(LEAST_SOURCES, chunk.task.workspace // 4 // (chunk.task.whole.shape[1] * 4))
    out = torch.empty(len(which), dtype=torch.float32, device=which.device)
    for some in pieces(len(ends_list), step):
        u = u_vectors(chunk, Listed(*(column[some] for column in last)))
        pairs = slice(ends_list[some.start - 1] if some.start else 0, ends_list[some.stop - 1])
        out[pairs] = evaluate(u, (which[pairs] - some.start).int(), pairs)
    return out


def evaluate_list(
    u: Tensor, whole: Tensor, u_row: Tensor, row: Tensor, coefficient: Tensor, g: Tensor
) -> Tensor:
    """Exact L1 proximities [N] of c * u[u_row] to whole[row]; u and whole [., D] of any dtype, int32 indices.

    `g`, the pairs' first-order values, is not needed here.
    """
    out = torch.empty(len(u_row), dtype=torch.float32, device=u.device)
    if len(out) == 0:
        return out
    bl, bd = (256, 32) if interpreted() else (LIST_PAIRS, LIST_DEPTH)
    _evaluate[(triton.cdiv(len(out), bl),)](
        u, u_row, row, coefficient, whole, out, len(out), whole.shape[1], BL=bl, BD=bd, num_warps=4
    )
    return out


def evaluate_l1(chunk: Chunk, listed: Listed, coefficient: Tensor, g: Tensor) -> Tensor:
    """By `evaluate_list`: any list."""
    whole, destination = chunk.task.whole.contiguous(), chunk.rows.int()[listed.row.long()]

    def evaluate(u: Tensor, u_row: Tensor, pairs: slice) -> Tensor:
        return evaluate_list(u, whole, u_row, destination[pairs], coefficient[pairs], g[pairs])

    return by_source(chunk, listed, evaluate)


def evaluate_l2(chunk: Chunk, listed: Listed, coefficient: Tensor, g: Tensor) -> Tensor:
    """In plain torch: these are the few parts nearly equal to their whole."""
    whole = chunk.others.whole

    def evaluate(u: Tensor, u_row: Tensor, pairs: slice) -> Tensor:
        out = torch.empty(len(u_row), dtype=torch.float32, device=u.device)
        step = max(1, chunk.task.workspace // 32 // (u.shape[1] * 4))
        for some in pieces(len(out), step):
            x = u[u_row[some].long()] * coefficient[pairs][some][:, None]
            out[some] = l2.proximity(x, whole[listed.row[pairs][some].long()])
        return out

    return by_source(chunk, listed, evaluate)


# Share of a tile's pairs that must be listed for all of them to be evaluated together: by instruction counts
# a listed pair costs up to four times one of a dense tile (benchmarks/GPU.md).
DENSE_SHARE = 0.25
DENSE_SOURCES = 16
DENSE_DEPTH = 16


def dense_tiles(bits: Tensor) -> Tensor:
    """int32 [n, 3] (head, block of sources, word): tiles of which at least DENSE_SHARE is listed."""
    heads, tokens, words = bits.shape
    blocks = triton.cdiv(tokens, DENSE_SOURCES)
    shift = torch.arange(32, dtype=torch.int32, device=bits.device)
    filled = torch.zeros(heads, blocks * DENSE_SOURCES, words, dtype=torch.int32, device=bits.device)
    for h in range(heads):
        filled[h, :tokens] = ((bits[h][..., None] >> shift) & 1).sum(-1, dtype=torch.int32)
    share = filled.view(heads, blocks, DENSE_SOURCES, words).sum(2) / (32 * DENSE_SOURCES)
    return (share >= DENSE_SHARE).nonzero().int().contiguous()


def launch_dense(
    task: AttentionTask, of: Operands, rows: Tensor, lse: Tensor, tiles: Tensor, first_head: int
) -> Tensor:
    """Exact proximities [n, 32, DENSE_SOURCES] of all pairs of `tiles`, int32 [n, 3], see `_dense`."""
    a, whole = task.attention, task.whole.contiguous()
    width = a.v.shape[2]
    values = torch.empty(len(tiles), 32, DENSE_SOURCES, dtype=torch.float32, device=tiles.device)
    _dense[(len(tiles),)](
        v=a.v.contiguous(), lse=lse, w_o=a.w_o.contiguous(), whole=whole, rows=rows.int(), tiles=tiles,
        values=values, first_head=first_head, count=len(rows), heads=a.heads, width=whole.shape[1],
        row_scale=whole if a.row_scale is None else a.row_scale.contiguous(),
        ROW_SCALE=a.row_scale is not None, E_V=width, BE_V=depth_step(width), BJ=DENSE_SOURCES,
        BD=DENSE_DEPTH, num_warps=4, num_stages=2,
        **of.arguments,
    )  # fmt: skip
    return values


def evaluate_dense(
    chunk: Chunk, lse: Tensor, tiles: Tensor, bits: Tensor, first_head: int
) -> tuple[Listed, Tensor]:
    """The listed pairs of `tiles` and their exact values; their bits are cleared.

    bits[0] is of `first_head`.
    """
    values = launch_dense(chunk.task, chunk.of, chunk.rows, lse, tiles, first_head)
    head, block, word = tiles.long().unbind(1)
    source = (block[:, None] * DENSE_SOURCES + torch.arange(DENSE_SOURCES, device=bits.device)).clamp_(
        max=bits.shape[1] - 1
    )
    inside = block[:, None] * DENSE_SOURCES + torch.arange(DENSE_SOURCES, device=bits.device) < bits.shape[1]
    which = bits[head[:, None], source, word[:, None]] * inside  # [n, BJ]
    shift = torch.arange(32, dtype=torch.int32, device=bits.device)
    t, b, s = ((which[:, None, :] >> shift[:, None]) & 1).nonzero(as_tuple=True)
    bits[head[:, None].expand_as(source)[inside], source[inside], word[:, None].expand_as(source)[inside]] = 0
    return Listed(first_head + head[t].int(), source[t, s].int(), (word[t] * 32 + b).int()), values[t, b, s]


def coefficients(chunk: Chunk, listed: Listed) -> tuple[Tensor, Tensor]:
    """row_scale[i] * A[h, i, j] and g of listed pairs, float32 [N] each."""
    a, towards = chunk.task.attention, chunk.towards
    c, g = torch.empty(2, len(listed.row), dtype=torch.float32, device=listed.row.device)
    width, bl = a.v.shape[2], 256 if interpreted() else COEFFICIENT_PAIRS
    _coefficients[(triton.cdiv(len(c), bl),)](
        lse=chunk.lse, rows=chunk.rows.int(), pair_head=listed.head, pair_source=listed.source,
        pair_row=listed.row, out=c, out_g=g, pairs=len(c), heads=a.heads, BL=bl,
        v=chunk.of.v, w=towards.w, w_low=towards.w_low, unit=towards.unit,
        E_V=width, BE_V=depth_step(width), SPLIT=chunk.of.split,
        row_scale=c if a.row_scale is None else a.row_scale.contiguous(), ROW_SCALE=a.row_scale is not None,
        num_warps=4, **chunk.of.arguments,
    )  # fmt: skip
    return c, g


@dataclass
class _Results:
    """What the chunks fill in."""

    edges: Tensor  # [T, T]
    per_head: Tensor  # [T, H]
    parts: Tensor  # [T, 2 + others]
    normaliser: Tensor  # [T]
    certificate: Tensor  # [T]
    checksum: Tensor  # [T]
    kept: list[Pairs]
    evaluated: int = 0
    positive: int = 0


@torch.no_grad()
def attention_contributions(
    task: AttentionTask, *, evaluate: Evaluator = evaluate_l1, lister: Lister = list_pairs, dense: bool = True
) -> AttentionResult:
    """All shares of all rows; see AttentionTask and AttentionResult.

    `evaluate` and `lister` are the irregular steps, which csrc/cuda does better; `dense` allows tiles that
    are mostly listed to be evaluated as a whole (`_dense`).
    """
    device, (tokens, heads) = task.whole.device, (task.whole.shape[0], task.attention.heads)
    of = operands(task.attention)
    lse = row_logsumexp(of)
    per_source = _source_norms(task, of)
    out = _Results(
        edges=torch.zeros(tokens, row_stride(tokens), device=device)[:, :tokens],
        per_head=torch.zeros(tokens, heads, device=device),
        parts=torch.zeros(tokens, 2 + len(task.others), device=device),
        normaliser=torch.zeros(tokens, device=device),
        certificate=torch.zeros(tokens, device=device),
        checksum=torch.zeros(tokens, device=device),
        kept=[],
    )
    l1 = task.measure == "l1"
    steps = _Steps(evaluate if l1 else evaluate_l2, lister, dense and l1 and task.attention.gate is None)
    everything = torch.arange(tokens, device=device)
    chunks(
        everything,
        _rows_at_once(task, of),
        lambda rows: _chunk(task, of, lse, per_source, rows, out, steps, consecutive=True),
    )
    doubtful = everything[:0]
    if l1 and task.screen > 0:
        doubtful = torch.nonzero(out.certificate > task.max_certificate).flatten()
    if len(doubtful):
        out.kept = [Pairs(*(x[~torch.isin(p.destination, doubtful)] for x in p)) for p in out.kept]
        positive_before, exact = out.positive, replace(task, screen=0.0)
        out.edges[doubtful] = 0
        chunks(
            doubtful,
            _rows_at_once(exact, of),
            lambda rows: _chunk(exact, of, lse, per_source, rows, out, steps, consecutive=False),
        )
        out.positive = positive_before
    return AttentionResult(
        edges=out.edges,
        per_head=out.per_head,
        residual=out.parts[:, 0],
        bias=out.parts[:, 1],
        others=out.parts[:, 2:],
        normaliser=out.normaliser,
        certificate=out.certificate,
        checksum=out.checksum,
        kept=None if task.keep is None else _join(out.kept, tokens, heads, torch.float32, device),
        evaluated=out.evaluated if l1 else out.positive,
        positive=out.positive,
        reevaluated=len(doubtful),
    )


class _Steps(NamedTuple):
    evaluate: Evaluator
    lister: Lister
    dense: bool


def _source_norms(task: AttentionTask, of: Operands) -> Tensor:
    """[H, T]: the rounding margin of g per unit of A (L1), or |v[j] W_O[h]|_2 by a Gram matrix (L2)."""
    a = task.attention
    heads, tokens = a.q.shape[:2]
    if task.measure == "l1":
        # A gate is bounded by its largest entry in all heads (`_row_factors`), and so is W_O r.
        norms = torch.linalg.vector_norm(a.w_o, 1, dim=-1, dtype=torch.float32)
        out = torch.zeros(heads, row_stride(tokens), device=a.q.device)[:, :tokens]
        margin = tensor_core_margin(sum(a.w_o.shape[1:]), of.split)
        largest = torch.zeros((), device=a.q.device)
        for kv, v in enumerate(a.v):
            absolute, of_group = v.abs().float(), slice(kv * a.group, (kv + 1) * a.group)
            with ieee_matmul():
                out[of_group] = norms[of_group] @ absolute.T * margin
            if of.split:
                out[of_group] += absolute.sum(-1) * (norms.amax() * SPLIT_LOSS)
                largest = torch.maximum(largest, absolute.masked_fill_(~absolute.isfinite(), 0).amax())
        return out.add_(largest * norms.sum(-1)[:, None] * SPLIT_LOSS)
    out = torch.zeros(heads, row_stride(tokens), device=a.q.device)[:, :tokens]
    for h in range(heads):
        v, w_o = a.v[h // a.group], a.w_o[h].double()
        out[h] = ((v.double() @ (w_o @ w_o.T)) * v).sum(-1).clamp_(min=0).sqrt_()
    return out


def _row_factors(task: AttentionTask, rows: Tensor, unit: Tensor) -> Tensor:
    """`per_row` of `_screen`, [R, H]. A gate scales each number of v: the row's largest bounds them all."""
    a = task.attention
    out = torch.ones(len(rows), a.heads, device=rows.device)
    if a.gate is not None:
        out *= a.gate[rows].float().abs().amax((-2, -1))[:, None]
    if a.row_scale is not None:
        out *= a.row_scale[rows, None].float().abs()
    return out if task.measure == "l1" else (out / unit[:, None]).float()


def _rows_at_once(task: AttentionTask, of: Operands) -> int:
    """Destinations whose directions, bits, sums and (at screen 0) lists fit the workspace; whole tiles."""
    a = task.attention
    heads, tokens, d_model = a.heads, a.q.shape[1], task.whole.shape[1]
    listed = 0.5 if task.screen == 0 else 0.05  # share of the pairs, and half of them lie above the diagonal
    row_bytes = (
        heads * a.v.shape[2] * 16
        + heads * tokens // 8
        + tokens * 24
        + tokens // of.tile.BN * heads * 4
        + int(heads * tokens / 2 * listed * LISTED_BYTES)
        + d_model * (24 if task.measure == "l2" else 4)
    )
    return max(1, task.workspace // row_bytes // of.tile.BM) * of.tile.BM


def _others(task: AttentionTask, rows: Tensor) -> _Rows:
    """As `reference._other_parts`, without signs; `whole` in float32 for L2 only."""
    if task.measure == "l2":
        return _others_l2(task, rows)
    none = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    index, whole, mass = rows.int(), task.whole.contiguous(), none
    proximities, signed, absolute = [], none.clone(), none.clone()
    for part in (task.resid_pre, task.bias, *task.others):
        if part is None:
            proximities.append(none)
            continue
        proximity, g, mass = part_sums(part, whole, index)
        proximities.append(proximity)
        signed += g
        absolute += g.abs()
    nothing = whole.new_empty(len(rows), 0)
    return _Rows(nothing, (), nothing, mass, torch.stack(proximities, -1), signed, absolute)


def _others_l2(task: AttentionTask, rows: Tensor) -> _Rows:
    found = [
        piece._replace(prepared=(), signs=piece.signs[:, :0])
        for some in pieces(len(rows), OTHER_ROWS)
        for piece in [_other_parts(task, rows[some])]
    ]
    columns = [torch.cat(c) if isinstance(c[0], Tensor) else () for c in zip(*found, strict=True)]
    return _Rows(*columns)  # type: ignore[arg-type]  # zip forgets which column is which


def _chunk(
    task: AttentionTask,
    of: Operands,
    lse: Tensor,
    per_source: Tensor,
    rows: Tensor,
    out: _Results,
    steps: _Steps,
    *,
    consecutive: bool,
) -> None:
    """Steps 1 to 4 for destinations `rows`, and their shares; `consecutive` if each row is the next."""
    a, device = task.attention, rows.device
    tokens, heads, count = a.q.shape[1], a.heads, len(rows)
    others = _others(task, rows)
    fixed = others.parts.sum(-1)
    unit = torch.ones_like(fixed)  # of the screen's values
    if task.measure == "l2":
        unit = others.whole.double().abs().amax(-1)
        unit = unit.masked_fill(unit == 0, 1)
    scalars = {
        "per_source": per_source,
        "per_row": _row_factors(task, rows, unit),
        "threshold": (task.screen * others.mass).float(),
        "listed": ((task.keep or 0.0) * fixed / unit * (1 - 1e-6)).float(),
        "whole_norm": (torch.linalg.vector_norm(others.whole.double(), dim=-1) / unit).float(),
    }
    along_signs = of.directions(sign(task.whole[rows]).to(a.w_o.dtype), rows)
    # Of L2 the first screen is for the checksum only.
    keep, l1 = task.keep is not None, task.measure == "l1"
    screened = run_screen(
        of, lse, along_signs, rows, scalars, out.edges, l2=False, keep=keep and l1, consecutive=consecutive
    )
    stats = screened.stats
    if task.measure == "l2":
        towards = of.directions((others.whole.double() / unit[:, None] / unit[:, None]).float(), rows)
        screened = run_screen(
            of, lse, towards, rows, scalars, out.edges, l2=True, keep=keep, consecutive=consecutive
        )
        stats = torch.stack([torch.zeros_like(stats[0]), stats[1], stats[2], screened.stats[3]])

    # Exact values: integers, whose sums do not depend on their order.
    quantum = others.mass / 2.0**40
    edges_fixed = torch.zeros(count, tokens, dtype=torch.int64, device=device)
    heads_fixed = torch.zeros(count, heads, dtype=torch.int64, device=device)
    lost = torch.zeros(count, dtype=torch.float64, device=device)  # NaN where an exact value is
    found: list[Pairs] = []
    evaluated = 0
    chunk = Chunk(task, of, rows, lse, others, along_signs)
    listed_in_full = (scalars["listed"] * unit).float()

    def add(listed: Listed, value: Tensor) -> None:
        nonlocal evaluated
        evaluated += len(value)
        deposit(value, listed.row, listed.source, listed.head, quantum, edges_fixed, heads_fixed, lost)
        if task.keep is not None:
            (n,) = (value > listed_in_full[listed.row]).nonzero(as_tuple=True)
            row, source, head = (x[n].long() for x in (listed.row, listed.source, listed.head))
            found.append(Pairs(row, source, head, value[n]))

    per_step = max(LEAST_LISTED, task.workspace // 4 // LISTED_BYTES)
    for some in _head_groups(screened.bits, per_step):
        bits = turn_bits(screened.bits[some], tokens)
        if steps.dense:
            tiles = dense_tiles(bits)
            for t in pieces(len(tiles), max(1, per_step // (32 * DENSE_SOURCES))):
                add(*evaluate_dense(chunk, lse, tiles[t], bits, some.start))
        listed = steps.lister(bits)
        listed = listed._replace(head=listed.head + some.start)
        if len(listed.row):
            add(listed, steps.evaluate(chunk, listed, *coefficients(chunk, listed)))

    for some in _head_groups(screened.keep_bits, per_step) if task.keep is not None else ():
        listed = steps.lister(screened.keep_bits[some])  # by row, which does not matter here
        listed = Listed(listed.head + some.start, listed.row, listed.source)
        if len(listed.row):
            c, g = coefficients(chunk, listed)
            value = g.clamp(min=0) if task.measure == "l1" else evaluate_l2(chunk, listed, c, g)
            found.append(Pairs(listed.row.long(), listed.source.long(), listed.head.long(), value))

    of_heads = (screened.head_part.sum(0, dtype=torch.float64) * unit).T
    of_heads += heads_fixed * quantum[:, None]
    total = fixed + of_heads.sum(-1) + lost
    edge_shares(out.edges, edges_fixed, rows.int(), unit, quantum, total)
    out.per_head[rows] = divide(of_heads, total[:, None]).float()
    out.parts[rows] = divide(others.parts, total[:, None]).float()
    out.normaliser[rows] = total.float()
    skipped, signed, absolute, hopeful = stats
    out.certificate[rows] = certificate(skipped, total).float()
    defect = (signed + others.signed - others.mass).abs()
    out.checksum[rows] = divide(defect, absolute + others.absolute).float()
    positive = int(hopeful.sum())
    kept = [] if task.keep is None or not found else [_keep(found, out.edges, total, rows, task.keep)]
    # After all that may run out of memory: the rows are then done again, and what adds up would count twice.
    out.evaluated += evaluated
    out.positive += positive
    out.kept += kept


def _head_groups(bits: Tensor, per_step: int) -> list[slice]:
    """Consecutive heads whose lists have at most about `per_step` pairs."""
    heads = len(bits)
    # A word is nonzero in few places: count those, and take 32 pairs each as the bound.
    most = torch.stack([(b != 0).sum() for b in bits]).tolist()
    groups, start, size = [], 0, 0
    for h in range(heads):
        if size and size + most[h] * 32 > per_step:
            groups.append(slice(start, h))
            start, size = h, 0
        size += most[h] * 32
    groups.append(slice(start, heads))
    return groups


def _keep(found: list[Pairs], edges: Tensor, total: Tensor, rows: Tensor, keep: float) -> Pairs:
    """Of the candidates (chunk coordinates) those with share > keep on edges with share > keep."""
    r, j, h, value = (torch.cat(columns) for columns in zip(*found, strict=True))
    share = divide(value.double(), total[r]).float()
    threshold = torch.tensor(keep, dtype=torch.float32, device=share.device)
    kept = (share > threshold) & (edges[rows[r], j] > threshold)
    return Pairs(rows[r[kept]], j[kept], h[kept], share[kept])
