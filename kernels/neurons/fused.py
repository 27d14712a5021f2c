"""Contributions of every neuron on a GPU: one fused product screens, few neurons are evaluated exactly.

1. `_screen`    tiles of sign(whole) @ W_down^T; the epilogue multiplies by act and adds the rounding margin.
                Kept: g ([R, F], for as many rows as the workspace has room for), a bit for each neuron whose
                bound exceeds the screen, and of each row's tile the sums of g, |g|, first-order values and
                what is skipped, and a count.
2. evaluation   of the neurons with a bit, as a list sorted by neuron; exact values replace their g.
3. `_best`      of each row the sum of its exact values and the k largest, in one pass on the chip. They are
                the row's k largest where the last of them exceeds the screen: nothing else does.
4. `_Scored`    the other rows: neurons by falling bound until nothing can change.

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
from lmtt.kernels.proximity.fused import LISTED_BYTES, Lister, evaluate_list, list_pairs
from lmtt.kernels.proximity.screen import turn_bits
from lmtt.kernels.topk import stable_topk
from lmtt.kernels.triton_bricks import VARIES, pack, positive
from lmtt.kernels.triton_host import chip, chunks, interpreted, pieces
from lmtt.kernels.types import NeuronResult, NeuronTask

# Exact L1 proximities [N] of listed pairs, sorted by neuron, from (w_down, whole [R, D], neuron, row,
# coefficient, g): int32 indices, coefficient and first-order value g in float32.
Evaluator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@triton.jit(do_not_specialize=VARIES)
def _screen(
    signs, w_down, act, row_scale, norms, threshold, bits, values, stats, count, neurons, width, margin,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """values[r, n] = g = act * <signs[r], w_down[n]>, bits [R, F / 32] of g + slack > threshold.

    stats [5, R] per block of neurons: signed, absolute, first-order values of those not above the threshold,
    what these may be wrong by, number of positive bounds.
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
    tl.store(values + at, g, mask=both)
    words = (neurons + 31) // 32
    word = tl.program_id(0) * (BN // 32) + tl.arange(0, BN // 32)
    at = r.to(tl.int64)[:, None] * words + word[None, :]
    tl.store(bits + at, pack(above & both, BM, BN), mask=real[:, None] & (word < words)[None, :])
    out = stats + tl.program_id(0).to(tl.int64) * 5 * count + r
    tl.store(out, tl.sum(g, 1), mask=real)
    tl.store(out + count, tl.sum(tl.abs(g), 1), mask=real)
    tl.store(out + 2 * count, tl.sum(tl.where(above, 0.0, value), 1), mask=real)
    doubtful = (upper > 0) & (upper <= limit)
    tl.store(out + 3 * count, tl.sum(tl.where(doubtful, value + slack, 0.0), 1), mask=real)
    tl.store(out + 4 * count, tl.sum((upper > 0).to(tl.float32), 1), mask=real)


LEAST = tl.constexpr(-(1 << 63))
LAST = tl.constexpr((1 << 31) - 1)
BLOCK = 1024  # neurons of a row that `_best` looks at together
SEARCHED_BYTES = 64  # of a neuron of a row that is searched: bound, value, masks, and what sorting takes
LEAST_EXACT = 1 << 10  # neurons evaluated at once, whatever the workspace: fewer leave a device idle
MOST_BEST = 128  # k up to which it does: larger ones are found by `_Scored`


@triton.jit(do_not_specialize=VARIES)
def _best(values, bits, keys, sums, neurons, BLOCK: tl.constexpr, K: tl.constexpr):
    """Of one row: the sum of `values` with a bit (float64), and the K largest of them as keys in any order.

    A key is the value's bits above LAST - n: it orders by value, and at ties by lower index. Values are not
    negative, NaN counts as the largest, and a negative key is none. One by one into K places is cheaper than
    sorting: a row that comes in no order changes its best about K log(n / K) times.
    """
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([K], LEAST, tl.int64) + tl.arange(0, K)  # no two alike
    total = tl.full([1], 0.0, tl.float64)
    for first in range(0, neurons, BLOCK):
        n = first + tl.arange(0, BLOCK)
        word = tl.load(bits + row * ((neurons + 31) // 32) + n // 32, mask=n < neurons, other=0)
        listed = ((word >> (n % 32)) & 1) != 0
        x = tl.abs(tl.load(values + row * neurons + n, mask=listed, other=0.0))
        total += tl.sum(x.to(tl.float64), 0)
        key = (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (-n + LAST).to(tl.int64)
        key = tl.where(listed, key, LEAST)
        most = tl.max(key, 0)
        least = tl.min(best, 0)
        while most > least:
            best = tl.where(best == least, most, best)
            key = tl.where(key == most, LEAST, key)
            most = tl.max(key, 0)
            least = tl.min(best, 0)
    tl.store(keys + row * K + tl.arange(0, K), best)
    tl.store(sums + row + tl.arange(0, 1), total)


class _Tile(NamedTuple):
    BM: int
    BN: int
    BD: int
    warps: int
    stages: int


def tile(dtype: torch.dtype, chip: int) -> _Tile:
    """Tile of the product with its epilogue, as `triton_host.tile`."""
    if interpreted():
        return _Tile(16, 32, 32, 4, 1)
    if dtype == torch.float32:
        return _Tile(64, 64, 16, 4, 2)
    return _Tile(128, 64, 64, 8, 3)


@torch.no_grad()
def neuron_contributions(
    task: NeuronTask, *, evaluate: Evaluator = evaluate_list, lister: Lister = list_pairs
) -> NeuronResult:
    """The k largest shares of each row and those of the other parts; see NeuronTask and NeuronResult."""
    (tokens, neurons), device = task.act.shape, task.whole.device
    index = torch.zeros(tokens, task.k, dtype=torch.int64, device=device)
    value = torch.zeros(tokens, task.k, device=device)
    parts = torch.zeros(tokens, 2 + len(task.others), device=device)
    normaliser, certified, checksum = torch.zeros(3, tokens, device=device)
    counts = {"evaluated": 0, "positive": 0}
    w_down = task.w_down.contiguous()
    norms = torch.cat([w_down[f].float().abs().sum(-1) for f in pieces(neurons, 4096)])
    # Per neuron: g, bits in two orders, and the list.
    row_bytes = neurons * 5 + int(neurons * LISTED_BYTES * (0.5 if task.screen == 0 else 0.05))
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
        values, bits, stats = _run_screen(act, w_down, whole, row_scale, norms, threshold)
        scored = _Scored(task, whole, act, row_scale, values, bits, evaluate, lister)
        best_value, best_index, exact = scored.best(task.k)
        total = others.sum(-1) + stats[2] + exact
        skipped = stats[3]
        # A neuron that is not listed has a bound of at most the threshold.
        open_rows = (~(best_value[:, -1] > threshold)).nonzero()[:, 0]
        for some in pieces(len(open_rows), max(1, task.workspace // 2 // (neurons * SEARCHED_BYTES))):
            which = open_rows[some]
            search = scored.search(which, norms)
            best_value[which], best_index[which] = search.top_k(task.k)
            # What the search made exact replaces its first-order value in the row's sum.
            more, less, settled = search.corrections(norms)
            total[which] += more - less
            skipped[which] = (skipped[which] - settled).clamp_(min=0)
            scored.evaluated += search.evaluated
        index[here] = best_index
        value[here] = divide(best_value.double(), total[:, None]).float()
        parts[here] = divide(others, total[:, None]).float()
        normaliser[here] = total.float()
        certified[here] = certificate(skipped, total).float()
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
    """g, float32 [R, F]; bits of bounds above the threshold, int32 [R, F / 32]; row sums, float64 [5, R]."""
    (count, neurons), width = act.shape, whole.shape[1]
    size = tile(w_down.dtype, chip(act))
    blocks = triton.cdiv(neurons, size.BN)
    g = torch.empty(count, neurons, device=act.device)
    bits = torch.empty(count, triton.cdiv(neurons, 32), dtype=torch.int32, device=act.device)
    stats = torch.empty(blocks, 5, count, device=act.device)
    _screen[(blocks, triton.cdiv(count, size.BM))](
        signs=sign(whole).to(w_down.dtype), w_down=w_down, act=act,
        row_scale=act if row_scale is None else row_scale, norms=norms, threshold=threshold, bits=bits,
        values=g, stats=stats, count=count, neurons=neurons, width=width, margin=_margin(width),
        BM=size.BM, BN=size.BN, BD=size.BD, ROW_SCALE=row_scale is not None,
        num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return g, bits, stats.sum(0, dtype=torch.float64)


def _margin(width: int) -> float:
    return tensor_core_margin(width, split=False)


class _Scored:
    """Neurons of some rows: exact values where listed, g elsewhere."""

    def __init__(
        self,
        task: NeuronTask,
        whole: Tensor,
        act: Tensor,
        row_scale: Tensor | None,
        values: Tensor,
        bits: Tensor,
        evaluate: Evaluator,
        lister: Lister,
    ) -> None:
        self.task, self.whole, self.act, self.row_scale = task, whole, act, row_scale
        self.w_down = task.w_down.contiguous()
        self.evaluate = evaluate
        self.values, self.bits = values, bits
        listed = lister(turn_bits(bits[None], values.shape[1]))  # by neuron: its row of W_down is read once
        self.make_exact(listed.source.long(), listed.row.long())
        self.evaluated = len(listed.row)

    def coefficient(self, r: Tensor, n: Tensor) -> Tensor:
        c = self.act[r, n].float()
        return c if self.row_scale is None else c * self.row_scale[r].float()

    def make_exact(self, n: Tensor, r: Tensor) -> None:
        """Evaluate neurons n of rows r, sorted by neuron, int64 [N] each."""
        for some in pieces(len(r), max(LEAST_EXACT, self.task.workspace // 4 // LISTED_BYTES)):
            rows, neurons = r[some], n[some]
            self.values[rows, neurons] = self.evaluate(
                self.w_down,
                self.whole,
                neurons.int(),
                rows.int(),
                self.coefficient(rows, neurons),
                self.values[rows, neurons],
            )

    def best(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Values and indices [R, k] of the largest exact values, -inf where there are fewer; sums [R]."""
        count, neurons = self.values.shape
        size = triton.next_power_of_2(min(k, MOST_BEST))
        keys = torch.empty(count, size, dtype=torch.int64, device=self.values.device)
        sums = torch.empty(count, dtype=torch.float64, device=self.values.device)
        block = max(size, 256 if interpreted() else BLOCK)
        _best[(count,)](self.values, self.bits, keys, sums, neurons, BLOCK=block, K=size, num_warps=4)
        keys = keys.sort(descending=True).values
        value = (keys >> 32).int().view(torch.float32).masked_fill_(keys < 0, -torch.inf)
        index = (LAST.value - (keys & 0xFFFFFFFF)).masked_fill_(keys < 0, 0)
        if k > size:  # `search` finds them all
            value, index = value.new_full((count, k), -torch.inf), index.new_zeros(count, k)
        return value[:, :k].contiguous(), index[:, :k].contiguous(), sums

    def search(self, rows: Tensor, norms: Tensor) -> _Search:
        """The rows (int64 [n]) whose k largest are not settled by what was listed."""
        shift = torch.arange(32, dtype=torch.int32, device=rows.device)
        neurons = self.values.shape[1]
        listed = ((self.bits[rows][..., None] >> shift) & 1).flatten(1)[:, :neurons].bool()
        every = torch.arange(neurons, device=rows.device)
        factor = self.coefficient(rows[:, None], every[None, :]).abs_()
        bound = self.values[rows] + factor.mul_(norms).mul_(_margin(self.whole.shape[1]))
        return _Search(self, rows, listed, bound)


class _Search:
    """Rows whose best neurons are found by evaluating more of them, by falling bound."""

    def __init__(self, scored: _Scored, rows: Tensor, listed: Tensor, bound: Tensor) -> None:
        self.scored, self.rows, self.bound = scored, rows, bound
        self.listed = listed
        self.exact = listed | (bound <= 0)  # evaluated, or proven to be 0
        self.values = scored.values[rows].masked_fill_(~listed, 0)
        self.evaluated = 0

    def top_k(self, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices [n, k]; bounds equal to the k-th best are evaluated: the lower index wins."""
        batch = k
        while True:
            known = self.values.masked_fill(~self.exact, -torch.inf)
            last = known.topk(k).values[:, -1:]
            candidates = self.bound.masked_fill(self.exact, -torch.inf).topk(min(batch, known.shape[1]))
            needed = (candidates.values >= last) & (candidates.values > -torch.inf)
            if not bool(needed.any()):
                return stable_topk(known, k)
            r, c = needed.nonzero(as_tuple=True)
            n = candidates.indices[r, c]
            order = n.argsort(stable=True)
            r, n = r[order], n[order]
            self.scored.make_exact(n, self.rows[r])
            self.values[r, n] = self.scored.values[self.rows[r], n]
            self.exact[r, n] = True
            self.evaluated += len(r)
            batch *= 2

    def corrections(self, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of neurons evaluated here: sums [n] of exact, first-order and doubtful values."""
        r, n = (self.exact & ~self.listed & (self.bound > 0)).nonzero(as_tuple=True)
        slack = (
            self.scored.coefficient(self.rows[r], n).abs() * norms[n] * _margin(self.scored.whole.shape[1])
        )
        first_order = (self.bound[r, n] - slack).clamp_(min=0)

        def rowwise(x: Tensor) -> Tensor:
            out = torch.zeros(len(self.bound), dtype=torch.float64, device=x.device)
            ends = torch.bincount(r, minlength=len(out)).cumsum(0)
            sums = torch.cat([out[:1], x.double().cumsum(0)])
            return sums[ends] - sums[torch.cat([ends[:1] * 0, ends[:-1]])]

        return rowwise(self.values[r, n]), rowwise(first_order), rowwise(first_order + slack)
