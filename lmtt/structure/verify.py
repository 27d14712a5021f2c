"""Do the parts add up? The check that turns a misunderstood model into an error instead of a wrong number.

closure of a sublayer = max over rows |written - sum of parts|_inf / max over rows |written|_inf
closure of a stage    = max over rows |whole - base - sum of written|_inf / max over rows |whole|_inf

A stage is measured against the stream itself because its rounding is the stream's, which may be a
thousand times larger than what one sublayer adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtt.errors import ClosureError
from lmtt.kernels.backends import cpp_backend
from lmtt.kernels.types import Attention
from lmtt.structure.spec import AttentionWrite, CapturedLayer, MlpWrite, Stage
from lmtt.structure.tolerance import STAGE_BOUND, SUBLAYER_BOUND

PROOF_ROWS = 16  # destinations on which a run proves its sublayers; kernels' checksums cover all of them


@dataclass(frozen=True)
class Closure:
    """How well one sum of a layer closes; `error` is relative and dimensionless."""

    layer: int
    sublayer: str  # "attention", "mlp", "resid_mid", "resid_post", ...
    error: float
    bound: float


def proof_rows(tokens: int) -> Tensor:
    """int64 [min(tokens, PROOF_ROWS)]: rows evenly spread, the first and the last among them."""
    return torch.linspace(0, tokens - 1, min(tokens, PROOF_ROWS), dtype=torch.float64).round().long()


@torch.no_grad()
def measure_closure(
    captured: CapturedLayer, full: bool, bound: float | None = None, rows: Tensor | None = None
) -> tuple[tuple[Closure, ...], ...]:
    """The closure of every sum of one captured layer: by stage its sublayers, in their order, then its own.

    full: also form every attention's and MLP's parts from A (recomputed from q and k), v, W_O, act and
    W_down, accumulated in float64 for float64 models and float32 otherwise. Costs about a third of the
    layer's forward. Without it only the stages are summed, O(T D).
    bound: for the sublayers, in place of SUBLAYER_BOUND.
    rows: int64 [n], the destinations whose sublayers are summed; None: all.
    """
    results = []
    for number, stage in enumerate(captured.stages):
        sums = [
            _write_closure(captured.index, write, bound, rows)
            for write in stage.writes
            if full and isinstance(write, (AttentionWrite, MlpWrite))
        ]
        sums.append(_stage_closure(captured.index, number == len(captured.stages) - 1, stage))
        results.append(tuple(sums))
    return tuple(results)


def check_closure(
    captured: CapturedLayer, full: bool, bound: float | None = None, rows: Tensor | None = None
) -> tuple[Closure, ...]:
    """`measure_closure`, flat; raises ClosureError naming layer, sublayer, error and bound for the first sum
    that does not close (a NaN does not close)."""
    results = tuple(closure for stage in measure_closure(captured, full, bound, rows) for closure in stage)
    for result in results:
        if not result.error <= result.bound:
            raise ClosureError(
                f"layer {result.layer}, {result.sublayer}: the parts do not add up to what was written",
                expected=f"a relative error of at most {result.bound:.1e}",
                got=f"{result.error:.1e}",
                remedy=_remedy(result),
            )
    return results


def _remedy(result: Closure) -> str:
    if result.bound == STAGE_BOUND[torch.float64] and result.error <= STAGE_BOUND[torch.float32]:
        return "its layers compute in float32 even as float64: load the model with dtype='float32'"
    return "this model's layers hold something that is not understood here"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_probabilities(a: Attention, head: int, rows: Tensor | None = None) -> Tensor:
    """A[head][rows] [n, T] from q and k in the accumulation dtype; a sink takes its share of each row."""
    wide = accumulate_dtype(a.q.dtype)
    T = a.q.shape[1]
    j = torch.arange(T, device=a.q.device)
    i = j if rows is None else rows.to(a.q.device)
    x = (a.q[head][i].to(wide) @ a.k[head // a.group].to(wide).T) * a.scale
    if a.softcap is not None:
        x = a.softcap * torch.tanh(x / a.softcap)
    gap = i[:, None] - j[None, :]
    if a.alibi is not None:
        x = x - a.alibi[head].to(wide) * gap
    shut = gap < 0
    if a.window is not None:
        shut = shut | (gap >= a.window)
    if a.mask is not None:
        mask = a.mask[head if a.mask.shape[0] > 1 else 0][i]
        if mask.dtype == torch.bool:
            shut = shut | ~mask
        else:
            x = x + mask.to(wide)
    x = x.masked_fill(shut, -math.inf)
    if a.sinks is None:
        return torch.softmax(x, -1)
    sink = a.sinks[head].to(wide).expand(len(i), 1)
    return torch.softmax(torch.cat([x, sink], -1), -1)[:, :-1]


def sum_of_parts(write: AttentionWrite | MlpWrite, rows: Tensor) -> Tensor:
    """What a sublayer's parts add up to in these rows, bias included, [n, D], in the accumulation dtype."""
    wide = accumulate_dtype(write.written.dtype)
    total = write.written.new_zeros(len(rows), write.written.shape[-1], dtype=wide)
    if isinstance(write, MlpWrite):
        total += _product(write.act[rows].to(wide), write.w_down.to(wide))
        row = write.row_scale
    else:
        a = write.attention
        heads = []
        for h in range(a.heads):
            z = attention_probabilities(a, h, rows) @ a.v[h // (a.heads // a.v.shape[0])].to(wide)
            heads.append(z if a.gate is None else z * a.gate[rows, h].to(wide))
        total += _product(torch.cat(heads, -1), a.w_o.to(wide).reshape(-1, a.w_o.shape[-1]))
        row = a.row_scale
    if row is not None:
        total *= row[rows].to(wide)[:, None]
    if write.bias is None:
        return total
    return total + (write.bias if write.bias.dim() == 1 else write.bias[rows]).to(wide)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight; quicker for a few rows and a large weight."""
    quick = cpp_backend.multiply_few_rows(x, weight)
    return x @ weight if quick is None else quick


def _write_closure(
    layer: int, write: AttentionWrite | MlpWrite, bound: float | None, rows: Tensor | None
) -> Closure:
    wide = accumulate_dtype(write.written.dtype)
    rows = torch.arange(len(write.written)) if rows is None else rows
    rows = rows.to(write.written.device)
    written = write.written[rows]
    error = _relative(written.to(wide) - sum_of_parts(write, rows), written)
    name = "attention" if isinstance(write, AttentionWrite) else "mlp"
    return Closure(layer, name, error, SUBLAYER_BOUND[write.written.dtype] if bound is None else bound)


def _stage_closure(layer: int, last: bool, stage: Stage) -> Closure:
    wide = accumulate_dtype(stage.whole.dtype)
    total = stage.base.to(wide)
    for write in stage.writes:
        total = total + write.written.to(wide)
    error = _relative(stage.whole.to(wide) - total, stage.whole)
    return Closure(layer, "resid_post" if last else "resid_mid", error, STAGE_BOUND[stage.whole.dtype])


def _relative(difference: Tensor, reference: Tensor) -> float:
    """Largest entry of `difference` over the largest of `reference`; 0 / 0 is 0, a NaN stays a NaN."""
    error, scale = float(difference.abs().max()), float(reference.abs().max())
    return 0.0 if error == 0.0 and scale == 0.0 else error / scale if scale > 0 else math.nan
