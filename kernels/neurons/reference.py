"""Contributions of every neuron to each row's whole, and the k largest, in plain torch; see README.md.

1. g = <part, sign(whole)> of all neurons of a block of rows by one matrix product; bound = g + margin.
2. Neurons whose bound exceeds the screen are evaluated exactly.
3. Top k: evaluate the others by falling bound until the k-th best exact value exceeds every bound left.
4. Proximities of a row, exact or first-order, are added in float64 to its normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmtt.kernels.budget import EVALUATION_BYTES
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
from lmtt.kernels.topk import stable_topk
from lmtt.kernels.types import NeuronResult, NeuronTask


@dataclass
class _Scored:
    """All neurons of one block of rows."""

    values: Tensor  # [n, F], proximities, exact or first-order
    exact: Tensor  # bool [n, F]: `values` is exact, because evaluated or because the bound is not positive
    bound: Tensor  # [n, F], not below the true proximity
    skipped_by: Tensor  # [n, F], what a first-order value may be wrong by
    evaluated: int
    positive: int


@torch.no_grad()
def neuron_contributions(task: NeuronTask) -> NeuronResult:
    """The k largest shares of each row and those of the other parts; see NeuronTask and NeuronResult."""
    tokens, neurons = task.act.shape
    dtype, device = compute_dtype(task.whole.dtype), task.whole.device
    item, d_model = dtype.itemsize, task.whole.shape[1]
    index = torch.zeros(tokens, task.k, dtype=torch.int64, device=device)
    value = torch.zeros(tokens, task.k, dtype=dtype, device=device)
    parts = torch.zeros(tokens, 2 + len(task.others), dtype=dtype, device=device)
    normaliser, certified, checksum = torch.zeros(3, tokens, dtype=dtype, device=device)
    evaluated = positive = 0
    weight_norms = _row_norms(task, dtype)
    # Per neuron: g, bound, slack, two score arrays of the top-k search, a float64 sum's operand, masks.
    row_bytes = neurons * (6 * item + (32 if task.measure == "l2" else 8) + 4) + 10 * d_model * item
    step = max(1, min(task.workspace // 2 // row_bytes, 256))

    with ieee_matmul():
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            whole = task.whole[rows].to(dtype)
            of = measure(task.measure)
            prepared = of.prepare(whole)
            signs = sign(whole)
            mass = whole.abs().sum(-1, dtype=torch.float64)
            proximities, signed, absolute = [], torch.zeros_like(mass), torch.zeros_like(mass)
            for part in (task.base, task.bias, *task.others):
                if part is None:
                    proximities.append(torch.zeros_like(mass))
                    continue
                vector = (part.expand_as(whole) if part.dim() == 1 else part[rows]).to(dtype)
                proximities.append(of.proximity(vector, *prepared).double())
                g = (vector * signs).sum(-1, dtype=torch.float64)
                signed += g
                absolute += g.abs()

            act = task.act[rows].to(dtype)
            if task.row_scale is not None:
                act = act * task.row_scale[rows, None].to(dtype)
            g = _against_weights(task, signs).mul_(act)
            signed += g.sum(-1, dtype=torch.float64)
            absolute += g.abs().sum(-1, dtype=torch.float64)
            if task.measure == "l1":
                scored = _score_l1(task, g, act, weight_norms, task.screen * mass, prepared)
            else:
                scored = _score_l2(task, g, act, weight_norms, whole, prepared)
            best = _exact_topk(task, scored, act, prepared)
            evaluated += scored.evaluated
            positive += scored.positive

            others = torch.stack(proximities, -1)
            total = others.sum(-1) + scored.values.sum(-1, dtype=torch.float64)
            skipped = scored.skipped_by.masked_fill(scored.exact, 0).sum(-1, dtype=torch.float64)
            index[rows] = best[1]
            value[rows] = divide(best[0].double(), total[:, None]).to(dtype)
            parts[rows] = divide(others, total[:, None]).to(dtype)
            normaliser[rows] = total.to(dtype)
            certified[rows] = certificate(skipped, total).to(dtype)
            checksum[rows] = divide((signed - mass).abs(), absolute).to(dtype)
    return NeuronResult(
        index=index,
        value=value,
        residual=parts[:, 0],
        bias=parts[:, 1],
        others=parts[:, 2:],
        normaliser=normaliser,
        certificate=certified,
        checksum=checksum,
        evaluated=evaluated,
        positive=positive,
    )


def _chunks(task: NeuronTask, dtype: torch.dtype) -> list[slice]:
    """Neurons whose weights are widened together; all at once where nothing needs widening."""
    neurons, d_model = task.w_down.shape
    if task.w_down.dtype == dtype:
        return [slice(0, neurons)]
    step = max(1, task.workspace // 8 // (d_model * dtype.itemsize))
    return [slice(f, f + step) for f in range(0, neurons, step)]


def _row_norms(task: NeuronTask, dtype: torch.dtype) -> Tensor:
    """[F]: |W_down[n]|_1 for L1; |W_down[n]|_2^2 in float64 for L2."""
    neurons, d_model = task.w_down.shape
    wide = dtype if task.measure == "l1" else torch.float64
    step = max(1, task.workspace // 8 // (d_model * wide.itemsize))
    out = torch.empty(neurons, dtype=wide, device=task.w_down.device)
    for f in range(0, neurons, step):
        some = task.w_down[f : f + step].to(wide)
        out[f : f + step] = some.abs().sum(-1) if task.measure == "l1" else some.square().sum(-1)
    return out


def _against_weights(task: NeuronTask, direction: Tensor) -> Tensor:
    """<W_down[n], direction[i]>: [n, D] to [n, F], in the dtype of `direction`."""
    out = direction.new_empty(direction.shape[0], task.w_down.shape[0])
    for some in _chunks(task, direction.dtype):
        out[:, some] = direction @ task.w_down[some].to(direction.dtype).T
    return out


def _score_l1(
    task: NeuronTask,
    g: Tensor,
    act: Tensor,
    weight_norms: Tensor,
    threshold: Tensor,
    prepared: tuple[Tensor, ...],
) -> _Scored:
    slack = act.abs() * weight_norms * screening_margin(task.w_down.shape[1], g.dtype)
    bound = g + slack
    above = bound > threshold.to(g.dtype)[:, None]
    values = g.clamp_(min=0)
    scored = _Scored(
        values=values,
        exact=bound <= 0,
        bound=bound,
        skipped_by=slack.add_(values),
        evaluated=0,
        positive=int((bound > 0).sum()),
    )
    _evaluate(task, scored, above, act, prepared)
    return scored


def _score_l2(
    task: NeuronTask,
    g: Tensor,
    act: Tensor,
    weight_norms: Tensor,
    whole: Tensor,
    prepared: tuple[Tensor, ...],
) -> _Scored:
    """Every neuron exactly: (2d - q) / (|y| + sqrt(|y|^2 - 2d + q)), in units of the largest coordinate."""
    unit = whole.double().abs().amax(-1, keepdim=True)
    unit = unit.masked_fill(unit == 0, 1)
    y = whole.double() / unit
    y_norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    most = torch.finfo(torch.float64).max / 8
    coefficient = act.double() / unit
    q = (coefficient.square() * weight_norms).clamp_(max=most)
    numerator = _against_weights(task, y).mul_(coefficient).clamp_(-most, most).mul_(2).sub_(q)
    radicand = y_norm * y_norm - numerator
    denominator = y_norm + radicand.clamp(min=0).sqrt_()
    positive = numerator > 0
    scored = _Scored(
        values=divide(numerator.clamp(min=0), denominator).mul_(unit).to(g.dtype),
        exact=torch.ones_like(positive),
        bound=g,
        skipped_by=torch.zeros_like(g),
        evaluated=0,
        positive=int(positive.sum()),
    )
    _evaluate(task, scored, positive & (radicand < L2_NEARLY_EQUAL * y_norm * y_norm), act, prepared)
    scored.evaluated = scored.positive
    return scored


def _evaluate(
    task: NeuronTask, scored: _Scored, which: Tensor, act: Tensor, prepared: tuple[Tensor, ...]
) -> None:
    """Make the neurons `which` (bool [n, F]) exact."""
    of = measure(task.measure)
    r, n = which.nonzero(as_tuple=True)
    vector_bytes = task.w_down.shape[1] * act.dtype.itemsize
    batch = max(1, min(EVALUATION_BYTES, task.workspace // 32) // vector_bytes)
    coefficient = act[r, n]
    out = torch.empty_like(coefficient)
    for start in range(0, len(r), batch):
        here = slice(start, start + batch)
        x = task.w_down[n[here]].to(act.dtype).mul_(coefficient[here, None])
        out[here] = of.proximity(x, *(p.index_select(0, r[here]) for p in prepared))
    scored.values[r, n] = out
    scored.exact[r, n] = True
    scored.evaluated += len(r)


def _exact_topk(
    task: NeuronTask, scored: _Scored, act: Tensor, prepared: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Proximities and indices [n, k] of the k largest, evaluating by falling bound until nothing can change.

    A bound equal to the k-th best is evaluated too: at a tie the lower index wins.
    """
    batch = task.k
    while True:
        known = scored.values.masked_fill(~scored.exact, -torch.inf)
        last = known.topk(task.k).values[:, -1:]
        open_bounds = scored.bound.masked_fill(scored.exact, -torch.inf)
        candidates = open_bounds.topk(min(batch, open_bounds.shape[1]))
        needed = (candidates.values >= last) & (candidates.values > -torch.inf)
        if not bool(needed.any()):
            return stable_topk(known, task.k)
        which = torch.zeros_like(scored.exact)
        r, c = needed.nonzero(as_tuple=True)
        which[r, candidates.indices[r, c]] = True
        _evaluate(task, scored, which, act, prepared)
        batch *= 2
