"""The k largest logits of each state and their log-sum-exp, one tile of the vocabulary at a time.

    logits = softcap(scale * (norm(x) @ W_U^T + bias)),   softcap(z) = c * tanh(z / c)

Never holds [N, V]: each tile's logits are merged into the k best so far and a running log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmtt.kernels.budget import WORKSPACE
from lmtt.kernels.numerics import compute_dtype, ieee_matmul
from lmtt.kernels.topk import stable_topk
from lmtt.kernels.types import TopK


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
    """Top k of x [N, D] unembedded by w_u [V, D] (an lm_head's own layout); bias [V]; k <= V.

    `norm` is called once on x as it is, so that any model's own final norm serves. Values are float32,
    float64 for float64.
    """
    dtype = compute_dtype(x.dtype)
    states = (x if norm is None else norm(x)).to(dtype)
    count, vocabulary = len(states), w_u.shape[0]
    # Per logit: the value, a softcapped or exponentiated copy, and the merge; per token its widened weights.
    token_bytes = 4 * dtype.itemsize * max(count, 1) + w_u.shape[1] * dtype.itemsize
    tile = max(1, min(vocabulary, workspace // token_bytes))
    values = torch.empty(count, 0, dtype=dtype, device=x.device)
    indices = torch.empty(count, 0, dtype=torch.int64, device=x.device)
    logsumexp = torch.full((count,), -torch.inf, dtype=torch.float64, device=x.device)
    with ieee_matmul():
        for start in range(0, vocabulary, tile):
            logits = states @ w_u[start : start + tile].to(dtype).T
            if bias is not None:
                logits += bias[start : start + tile]
            logits *= scale
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            logsumexp = torch.logaddexp(logsumexp, logits.logsumexp(-1).double())
            tile_values, tile_indices = stable_topk(logits, min(k, logits.shape[1]))
            # The best so far come first and have lower indices, so position breaks ties as the index does.
            merged = torch.cat([values, tile_values], -1)
            merged_indices = torch.cat([indices, tile_indices + start], -1)
            values, at = stable_topk(merged, min(k, merged.shape[1]))
            indices = merged_indices.gather(-1, at)
    return TopK(values, indices, logsumexp.to(dtype))
