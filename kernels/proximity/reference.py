"""Contributions of every (head, source) pair to each destination's whole, in plain torch; see README.md.

For each block of destinations (nothing larger than the task's workspace is held):

1. `_screen` forms g = <part, sign(whole)> for all pairs: a bound on the proximity, up to a rounding margin.
2. Pairs whose bound exceeds the screen are evaluated exactly in D dimensions, head by head (`_evaluate`); the
   others keep g. For L2 every pair is exact by a Gram matrix instead (`_score_l2`).
3. The other parts are few and always exact. All proximities of a row, added in float64, are its normaliser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lmtt.kernels.budget import EVALUATION_BYTES
from lmtt.kernels.directional_attention.reference import (
    Block,
    against,
    attention_pattern,
    blocks,
    project,
    visible,
    weights,
)
from lmtt.kernels.measures import measure
from lmtt.kernels.numerics import (
    L2_NEARLY_EQUAL,
    certificate,
    compute_dtype,
    divide,
    ieee_matmul,
    screening_margin,
    sign,
)
from lmtt.kernels.types import AttentionResult, AttentionTask, Pairs

__all__ = ["PairShares", "attention_contributions", "attention_pattern", "evaluated_pairs", "pair_shares"]


class PairShares(NamedTuple):
    """Exact shares of some rows: shares.sum((1, 2)) + residual + bias + others.sum(-1) is 1, or all are 0."""

    shares: Tensor  # [n, H, T]
    residual: Tensor  # [n]
    bias: Tensor  # [n]
    others: Tensor  # [n, number of others]
    normaliser: Tensor  # [n]


@dataclass
class _Scored:
    """Some heads of one block."""

    values: Tensor  # [h, n, J], proximities, exact or first-order
    evaluated: Tensor | None  # bool [h, n, J], the pairs evaluated one by one; None: no pair needed that
    skipped: Tensor  # float64 [n], what first-order values may be wrong by
    signed: Tensor  # float64 [n], sum of g
    absolute: Tensor  # float64 [n], sum of |g|
    evaluated_count: int
    positive_count: int


class _Rows(NamedTuple):
    """One block's wholes and the parts that are no pairs."""

    whole: Tensor  # [n, D], compute dtype
    prepared: tuple[Tensor, ...]  # what the measure needs of them
    signs: Tensor  # [n, D]
    mass: Tensor  # float64 [n], |whole|_1
    parts: Tensor  # float64 [n, 2 + others], proximity of residual, bias, others
    signed: Tensor  # float64 [n], sum of <part, sign(whole)> over those
    absolute: Tensor  # float64 [n]


