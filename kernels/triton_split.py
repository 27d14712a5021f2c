"""float32 as two float16 terms, which tensor cores take: one program for each row, one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtt.kernels.triton_host import HEADROOM, interpreted

SHIFT = tl.constexpr(HEADROOM)


@triton.jit
def power_of_two(exponent):
    """2^exponent as float32, for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split(x, high, low, unit, width, BLOCK: tl.constexpr):
    """x[r] = (high[r] + low[r]) * unit[r], a power of two that puts the largest of the row near 2^SHIFT."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * width
    most = tl.zeros([BLOCK], tl.int32)
    for first in range(0, width, BLOCK):
        e = first + tl.arange(0, BLOCK)
        bits = tl.load(x + at + e, mask=e < width, other=0.0).to(tl.int32, bitcast=True)
        exponent = (bits >> 23) & 255
        most = tl.maximum(most, tl.where(exponent == 255, 0, exponent))  # not of inf or NaN
    largest = tl.max(most, 0)
    up = tl.where(largest == 0, 0, tl.minimum(tl.maximum(SHIFT - (largest - 126), -120), 120))
    factor = power_of_two(up)
    for first in range(0, width, BLOCK):
        e = first + tl.arange(0, BLOCK)
        y = tl.load(x + at + e, mask=e < width, other=0.0) * factor
        h = y.to(tl.float16)
        tl.store(high + at + e, h, mask=e < width)
        tl.store(low + at + e, (y - h.to(tl.float32)).to(tl.float16), mask=e < width)
    tl.store(unit + row, power_of_two(-up))


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(high, low, unit): float16 terms of the shape of x [R, ...], float32, and float32 [R]."""
    x = x.contiguous()
    high, low = torch.empty(2, *x.shape, dtype=torch.float16, device=x.device)
    unit = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        width = x[0].numel()
        block = 256 if interpreted() else 1024
        _split[(len(x),)](x, high, low, unit, width, BLOCK=block, num_warps=4)
    return high, low, unit
