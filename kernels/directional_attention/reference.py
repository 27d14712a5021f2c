"""Attention weights and directional contributions from the definition, in plain torch, a block at a time.

    d[h, i, j] = <part[i, h, j], r[i]> = A[h, i, j] * <v[j] * gate[i, h], row_scale[i] * (W_O[h] @ r[i])>

1. `blocks` cuts the destinations and heads so that what is held fits a workspace.
2. `weights` gives A for one block from q, k and whatever changes the logits.
3. `project` gives row_scale[i] * gate[i, h] * (W_O[h] @ r[i]): E_v numbers per destination and head.
4. `against` multiplies such vectors with v (or q with k), head by head, without repeating shared k and v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lmtt.kernels.budget import WORKSPACE
from lmtt.kernels.numerics import compute_dtype, ieee_matmul
from lmtt.kernels.types import Attention

Reduce = Literal["heads", "sources"] | None

MOST_ROWS = 128  # more destinations per block gain nothing, and waste work above the diagonal
LEAST_ROWS = 16  # fewer make the matrix products thin: rather take fewer heads


class Block(NamedTuple):
    """Some destinations with all the sources that they may see, and the heads to take at a time."""

    rows: Tensor  # int64 [n], destinations
    first: int  # sources first <= j < last
    last: int
    heads: tuple[tuple[int, int], ...]  # consecutive ranges that cover all heads


def blocks(
    attention: Attention,
    destinations: Tensor,
    *,
    workspace: int = WORKSPACE,
    pair_bytes: int = 16,
    row_bytes: int = 0,
) -> Iterator[Block]:
    """Cut `destinations` (int64 [n]) into blocks that need at most about `workspace` bytes.

    `pair_bytes` is what the caller holds per (head, destination, source), `row_bytes` per destination. One
    destination and one head is the least, whatever the workspace.
    """
    rows, heads = _block_shape(attention, workspace, pair_bytes, row_bytes)
    ranges = tuple((h, min(h + heads, attention.heads)) for h in range(0, attention.heads, heads))
    for start in range(0, len(destinations), rows):
        some = destinations[start : start + rows]
        first = 0 if attention.window is None else max(0, int(some.min()) - attention.window + 1)
        yield Block(some, first, int(some.max()) + 1, ranges)


def _block_shape(attention: Attention, workspace: int, pair_bytes: int, row_bytes: int) -> tuple[int, int]:
    tokens = attention.q.shape[1]
    item = compute_dtype(attention.q.dtype).itemsize
    per_head = tokens * pair_bytes + 2 * (attention.q.shape[2] + attention.v.shape[2]) * item
    heads = attention.heads
    rows = workspace // (heads * per_head + row_bytes)
    if rows < min(LEAST_ROWS, tokens):
        heads = min(heads, max(1, (workspace // LEAST_ROWS - row_bytes) // per_head))
        rows = workspace // (heads * per_head + row_bytes)
    return max(1, min(MOST_ROWS, rows)), heads


def visible(attention: Attention, block: Block) -> Tensor:
    """bool [n, last - first]: causal and inside the window."""
    distance = _distance(block)
    seen = distance >= 0
    if attention.window is not None:
        seen &= distance < attention.window
    return seen


def _distance(block: Block) -> Tensor:
    return block.rows[:, None] - torch.arange(block.first, block.last, device=block.rows.device)


def against(vectors: Tensor, keys: Tensor, first_head: int, group: int) -> Tensor:
    """<vectors[h, i], keys[head's key/value head, j]>: [h, n, E] with [H_kv, J, E] to [h, n, J]."""
    heads, n, width = vectors.shape
    out = vectors.new_empty(heads, n, keys.shape[1])
    for kv in range(first_head // group, (first_head + heads - 1) // group + 1):
        a = max(kv * group - first_head, 0)
        b = min((kv + 1) * group - first_head, heads)
        torch.mm(
            vectors[a:b].reshape(-1, width),
            keys[kv].to(vectors.dtype).T,
            out=out[a:b].view(-1, keys.shape[1]),
        )
    return out


def weights(attention: Attention, block: Block, first_head: int, last_head: int) -> Tensor:
    """A [h, n, J] of a block: softmax(softcap(scale * q.k) + mask + alibi), 0 where not visible.

    A row with nothing to attend to is all 0, not NaN.
    """
    a = attention
    q = a.q[first_head:last_head, block.rows].to(compute_dtype(a.q.dtype)) * a.scale
    logits = against(q, a.k[:, block.first : block.last], first_head, a.group)
    if a.softcap is not None:
        logits.div_(a.softcap).tanh_().mul_(a.softcap)
    if a.mask is not None:
        of_heads = slice(None) if a.mask.shape[0] == 1 else slice(first_head, last_head)
        mask = a.mask[of_heads, block.rows, block.first : block.last]
        if mask.dtype == torch.bool:
            logits.masked_fill_(~mask, -torch.inf)
        else:
            logits.add_(mask)
    if a.alibi is not None:
        slope = a.alibi[first_head:last_head, None, None].to(logits.dtype)
        logits.sub_(slope * _distance(block))
    logits.masked_fill_(~visible(a, block), -torch.inf)

    if a.lse is not None:
        lse = a.lse[first_head:last_head, block.rows, None].to(logits.dtype)
        # A row without any source has lse = -inf, and -inf - (-inf) would be NaN: +inf gives exp(-inf) = 0.
        return logits.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)).exp_()
    top = logits.amax(-1, keepdim=True)
    sink = None if a.sinks is None else a.sinks[first_head:last_head, None, None].to(logits.dtype)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -torch.inf, 0)  # likewise
    weight = logits.sub_(top).exp_()
    total = weight.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - top).exp()
    return weight.div_(total.masked_fill(total == 0, 1))


