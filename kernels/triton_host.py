"""What the Triton kernels need on the host side: operands in the form that they read, tile sizes, chunks.

16-bit operands. The pattern needs q.k, whose factors are as given. <v, W_O r> needs W_O r in full float32,
which a tensor core does not take: it is split into two float16 terms, 22 bits together. v, and the W_O r of
each destination, are first multiplied by a power of two that puts their largest entry near 2^14: entries 2^31
times smaller than the largest of v, and 2^18 times smaller than the largest of W_O r, still have all their
bits, and what is lost below is in the rounding margin. float32 operands are used as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmtt.kernels import notices
from lmtt.kernels.numerics import ieee_matmul
from lmtt.kernels.types import Attention

SMALL_SHARED = (86, 87, 89, 120, 121)  # chips whose blocks have less than 100 KiB of shared memory
HEADROOM = 14  # exponent of the largest entry of a scaled float16 operand; float16 reaches 2^16


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's tile, and how Triton is to compile it."""

    BM: int  # destinations
    BN: int  # sources
    warps: int
    stages: int
    screen_warps: int = 8  # its epilogue holds several tiles of numbers at once
    inside: int = (
        0  # sources of a tile that needs no mask, for the kernels that have one; 0 = no such kernels
    )
    inside_warps: int = 8

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def depth_step(width: int) -> int:
    """How much of a head is multiplied at a time: the largest divisor, so that 80 or 96 waste nothing."""
    return next((step for step in (64, 32, 16) if width % step == 0), 16)


def chip(tensor: Tensor) -> int:
    """Compute capability of a tensor's device, 90 for 9.0; of no matter where kernels are interpreted."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def tile(width: int, dtype: torch.dtype, chip: int) -> Tile:
    """Tile of the attention kernels for heads of this width (the wider of key and value).

    Sizes at which the compiler neither spills nor exceeds the shared memory of sm_80 and sm_90
    (tests/gpu/test_layers.py holds one of each kind to that, `benchmarks/gpu_aot.py --full` every width).
    """
    if interpreted():
        return Tile(32, 32, 4, 1, inside=64)
    if dtype == torch.float32:  # products are done in registers: 16 rows are as many as never spill
        return Tile(16, 64, 4, 2, screen_warps=4) if width < 128 else Tile(16, 32, 8, 2, screen_warps=4)
    if width > 128 and chip in SMALL_SHARED:
        return Tile(32, 32, 4, 2)
    if chip < 90 or width > 128 or chip in SMALL_SHARED:
        return Tile(32, 64, 8 if width == 96 else 4, 2)  # four warps spill at 96 on sm_80
    # 128 sources: q and both terms of W_O r are read again for each tile, and L2 is what bounds that.
    return Tile(64, 64, 4, 2, inside=128)


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, scale [..., 1]) with x = y * scale, a power of two that puts the largest of y near 2^HEADROOM."""
    largest = x.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent - HEADROOM
    exponent = exponent.masked_fill((largest == 0) | ~largest.isfinite(), 0).clamp_(-120, 120)
    return torch.ldexp(x, -exponent), torch.ldexp(torch.ones_like(largest), exponent)