@torch.no_grad()
def attention_contributions(task: AttentionTask) -> AttentionResult:
    """All shares of all rows; see AttentionTask and AttentionResult for shapes and meaning."""
    tokens, dtype, device = task.whole.shape[0], compute_dtype(task.whole.dtype), task.whole.device
    heads = task.attention.heads
    edges = torch.zeros(tokens, tokens, dtype=dtype, device=device)
    per_head = torch.zeros(tokens, heads, dtype=dtype, device=device)
    parts = torch.zeros(tokens, 2 + len(task.others), dtype=dtype, device=device)
    normaliser, certified, checksum = torch.zeros(3, tokens, dtype=dtype, device=device)
    kept: list[Pairs] = []
    evaluated = positive = 0

    def fill(task: AttentionTask, destinations: Tensor) -> None:
        nonlocal evaluated, positive
        for block in _blocks(task, destinations):
            rows = _other_parts(task, block.rows)
            n, sources = len(block.rows), block.last - block.first
            block_edges = torch.zeros(n, sources, dtype=torch.float64, device=device)
            block_heads = torch.zeros(n, heads, dtype=torch.float64, device=device)
            skipped, signed, absolute = torch.zeros(3, n, dtype=torch.float64, device=device)
            candidates: list[Pairs] = []
            for a, b in block.heads:
                scored = _score(task, block, rows, a, b)
                block_edges += scored.values.sum(0, dtype=torch.float64)
                block_heads[:, a:b] = scored.values.sum(-1, dtype=torch.float64).T
                skipped += scored.skipped
                signed += scored.signed
                absolute += scored.absolute
                evaluated += scored.evaluated_count
                positive += scored.positive_count
                if task.keep is not None:
                    # The normaliser only grows from here, so that nothing that will be kept is missed.
                    so_far = rows.parts.sum(-1) + block_edges.sum(-1)
                    candidates.append(_above(scored.values, task.keep * so_far.to(dtype), block, a))
            total = rows.parts.sum(-1) + block_edges.sum(-1)
            shares = divide(block_edges, total[:, None]).to(dtype)
            edges[block.rows, block.first : block.last] = shares
            per_head[block.rows] = divide(block_heads, total[:, None]).to(dtype)
            parts[block.rows] = divide(rows.parts, total[:, None]).to(dtype)
            normaliser[block.rows] = total.to(dtype)
            certified[block.rows] = certificate(skipped, total).to(dtype)
            defect = (signed + rows.signed - rows.mass).abs()
            checksum[block.rows] = divide(defect, absolute + rows.absolute).to(dtype)
            if task.keep is not None:
                kept.append(_keep(candidates, shares, total, block, task.keep))

    with ieee_matmul():
        fill(task, torch.arange(tokens, device=device))
        doubtful = torch.nonzero((certified > task.max_certificate) & (task.screen > 0)).flatten()
        if len(doubtful):
            kept = [Pairs(*(x[~torch.isin(p.destination, doubtful)] for x in p)) for p in kept]
            before = positive
            fill(replace(task, screen=0.0), doubtful)
            positive = before
    return AttentionResult(
        edges=edges,
        per_head=per_head,
        residual=parts[:, 0],
        bias=parts[:, 1],
        others=parts[:, 2:],
        normaliser=normaliser,
        certificate=certified,
        checksum=checksum,
        kept=None if task.keep is None else _join(kept, tokens, heads, dtype, device),
        evaluated=evaluated,
        positive=positive,
        reevaluated=len(doubtful),
    )


@torch.no_grad()
def pair_shares(task: AttentionTask, destinations: Sequence[int]) -> PairShares:
    """Exact shares of every pair at some destinations, whatever the task's screen: details on demand.

    Holds the result, [n, H, T], and a workspace. float32, float64 for float64.
    """
    task = replace(task, screen=0.0)
    dtype, device = compute_dtype(task.whole.dtype), task.whole.device
    rows = torch.tensor(list(destinations), dtype=torch.int64, device=device)
    n, tokens, heads = len(rows), task.whole.shape[0], task.attention.heads
    shares = torch.zeros(n, heads, tokens, dtype=dtype, device=device)
    parts = torch.zeros(n, 2 + len(task.others), dtype=torch.float64, device=device)
    done = 0
    with ieee_matmul():
        for block in _blocks(task, rows):
            here = slice(done, done + len(block.rows))
            others = _other_parts(task, block.rows)
            parts[here] = others.parts
            for a, b in block.heads:
                values = _score(task, block, others, a, b).values
                shares[here, a:b, block.first : block.last] = values.transpose(0, 1)
            done = here.stop
    normaliser = parts.sum(-1) + shares.sum((1, 2), dtype=torch.float64)
    shares.copy_(divide(shares, normaliser[:, None, None].to(dtype)))
    parts = divide(parts, normaliser[:, None]).to(dtype)
    return PairShares(shares, parts[:, 0], parts[:, 1], parts[:, 2:], normaliser.to(dtype))


@torch.no_grad()
def evaluated_pairs(task: AttentionTask, normaliser: Tensor) -> Pairs:
    """The pairs that the task's screen lets through, with their exact shares of `normaliser` [T].

    Empty for L2, whose pairs are all exact without being evaluated one by one.
    """
    device, dtype = task.whole.device, compute_dtype(task.whole.dtype)
    tokens, heads = task.whole.shape[0], task.attention.heads
    found: list[Pairs] = []
    if task.measure == "l1":
        with ieee_matmul():
            for block in _blocks(task, torch.arange(tokens, device=device)):
                rows = _other_parts(task, block.rows)
                for a, b in block.heads:
                    scored = _score(task, block, rows, a, b)
                    assert scored.evaluated is not None, "L1 always screens"
                    h, r, c = scored.evaluated.nonzero(as_tuple=True)
                    share = divide(scored.values[h, r, c], normaliser[block.rows][r].to(dtype))
                    found.append(Pairs(block.rows[r], c + block.first, h + a, share))
    return _join(found, tokens, heads, dtype, device)