def project(attention: Attention, direction: Tensor, block: Block, first_head: int, last_head: int) -> Tensor:
    """row_scale[i] * gate[i, h] * (W_O[h] @ direction[i]): [n, D] to [h, n, E_v], dtype of `direction`."""
    a = attention
    w_o = a.w_o[first_head:last_head].to(direction.dtype)
    heads, width, _ = w_o.shape
    out = (direction @ w_o.reshape(heads * width, -1).T).view(-1, heads, width).transpose(0, 1)
    if a.gate is not None:
        out = out * a.gate[block.rows, first_head:last_head].to(out.dtype).transpose(0, 1)
    if a.row_scale is not None:
        out = out * a.row_scale[block.rows, None].to(out.dtype)
    return out


@torch.no_grad()
def directional_attention(
    attention: Attention, direction: Tensor, reduce: Reduce = None, workspace: int = WORKSPACE
) -> Tensor:
    """What every (head, source) pair wrote along a direction of its destination.

    direction [T, D] to [H, T, T] indexed [h, i, j]; `reduce="heads"` sums over heads to [T, T],
    `reduce="sources"` over sources to [H, T]. 0 where j is not visible from i. float32, float64 for float64.
    """
    tokens, heads = attention.q.shape[1], attention.heads
    dtype = compute_dtype(attention.q.dtype)
    shape = {None: (heads, tokens, tokens), "heads": (tokens, tokens), "sources": (heads, tokens)}[reduce]
    out = torch.zeros(shape, dtype=dtype, device=direction.device)
    everything = torch.arange(tokens, device=direction.device)
    row_bytes = 2 * direction.shape[1] * dtype.itemsize
    with ieee_matmul():
        for block in blocks(
            attention, everything, workspace=workspace, pair_bytes=3 * dtype.itemsize + 8, row_bytes=row_bytes
        ):
            unseen = ~visible(attention, block)
            some = direction[block.rows].to(dtype)
            j = slice(block.first, block.last)
            for a, b in block.heads:
                vectors = project(attention, some, block, a, b)
                value = against(vectors, attention.v[:, j], a, attention.group)
                value.mul_(weights(attention, block, a, b)).masked_fill_(unseen, 0)
                if reduce is None:
                    out[a:b, block.rows, j] = value
                elif reduce == "heads":
                    out[block.rows, j] += value.sum(0)
                else:
                    out[a:b, block.rows] = value.sum(-1)
    return out


@torch.no_grad()
def attention_pattern(
    attention: Attention, head: int | None = None, destinations: Sequence[int] | None = None
) -> Tensor:
    """A, [H, n, T], or [n, T] for one head; n destinations (default: all). float32, float64 for float64."""
    tokens = attention.q.shape[1]
    device = attention.q.device
    rows = torch.arange(tokens, device=device) if destinations is None else _as_rows(destinations, device)
    a, b = (0, attention.heads) if head is None else (head, head + 1)
    out = torch.zeros(b - a, len(rows), tokens, dtype=compute_dtype(attention.q.dtype), device=device)
    with ieee_matmul():
        done = 0
        for block in blocks(attention, rows):
            n = len(block.rows)
            out[:, done : done + n, block.first : block.last] = weights(attention, block, a, b)
            done += n
    return out if head is None else out[0]


def _as_rows(destinations: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(destinations), dtype=torch.int64, device=device)
