"""What is done once for each destination, each listed pair or each edge: one launch in the place of many.

1. `_part`     proximity and <part, sign(whole)> of what every destination has one of: residual, bias, others.
2. `_deposit`  exact values of listed pairs, added as integers to their edge and their head.
3. `_shares`   first-order values and integers of each edge, over the row's total.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtt.kernels.triton_bricks import VARIES
from lmtt.kernels.triton_host import interpreted

DEPTH = 1024  # coordinates that `_part` adds up in as many partial sums
DEPOSITED = 1024  # pairs of one program of `_deposit`
EDGES = 1024  # of one program of `_shares`


@triton.jit(do_not_specialize=VARIES)
def _part(
    part, whole, rows, proximity, signed, mass, part_stride, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of row rows[r]: max(0, |y| - |y - x|), <x, sign(y)> and |y|, float64; part_stride 0: all share x."""
    r = tl.program_id(0)
    i = tl.load(rows + r).to(tl.int64)
    near = tl.zeros([BLOCK], tl.float32)
    along = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        d = first + tl.arange(0, BLOCK)
        x = tl.load(part + i * part_stride + d, mask=d < width, other=0.0).to(tl.float32)
        y = tl.load(whole + i * width + d, mask=d < width, other=0.0).to(tl.float32)
        t = tl.where(y.to(tl.int32, bitcast=True) < 0, -x, x)  # by the sign bit, as numerics.sign
        near += tl.minimum(t, 2 * tl.abs(y) - t, propagate_nan=tl.PropagateNan.ALL)
        along += t
        size += tl.abs(y)
    near_all = tl.sum(near.to(tl.float64), 0)
    tl.store(proximity + r, tl.where(near_all <= 0, 0.0, near_all))  # NaN stays
    tl.store(signed + r, tl.sum(along.to(tl.float64), 0))
    tl.store(mass + r, tl.sum(size.to(tl.float64), 0))


@triton.jit(do_not_specialize=VARIES)
def _deposit(
    value, row, source, head, quantum, edges, per_head, lost, pairs, tokens, heads, BLOCK: tl.constexpr
):  # fmt: skip
    """edges[row, source] and per_head[row, head] += value / quantum[row], rounded; lost[row] = NaN."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = n < pairs
    x = tl.load(value + n, mask=real, other=0.0).to(tl.float64)
    r = tl.load(row + n, mask=real, other=0)
    q = tl.load(quantum + r, mask=real, other=0.0)
    finite = x - x == 0
    amount = tl.floor(tl.where(finite & (q > 0), x, 0.0) / tl.where(q > 0, q, 1.0) + 0.5).to(tl.int64)
    wide = r.to(tl.int64)
    j, h = tl.load(source + n, mask=real, other=0), tl.load(head + n, mask=real, other=0)
    tl.atomic_add(edges + wide * tokens + j, amount, mask=real, sem="relaxed")
    tl.atomic_add(per_head + wide * heads + h, amount, mask=real, sem="relaxed")
    tl.store(lost + r, x - x, mask=real & (x - x != 0))


@triton.jit(do_not_specialize=VARIES)
def _shares(edges, fixed, rows, unit, quantum, total, tokens, stride, BLOCK: tl.constexpr):
    """edges[rows[r], j] = (edges * unit[r] + fixed[r, j] * quantum[r]) / total[r]; 0 where that is 0."""
    r = tl.program_id(1)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = edges + tl.load(rows + r).to(tl.int64) * stride + j
    there = j < tokens
    sums = tl.load(at, mask=there, other=0.0).to(tl.float64) * tl.load(unit + r)
    whole_numbers = tl.load(fixed + r.to(tl.int64) * tokens + j, mask=there, other=0)
    sums += whole_numbers.to(tl.float64) * tl.load(quantum + r)
    all_of_row = tl.load(total + r)
    share = tl.where(all_of_row == 0, sums * 0, sums / tl.where(all_of_row == 0, 1.0, all_of_row))
    tl.store(at, share.to(tl.float32), mask=there)


def part_sums(part: Tensor, whole: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(proximity, signed, mass) of `_part` for a part [D] or [T, D] at rows (int32 [R]); float64 [R] each."""
    proximity, signed, mass = torch.empty(3, len(rows), dtype=torch.float64, device=whole.device)
    part = part.contiguous()
    block = 64 if interpreted() else DEPTH
    _part[(len(rows),)](
        part, whole, rows, proximity, signed, mass, 0 if part.dim() == 1 else part.shape[1], whole.shape[1],
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return proximity, signed, mass


def deposit(
    value: Tensor, row: Tensor, source: Tensor, head: Tensor, quantum: Tensor, edges: Tensor,
    per_head: Tensor, lost: Tensor,
) -> None:  # fmt: skip
    """See `_deposit`: value float32, indices int32 [N]; quantum, lost float64 [R]; sums int64 [R, .]."""
    if len(value):
        block = 128 if interpreted() else DEPOSITED
        _deposit[(triton.cdiv(len(value), block),)](
            value, row, source, head, quantum, edges, per_head, lost, len(value), edges.shape[1],
            per_head.shape[1], BLOCK=block, num_warps=4,
        )  # fmt: skip


def edge_shares(
    edges: Tensor, fixed: Tensor, rows: Tensor, unit: Tensor, quantum: Tensor, total: Tensor
) -> None:
    """See `_shares`: rows of `edges` [T, T] in place; unit, quantum, total float64 [R]."""
    tokens = edges.shape[1]
    block = min(EDGES, triton.next_power_of_2(tokens))
    _shares[(triton.cdiv(tokens, block), len(rows))](
        edges, fixed, rows, unit, quantum, total, tokens, edges.stride(0), BLOCK=block, num_warps=4
    )