def _blocks(task: AttentionTask, destinations: Tensor) -> Iterator[Block]:
    """Blocks whose screening takes half of the workspace; exact evaluation has the other half."""
    item = compute_dtype(task.whole.dtype).itemsize
    # Per pair: A, g, bound, value, a temporary of the same size, a float64 sum's operand and two masks;
    # for L2 the same in float64 beside A and g.
    pair_bytes = 5 * item + 8 + 2 + (5 * 8 if task.measure == "l2" else 0)
    if task.attention.gate is not None:
        pair_bytes += 2 * item  # the margin has a destination
    # Per destination: its whole in several forms; its edges in float64, as shares, and one temporary; the
    # indices, coefficients and values of one head's evaluated pairs.
    tokens, d_model = task.whole.shape
    row_bytes = (8 + len(task.others)) * d_model * item + tokens * ((8 + 8 + item) + (4 * 8 + 3 * item))
    return blocks(
        task.attention,
        destinations,
        workspace=task.workspace // 2,
        pair_bytes=pair_bytes,
        row_bytes=row_bytes,
    )


def _other_parts(task: AttentionTask, rows: Tensor) -> _Rows:
    dtype = compute_dtype(task.whole.dtype)
    whole = task.whole[rows].to(dtype)
    signs = sign(whole)
    of = measure(task.measure)
    prepared = of.prepare(whole)
    proximities, signed, absolute = [], [], []
    for part in (task.resid_pre, task.bias, *task.others):
        if part is None:
            proximities.append(torch.zeros(len(rows), dtype=torch.float64, device=whole.device))
            continue
        vector = (part.expand_as(whole) if part.dim() == 1 else part[rows]).to(dtype)
        proximities.append(of.proximity(vector, *prepared).double())
        g = (vector * signs).sum(-1, dtype=torch.float64)
        signed.append(g)
        absolute.append(g.abs())
    return _Rows(
        whole=whole,
        prepared=prepared,
        signs=signs,
        mass=whole.abs().sum(-1, dtype=torch.float64),
        parts=torch.stack(proximities, -1),
        signed=torch.stack(signed).sum(0),
        absolute=torch.stack(absolute).sum(0),
    )


def _score(task: AttentionTask, block: Block, rows: _Rows, a: int, b: int) -> _Scored:
    """Proximities of the pairs of heads a..b-1 of one block."""
    attention = task.attention
    unseen = ~visible(attention, block)
    pattern = weights(attention, block, a, b)
    v = attention.v[:, block.first : block.last]
    g = against(project(attention, rows.signs, block, a, b), v, a, attention.group)
    g.mul_(pattern).masked_fill_(unseen, 0)
    scored = _Scored(
        values=g,
        evaluated=None,
        skipped=torch.zeros_like(rows.mass),
        signed=g.sum(-1).double().sum(0),
        absolute=g.abs().sum(-1).double().sum(0),
        evaluated_count=0,
        positive_count=0,
    )
    if task.measure == "l1":
        _score_l1(task, block, rows, a, pattern, unseen, scored)
    else:
        _score_l2(task, block, rows, a, b, pattern, unseen, scored)
    return scored


def _score_l1(
    task: AttentionTask, block: Block, rows: _Rows, a: int, pattern: Tensor, unseen: Tensor, scored: _Scored
) -> None:
    """Replace g by max(0, g), and by the exact proximity where the bound exceeds the screen."""
    g = scored.values
    slack = _margin(task, block, a, pattern).masked_fill_(unseen, 0)
    bound = g + slack
    above = bound > (task.screen * rows.mass).to(g.dtype)[:, None]
    scored.evaluated = above
    scored.evaluated_count = scored.positive_count = int(above.sum())
    g.clamp_(min=0)
    if task.screen > 0:
        # A skipped pair with a positive bound: reported max(0, g), truly anything in [0, max(0, g) + slack].
        skipped = (bound > 0) & ~above
        scored.positive_count += int(skipped.sum())
        scored.skipped = g.add(slack).mul_(skipped).sum(-1).double().sum(0)
    _evaluate(task, block, rows, a, pattern, above, scored.values)


