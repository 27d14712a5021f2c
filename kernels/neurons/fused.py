"""Contributions of every neuron on a GPU: one fused product screens, few neurons are evaluated exactly.

1. `_screen`    tiles of sign(whole) @ W_down^T; the epilogue multiplies by act and adds the rounding margin.
                Kept: g and its bound ([R, F], for as many rows as the workspace has room for), and of each
                row's tile the sums of g, |g|, first-order values and what is skipped, and a count.
2. evaluation   of the neurons whose bound exceeds the screen, as a list sorted by neuron.
3. top k        of the exact values, evaluating the others by falling bound until nothing can change.

The list's evaluation is the attention's (kernels/proximity/fused.py): W_down's rows take the place of u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtt.kernels.measures import measure
from lmtt.kernels.numerics import certificate, divide, sign, tensor_core_margin
from lmtt.kernels.proximity.fused import evaluate_list
from lmtt.kernels.topk import stable_topk
from lmtt.kernels.triton_bricks import VARIES, positive
from lmtt.kernels.triton_host import chip, chunks, interpreted, pieces
from lmtt.kernels.types import NeuronResult, NeuronTask

# Exact L1 proximities [N] of listed pairs, sorted by neuron, from (w_down, whole [R, D], neuron, row,
# coefficient, g): int32 indices, coefficient and first-order value g in float32.
Evaluator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@triton.jit(do_not_specialize=VARIES)
def _screen(
    signs, w_down, act, row_scale, norms, threshold, bound, values, stats, count, neurons, width, margin,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """values[r, n] = g = act * <signs[r], w_down[n]>, bound = g + slack; stats [5, R] per block of neurons.

    stats: signed, absolute, first-order values of those not above the threshold, what these may be wrong by,
    number of positive bounds.
    """
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    real = r < count
    exists = n < neurons
    total = tl.zeros([BM, BN], tl.float32)
    from_r = r.to(tl.int64) * width
    from_n = n.to(tl.int64) * width
    for first in range(0, width, BD):
        d = first + tl.arange(0, BD)
        inside = d < width
        x = tl.load(signs + from_r[:, None] + d[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        y = tl.load(w_down + from_n[None, :] + d[:, None], mask=exists[None, :] & inside[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    both = real[:, None] & exists[None, :]
    at = r.to(tl.int64)[:, None] * neurons + n[None, :]
    a = tl.load(act + at, mask=both, other=0.0).to(tl.float32)
    if ROW_SCALE:
        a *= tl.load(row_scale + r, mask=real, other=0.0).to(tl.float32)[:, None]
    g = tl.where(both, total * a, 0.0)
    slack = tl.abs(a) * tl.load(norms + n, mask=exists, other=0.0)[None, :] * margin
    limit = tl.load(threshold + r, mask=real, other=float("inf"))[:, None]
    upper = g + slack
    above = upper > limit
    value = positive(g)
    tl.store(bound + at, upper, mask=both)
    tl.store(values + at, g, mask=both)
    out = stats + tl.program_id(0).to(tl.int64) * 5 * count + r
    tl.store(out, tl.sum(g, 1), mask=real)
    tl.store(out + count, tl.sum(tl.abs(g), 1), mask=real)
    tl.store(out + 2 * count, tl.sum(tl.where(above, 0.0, value), 1), mask=real)
    doubtful = (upper > 0) & (upper <= limit)
    tl.store(out + 3 * count, tl.sum(tl.where(doubtful, value + slack, 0.0), 1), mask=real)
    tl.store(out + 4 * count, tl.sum((upper > 0).to(tl.float32), 1), mask=real)


class _Tile(NamedTuple):
    BM: int
    BN: int
    BD: int
    warps: int
    stages: int


def tile(dtype: torch.dtype, chip: int, wide: bool = False) -> _Tile:
    """Tile of a product with an epilogue; `wide` where that needs few registers. See `triton_host.tile`."""
    if interpreted():
        return _Tile(16, 32, 32, 4, 1)
    if dtype == torch.float32:
        return _Tile(64, 64, 16, 4, 2)
    return _Tile(128, 128 if wide else 64, 64, 8, 3)


@torch.no_grad()
def neuron_contributions(task: NeuronTask, *, evaluate: Evaluator = evaluate_list) -> NeuronResult:
    """The k largest shares of each row and those of the other parts; see NeuronTask and NeuronResult."""
    (tokens, neurons), device = task.act.shape, task.whole.device
    index = torch.zeros(tokens, task.k, dtype=torch.int64, device=device)
    value = torch.zeros(tokens, task.k, device=device)
    parts = torch.zeros(tokens, 2 + len(task.others), device=device)
    normaliser, certified, checksum = torch.zeros(3, tokens, device=device)
    counts = {"evaluated": 0, "positive": 0}
    w_down = task.w_down.contiguous()
    norms = torch.cat([w_down[f].float().abs().sum(-1) for f in pieces(neurons, 4096)])
    # Per neuron: bound, exact value and a mask, two copies that the search of the top k makes, the list.
    row_bytes = neurons * (4 * 4 + 2) + int(neurons * 48 * (0.5 if task.screen == 0 else 0.05))
    step = max(
        tile(w_down.dtype, chip(task.act)).BM,
        task.workspace // 2 // (row_bytes + 10 * task.whole.shape[1] * 4),
    )

    def work(rows: Tensor) -> None:
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        whole = task.whole[here].contiguous()
        others, signed, absolute = _others(task, here)
        mass = whole.abs().sum(-1, dtype=torch.float64)
        act = task.act[here].contiguous()
        row_scale = None if task.row_scale is None else task.row_scale[here].contiguous()
        threshold = (task.screen * mass).float()
        bound, g, stats = _run_screen(act, w_down, whole, row_scale, norms, threshold)
        scored = _Scored(task, whole, act, row_scale, bound, g, evaluate)
        scored.make_exact(bound > threshold[:, None])
        exact = torch.where(bound > threshold[:, None], scored.values, 0).sum(-1, dtype=torch.float64)
        before = scored.evaluated
        best_value, best_index = scored.top_k(task.k)
        # What the search made exact beyond the screen replaces its first-order value in the row's sum.
        more, less, settled = scored.corrections(norms, threshold) if scored.evaluated > before else (0, 0, 0)
        total = others.sum(-1) + stats[2] + exact + more - less
        index[here] = best_index
        value[here] = divide(best_value.double(), total[:, None]).float()
        parts[here] = divide(others, total[:, None]).float()
        normaliser[here] = total.float()
        certified[here] = certificate((stats[3] - settled).clamp_(min=0), total).float()
        defect = (signed + stats[0] - mass).abs()
        checksum[here] = divide(defect, absolute + stats[1]).float()
        counts["evaluated"] += scored.evaluated
        counts["positive"] += int(stats[4].sum())

    chunks(torch.arange(tokens, device=device), step, work)
    return NeuronResult(
        index=index,
        value=value,
        residual=parts[:, 0],
        bias=parts[:, 1],
        others=parts[:, 2:],
        normaliser=normaliser,
        certificate=certified,
        checksum=checksum,
        evaluated=counts["evaluated"],
        positive=counts["positive"],
    )


def _others(task: NeuronTask, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Proximities [R, 2 + others] of base, bias and others, their sums of g and of |g| [R]; float64."""
    whole = task.whole[rows].float()
    of = measure("l1")
    prepared, signs = of.prepare(whole), sign(whole)
    nothing = torch.zeros(len(whole), dtype=torch.float64, device=whole.device)
    proximities, signed, absolute = [], nothing.clone(), nothing.clone()
    for part in (task.base, task.bias, *task.others):
        if part is None:
            proximities.append(nothing)
            continue
        vector = (part.expand_as(whole) if part.dim() == 1 else part[rows]).float()
        proximities.append(of.proximity(vector, *prepared).double())
        g = (vector * signs).sum(-1, dtype=torch.float64)
        signed += g
        absolute += g.abs()
    return torch.stack(proximities, -1), signed, absolute