def half_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """(y, scale []): float16 of v's shape [H_kv, T, E_v], v = y * scale, one power of two for all of it."""
    largest = torch.stack([torch.where(x.isfinite(), x, 0).abs_().amax().float() for x in v]).amax()
    exponent = (torch.frexp(largest).exponent - HEADROOM).masked_fill(largest == 0, 0).clamp(-120, 120)
    y = torch.empty(v.shape, dtype=torch.float16, device=v.device)
    for head, x in zip(y, v, strict=True):  # one at a time: float32 takes twice as much
        head.copy_(torch.ldexp(x.float(), -exponent))
    return y, torch.ldexp(torch.ones_like(largest), exponent)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, n] @ b [k, n]^T in float32, exact but for the order of sums.

    On CUDA 16-bit b stays as it is: a float32 `a` that 16 bits do not hold is split into as many terms of b's
    dtype as it takes, each multiplied by the library on tensor cores with a float32 result.
    """
    if b.dtype == torch.float32 or not b.is_cuda:
        with ieee_matmul():
            return a.float() @ b.float().T
    if a.dtype == b.dtype:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    rest, scale = scaled(a.float())
    terms = []
    for _ in range(3):
        terms.append(rest.to(b.dtype))
        rest = rest - terms[-1].float()
        if not bool(rest.any()):
            break
    out = torch.mm(terms[-1], b.T, out_dtype=torch.float32)
    for term in reversed(terms[:-1]):
        out += torch.mm(term, b.T, out_dtype=torch.float32)
    return out.mul_(scale)


@dataclass(frozen=True)
class Directions:
    """W_O[h] @ r[i], times gate and row_scale, for some destinations, as the kernels read it."""

    w: Tensor  # [R, H, E_v], float32, or the high float16 term
    w_low: Tensor  # the low term, or `w` again
    unit: Tensor  # float32 [R]: products with v are in units of it (1 where nothing is split)


@dataclass(frozen=True)
class Operands:
    """One attention as the kernels read it; `arguments` are what all of them take."""

    attention: Attention
    v: Tensor  # [H_kv, T, E_v], float32 or scaled float16
    v_scale: Tensor  # [], a power of two
    tile: Tile
    arguments: dict[str, Any]

    @property
    def split(self) -> bool:
        return self.v.dtype == torch.float16

    def directions(self, direction: Tensor, rows: Tensor) -> Directions:
        """For direction [R, D] of destinations `rows` [R]."""
        a = self.attention
        heads, width, d_model = a.w_o.shape
        w = product(direction, a.w_o.reshape(heads * width, d_model)).view(-1, heads, width)
        if a.gate is not None:
            w *= a.gate[rows]
        if a.row_scale is not None:
            w *= a.row_scale[rows, None, None]
        if not self.split:
            return Directions(w.contiguous(), w, torch.ones(len(w), device=w.device))
        from lmtt.kernels.triton_split import split

        high, low, scale = split(w)
        return Directions(high, low, scale * self.v_scale)

    @property
    def inside(self) -> int:
        """Sources of the tiles that kernels without masks take, 0 where there are none for this attention."""
        a = self.arguments
        plain = not (a["SOFTCAP"] or a["MASK"] or a["ALIBI"])
        fits = a["E"] == self.v.shape[2] and a["E"] in (64, 128)
        return self.tile.inside if self.split and plain and fits else 0


def operands(attention: Attention) -> Operands:
    """Contiguous copies where needed; v as float16 with a scale of each source where inputs are 16-bit."""
    a = attention
    v, v_scale = (a.v.contiguous(), a.v) if a.q.dtype == torch.float32 else half_values(a.v)
    width = max(a.q.shape[2], a.v.shape[2])
    mask = a.mask
    if mask is not None:
        if mask.shape[0] > 1 and mask.stride(0) == 0:
            mask = mask[:1]
        mask = mask.contiguous()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    arguments = {
        "q": a.q.contiguous(),
        "k": a.k.contiguous(),
        "group": a.group,
        "tokens": a.q.shape[1],
        "scale": float(a.scale),
        "softcap": float(a.softcap or 1.0),
        "window": int(a.window or 0),
        "mask": a.q if mask is None else mask,
        "mask_head": 0 if mask is None or mask.shape[0] == 1 else mask.shape[1] * mask.shape[2],
        "alibi": a.q if a.alibi is None else a.alibi.contiguous(),
        "E": a.q.shape[2],
        "BE": depth_step(a.q.shape[2]),
        "SOFTCAP": a.softcap is not None,
        "WINDOW": a.window is not None,
        "MASK": 0 if mask is None else 1 if mask.dtype == torch.uint8 else 2,
        "ALIBI": a.alibi is not None,
    }
    return Operands(a, v, v_scale, tile(width, a.q.dtype, chip(a.q)), arguments)


def chunks(rows: Tensor, step: int, work: Callable[[Tensor], None]) -> None:
    """`work` on `step` rows at a time; half as many whenever the device runs out of memory, and says so."""
    done = 0
    while done < len(rows):
        some = rows[done : done + step]
        try:
            work(some)
        except torch.OutOfMemoryError:
            if len(some) == 1:
                raise
            while step >= len(some):  # it may be far more than there are
                step //= 2
            torch.cuda.empty_cache()
            notices.say(f"out of device memory with {len(some)} rows at a time; going on with {step}")
            continue
        done += len(some)


def pieces(n: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover n."""
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))