def _margin(task: AttentionTask, block: Block, a: int, pattern: Tensor) -> Tensor:
    """What rounding may have taken from each g, [h, n, J].

    A * |row_scale| * margin * sum_e |v_e gate_e| |W_O[h, e, :]|_1.
    """
    attention, dtype = task.attention, pattern.dtype
    heads = pattern.shape[0]
    width, d_model = attention.w_o.shape[1:]
    factor = screening_margin(width + d_model, dtype)
    row_norms = torch.stack([attention.w_o[h].to(dtype).abs().sum(-1) for h in range(a, a + heads)])
    shared = _key_value_heads(task, a, a + heads)
    absolute = attention.v[shared, block.first : block.last].to(dtype).abs()
    row_norms = row_norms[:, None, :] * factor
    if attention.gate is not None:
        row_norms = row_norms * attention.gate[block.rows, a : a + heads].to(dtype).abs().transpose(0, 1)
    per_source = against(row_norms, absolute, a - shared.start * attention.group, attention.group)
    slack = pattern * per_source
    if attention.row_scale is not None:
        slack.mul_(attention.row_scale[block.rows, None].to(dtype).abs())
    return slack


def _evaluate(
    task: AttentionTask, block: Block, rows: _Rows, a: int, pattern: Tensor, which: Tensor, values: Tensor
) -> None:
    """Write the exact proximity of the pairs `which` (bool [h, n, J]) into `values`."""
    attention, dtype = task.attention, pattern.dtype
    of = measure(task.measure)
    d_model = attention.w_o.shape[2]
    vector_bytes = d_model * dtype.itemsize
    table_rows = max(1, task.workspace // 4 // vector_bytes)
    batch = max(1, min(EVALUATION_BYTES, task.workspace // 32) // vector_bytes)
    scale = None if attention.row_scale is None else attention.row_scale[block.rows].to(dtype)
    for h in range(pattern.shape[0]):
        needed = which[h].any(0).nonzero()[:, 0]
        if len(needed) == 0:
            continue
        w_o = attention.w_o[a + h].to(dtype)
        v = attention.v[(a + h) // attention.group, block.first : block.last]
        for some in torch.split(needed, table_rows):
            some_v = v[some].to(dtype)
            r, c = which[h][:, some].nonzero(as_tuple=True)
            coefficient = pattern[h, r, some[c]]
            if scale is not None:
                coefficient = coefficient * scale[r]
            vectors = _written(attention.gate, a + h, block, some_v, w_o, r, c)
            out = torch.empty_like(coefficient)
            for start in range(0, len(r), batch):
                here = slice(start, start + batch)
                x = vectors(here).mul_(coefficient[here, None])
                out[here] = of.proximity(x, *(p.index_select(0, r[here]) for p in rows.prepared))
            values[h, r, some[c]] = out


def _written(
    gate: Tensor | None, head: int, block: Block, v: Tensor, w_o: Tensor, r: Tensor, c: Tensor
) -> Callable[[slice], Tensor]:
    """A function from a slice of the pairs (r, c) to their u = (v[j] * gate[i, h]) @ W_O[h]."""
    if gate is None:
        u = v @ w_o  # the same for every destination
        return lambda here: u.index_select(0, c[here])
    gates = gate[block.rows, head].to(v.dtype)
    return lambda here: (v.index_select(0, c[here]) * gates.index_select(0, r[here])) @ w_o


def _score_l2(
    task: AttentionTask,
    block: Block,
    rows: _Rows,
    a: int,
    b: int,
    pattern: Tensor,
    unseen: Tensor,
    scored: _Scored,
) -> None:
    """Replace g by the exact L2 proximity: (2d - q) / (|y| + sqrt(|y|^2 - 2d + q)), d = <x, y>, q = |x|^2.

    Everything is in units of the row's largest coordinate and in float64, whose range holds every square of a
    float32 ratio; for float64 inputs the clamp keeps overflow from turning into inf - inf.
    """
    attention = task.attention
    unit = rows.whole.double().abs().amax(-1)
    unit = unit.masked_fill(unit == 0, 1)
    y = rows.whole.double() / unit[:, None]
    y_norm = torch.linalg.vector_norm(y, dim=-1)[:, None]
    most = torch.finfo(torch.float64).max / 8
    shared = _key_value_heads(task, a, b)
    v = attention.v[shared, block.first : block.last].double()
    coefficient = pattern.double() / unit[:, None]
    towards = project(attention, y, block, a, b)
    d = against(towards, v, a - shared.start * attention.group, attention.group).mul_(coefficient)
    if attention.row_scale is not None:
        coefficient.mul_(attention.row_scale[block.rows, None].double())
    q = (_squared_norms(task, block, a, b) * coefficient).mul_(coefficient).clamp_(max=most)
    numerator = d.clamp_(-most, most).mul_(2).sub_(q).masked_fill_(unseen, 0)
    radicand = y_norm * y_norm - numerator
    denominator = y_norm + radicand.clamp(min=0).sqrt_()
    values = divide(numerator.clamp(min=0), denominator).mul_(unit[:, None])
    scored.values = values.to(pattern.dtype)
    scored.evaluated_count = scored.positive_count = int((numerator > 0).sum())
    nearly_equal = (numerator > 0) & (radicand < L2_NEARLY_EQUAL * y_norm * y_norm)
    if bool(nearly_equal.any()):
        _evaluate(task, block, rows, a, pattern, nearly_equal, scored.values)


def _key_value_heads(task: AttentionTask, a: int, b: int) -> slice:
    """The key/value heads that heads a..b-1 read."""
    group = task.attention.group
    return slice(a // group, (b - 1) // group + 1)


def _squared_norms(task: AttentionTask, block: Block, a: int, b: int) -> Tensor:
    """|(v[j] * gate[i, h]) @ W_O[h]|^2 in float64, [h, 1, J], or [h, n, J] with a gate."""
    attention = task.attention
    out = []
    for h in range(a, b):
        w_o = attention.w_o[h].double()
        gram = w_o @ w_o.T
        v = attention.v[h // attention.group, block.first : block.last].double()
        gates = [None] if attention.gate is None else attention.gate[block.rows, h].double()
        gated = [v if gate is None else v * gate for gate in gates]
        # A Gram form is never negative but for rounding.
        out.append(torch.stack([((x @ gram) * x).sum(-1).clamp_(min=0) for x in gated]))
    return torch.stack(out)


def _above(values: Tensor, threshold: Tensor, block: Block, a: int) -> Pairs:
    """Pairs of one block whose proximity exceeds its row's threshold [n]; value = proximity."""
    h, r, c = (values > threshold[:, None]).nonzero(as_tuple=True)
    return Pairs(r, c, h + a, values[h, r, c])


def _keep(candidates: list[Pairs], shares: Tensor, total: Tensor, block: Block, keep: float) -> Pairs:
    """Of the candidates (block coordinates) those with share > keep on edges with share > keep."""
    r, c, h, value = (torch.cat(columns) for columns in zip(*candidates, strict=True))
    share = divide(value.double(), total[r]).to(shares.dtype)
    threshold = torch.tensor(keep, dtype=shares.dtype, device=shares.device)
    kept = (share > threshold) & (shares[r, c] > threshold)
    return Pairs(block.rows[r[kept]], c[kept] + block.first, h[kept], share[kept])


def _join(found: list[Pairs], tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> Pairs:
    """One Pairs of several, sorted by (destination, source, head)."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    columns = zip(Pairs(none, none, none, none.to(dtype)), *found, strict=True)
    destination, source, head, value = (torch.cat(column) for column in columns)
    order = ((destination * tokens + source) * heads + head).argsort()
    return Pairs(destination[order], source[order], head[order], value[order])