def _run_screen(
    act: Tensor, w_down: Tensor, whole: Tensor, row_scale: Tensor | None, norms: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds and g, float32 [R, F] each, and the rows' sums float64 [5, R]."""
    (count, neurons), width = act.shape, whole.shape[1]
    size = tile(w_down.dtype, chip(act))
    blocks = triton.cdiv(neurons, size.BN)
    bound, g = torch.empty(2, count, neurons, device=act.device)
    stats = torch.empty(blocks, 5, count, device=act.device)
    _screen[(blocks, triton.cdiv(count, size.BM))](
        signs=sign(whole).to(w_down.dtype), w_down=w_down, act=act,
        row_scale=act if row_scale is None else row_scale, norms=norms, threshold=threshold, bound=bound,
        values=g, stats=stats, count=count, neurons=neurons, width=width, margin=_margin(width),
        BM=size.BM, BN=size.BN, BD=size.BD, ROW_SCALE=row_scale is not None,
        num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return bound, g, stats.sum(0, dtype=torch.float64)


def _margin(width: int) -> float:
    return tensor_core_margin(width, split=False)


class _Scored:
    """Neurons of some rows: bounds of all, exact values of those evaluated so far."""

    def __init__(
        self,
        task: NeuronTask,
        whole: Tensor,
        act: Tensor,
        row_scale: Tensor | None,
        bound: Tensor,
        g: Tensor,
        evaluate: Evaluator,
    ) -> None:
        self.w_down, self.whole, self.act, self.row_scale = task.w_down.contiguous(), whole, act, row_scale
        self.workspace, self.evaluate = task.workspace, evaluate
        self.bound = bound
        self.exact = bound <= 0  # proven to be 0
        self.values = g  # of those not exact; `top_k` never looks at them
        self.values.masked_fill_(self.exact, 0)
        self.evaluated = 0

    def coefficient(self, r: Tensor, n: Tensor) -> Tensor:
        c = self.act[r, n].float()
        return c if self.row_scale is None else c * self.row_scale[r].float()

    def make_exact(self, which: Tensor) -> None:
        """Evaluate the neurons `which` (bool [R, F])."""
        n, r = which.T.nonzero(as_tuple=True)  # by neuron: its row of W_down is then read once
        for some in pieces(len(r), max(1, self.workspace // 4 // 48)):
            rows, neurons = r[some], n[some]
            self.values[rows, neurons] = self.evaluate(
                self.w_down,
                self.whole,
                neurons.int(),
                rows.int(),
                self.coefficient(rows, neurons),
                self.values[rows, neurons],
            )
        self.exact |= which
        self.evaluated += len(r)

    def top_k(self, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices [R, k]; bounds equal to the k-th best are evaluated: the lower index wins."""
        batch = k
        while True:
            known = self.values.masked_fill(~self.exact, -torch.inf)
            last = known.topk(k).values[:, -1:]
            candidates = self.bound.masked_fill(self.exact, -torch.inf).topk(min(batch, known.shape[1]))
            needed = (candidates.values >= last) & (candidates.values > -torch.inf)
            if not bool(needed.any()):
                return stable_topk(known, k)
            which = torch.zeros_like(self.exact)
            r, c = needed.nonzero(as_tuple=True)
            which[r, candidates.indices[r, c]] = True
            self.make_exact(which)
            batch *= 2

    def corrections(self, norms: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of neurons evaluated although below the screen: sums of exact, first-order and doubtful values."""
        r, n = (self.exact & (self.bound > 0) & (self.bound <= threshold[:, None])).nonzero(as_tuple=True)
        slack = self.coefficient(r, n).abs() * norms[n] * _margin(self.whole.shape[1])
        first_order = (self.bound[r, n] - slack).clamp_(min=0)

        def rowwise(x: Tensor) -> Tensor:
            out = torch.zeros(len(self.bound), dtype=torch.float64, device=x.device)
            ends = torch.bincount(r, minlength=len(out)).cumsum(0)
            sums = torch.cat([out[:1], x.double().cumsum(0)])
            return sums[ends] - sums[torch.cat([ends[:1] * 0, ends[:-1]])]

        return rowwise(self.values[r, n]), rowwise(first_order), rowwise(first_order + slack)
