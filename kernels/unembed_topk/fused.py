"""The k largest logits and their log-sum-exp by tiles of the vocabulary, in Triton.

1. `_logits`  one tile of states by one tile of the vocabulary: product, bias, scale, softcap, and the tile's
              largest logit and sum of exponentials in the epilogue. Logits of one chunk of the vocabulary are
              stored, as wide as the workspace allows; never [N, V].
2. merge      the chunk's k best into the k best so far; chunks come in order, so ties keep the lower index.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtt.kernels.budget import WORKSPACE
from lmtt.kernels.neurons.fused import tile
from lmtt.kernels.topk import stable_topk
from lmtt.kernels.triton_bricks import VARIES, capped
from lmtt.kernels.triton_host import chip, chunks
from lmtt.kernels.types import TopK


@triton.jit(do_not_specialize=VARIES)
def _logits(
    states, w_u, bias, out, largest, exponentials, count, vocabulary, width, scale, softcap,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """out[r, t] = softcap(scale * (<states[r], w_u[t]> + bias[t])); per tile max and sum of exp."""
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    t = tl.program_id(0) * BN + tl.arange(0, BN)
    real = r < count
    exists = t < vocabulary
    total = tl.zeros([BM, BN], tl.float32)
    from_r = r.to(tl.int64) * width
    from_t = t.to(tl.int64) * width
    for first in range(0, width, BD):
        d = first + tl.arange(0, BD)
        inside = d < width
        x = tl.load(states + from_r[:, None] + d[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        y = tl.load(w_u + from_t[None, :] + d[:, None], mask=exists[None, :] & inside[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + t, mask=exists, other=0.0).to(tl.float32)[None, :]
    z = capped(total * scale, softcap, SOFTCAP)
    both = real[:, None] & exists[None, :]
    tl.store(out + r.to(tl.int64)[:, None] * vocabulary + t[None, :], z, mask=both)
    z = tl.where(exists[None, :], z, float("-inf"))
    most = tl.max(z, 1)
    safe = tl.where(most == float("-inf"), 0.0, most)
    at = tl.program_id(0).to(tl.int64) * count + r
    tl.store(largest + at, most, mask=real)
    tl.store(exponentials + at, tl.sum(tl.exp(z - safe[:, None]), 1), mask=real)


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
    (count, width), vocabulary = states.shape, w_u.shape[0]
    values = torch.empty(count, k, device=x.device)
    indices = torch.empty(count, k, dtype=torch.int64, device=x.device)
    logsumexp = torch.empty(count, device=x.device)
    size = tile(w_u.dtype if same else torch.float32, chip(x), wide=True)
    rows_at_once = max(size.BM, min(count, workspace // (16 * max(k, size.BN))))
    token_bytes = 16 * rows_at_once + (0 if same else 4 * width)
    step = min(vocabulary, max(size.BN, workspace // token_bytes))

    def work(rows: Tensor) -> None:
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        n = len(rows)
        best = torch.empty(n, 0, device=x.device)
        best_index = torch.empty(n, 0, dtype=torch.int64, device=x.device)
        total = torch.full((n,), -torch.inf, dtype=torch.float64, device=x.device)
        for start in range(0, vocabulary, step):
            some = w_u[start : start + step]
            some = some.contiguous() if same else some.float().contiguous()
            blocks = triton.cdiv(len(some), size.BN)
            logits = torch.empty(n, len(some), device=x.device)
            largest, exponentials = torch.empty(2, blocks, n, device=x.device)
            _logits[(blocks, triton.cdiv(n, size.BM))](
                states[here], some, some if bias is None else bias[start : start + step].contiguous(), logits,
                largest, exponentials, n, len(some), width, float(scale), float(softcap or 1.0),
                BM=size.BM, BN=size.BN, BD=size.BD, BIAS=bias is not None, SOFTCAP=softcap is not None,
                num_warps=size.warps, num_stages=size.stages,
            )  # fmt: skip
            of_tiles = largest.double() + exponentials.double().log()
            total = torch.logaddexp(total, of_tiles.logsumexp(0))
            top, at = stable_topk(logits, min(k, len(some)))
            # The best so far come first and have lower indices, so position breaks ties as the index does.
            merged = torch.cat([best, top], -1)
            merged_index = torch.cat([best_index, at + start], -1)
            best, at = stable_topk(merged, min(k, merged.shape[1]))
            best_index = merged_index.gather(-1, at)
        values[here], indices[here], logsumexp[here] = best, best_index, total.float()

    if count:
        chunks(torch.arange(count, device=x.device), rows_at_once, work)
    return TopK(values, indices, logsumexp)
