"""How much of a target each token accounts for: one unit flows down from it through every kept edge.

Every node hands its flow on along its incoming edges in proportion to their shares. The MLP reads one
position and passes everything to it, so per layer, from the top (`[i, j]` destination i, source j):

    sequential   F_mid = F_post,    F_pre = F_mid · (attention + diag(residual))
    parallel                        F_pre = F_post · (attention + diag(residual + mlp))

What has no token to go to is reported: the bias, and `unattributed` - the attention edges that were not kept,
sublayers that were not taken apart (they may have read any position), rows whose shares are all 0. Hence

    sum(tokens) + bias + unattributed = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtt.run.data import I32, TraceData

F64 = NDArray[np.float64]
WORKSPACE = 64 << 20  # bytes that edges times targets may take at a time


@dataclass(frozen=True, eq=False)
class TokenShares:
    """tokens.sum() + bias + unattributed == 1, to rounding in float64."""

    tokens: F64  # [T]; 0 after the target
    bias: float
    unattributed: float


class Rollouts(NamedTuple):
    """One `TokenShares` for each of n targets."""

    tokens: F64  # [n, T]
    bias: F64  # [n]
    unattributed: F64  # [n]


def rollout(data: TraceData, position: int) -> TokenShares:
    """Follow one unit from the final state of `position` (0 to T - 1) down to the embeddings."""
    tokens, bias, unattributed = rollouts(data, [position])
    return TokenShares(tokens[0], float(bias[0]), float(unattributed[0]))


def rollouts(data: TraceData, positions: Sequence[int]) -> Rollouts:
    """Follow one unit from each of n positions, all in one pass over the layers."""
    T, n = len(data.tokens), len(positions)
    flow = np.zeros((n, T))
    flow[np.arange(n), positions] = 1
    bias, unattributed = np.zeros(n), np.zeros(n)
    for layer in range(len(data.parallel) - 1, -1, -1):
        stays = data.residual[layer].astype(np.float64)
        if data.parallel[layer]:
            stays += data.mlp[layer]
        else:
            nothing = (data.mlp[layer] == 0) & (data.passthrough[layer] == 0)
            unattributed += flow[:, nothing].sum(1)
            flow[:, nothing] = 0
        kept = data.edges
        span = slice(int(kept.layer_ptr[layer]), int(kept.layer_ptr[layer + 1]))
        destination, source = kept.destination[span], kept.source[span]
        weight = kept.weight[span].astype(np.float64)
        lost = data.rest[layer].astype(np.float64) + data.opaque[layer]
        whole = stays + lost + data.bias[layer] + np.bincount(destination, weight, T)
        # Shares add up to 1 only to float32; dividing by their sum keeps the unit whole. 0: nowhere to go.
        unattributed += flow[:, whole == 0].sum(1)
        unit = np.divide(flow, whole, out=np.zeros((n, T)), where=whole > 0)
        bias += unit @ data.bias[layer].astype(np.float64)
        unattributed += unit @ lost
        flow = unit * stays + _carried(unit, destination, source, weight)
    return Rollouts(flow, bias, unattributed)


def _carried(unit: F64, destination: I32, source: I32, weight: F64) -> F64:
    """[n, T]: what edges carry from their destinations' `unit` [n, T] to their sources."""
    result = np.zeros_like(unit)
    if not len(weight):
        return result
    order = np.argsort(source, kind="stable")
    sources, first = np.unique(source[order], return_index=True)
    step = max(1, WORKSPACE // (8 * len(weight)))
    for row in range(0, len(unit), step):
        rows = slice(row, row + step)
        carried = unit[rows][:, destination[order]] * weight[order]
        result[rows, sources] = np.add.reduceat(carried, first, axis=1)
    return result
