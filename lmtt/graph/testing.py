"""Traces without a model, for tests: from dense arrays of every share, or random ones full of ties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lmtt.run.data import F32, Edges, Neurons, Predictions, TraceData

PREDICTIONS = 10


def make_trace(
    pairs: F32,
    *,
    residual: F32,
    mlp: F32,
    parallel: Sequence[bool] | None = None,
    bias: F32 | None = None,
    opaque: F32 | None = None,
    certificate: F32 | None = None,
    tokens: Sequence[str] | None = None,
    floor: float = 0.0,
) -> TraceData:
    """A trace of the shares `pairs` [L, H, T, T] (`[l, h, i, j]`, 0 above the diagonal) and rows [L, T].

    Edges above `floor` are kept with those of their heads that are; the others make `rest`.
    """
    L, H, T, _ = pairs.shape
    edge_sums = pairs.astype(np.float64).sum(1).astype(np.float32)  # [L, T, T]
    layer, destination, source = np.nonzero(edge_sums > floor)
    of_edges = pairs[layer, :, destination, source]  # [N, H]
    edge, head = np.nonzero(of_edges > floor)
    zeros = np.zeros((L, T), np.float32)
    random = np.random.default_rng(T)
    logit = -np.sort(-random.normal(0, 3, (T, PREDICTIONS)), axis=1).astype(np.float32)
    token_id = np.tile(np.arange(PREDICTIONS, dtype=np.int32), (T, 1))
    return TraceData(
        tokens=tuple(tokens or [f" t{i}" for i in range(T)]),
        input_ids=np.arange(T, dtype=np.int64),
        parallel=np.array(parallel if parallel is not None else [False] * L),
        residual=residual,
        mlp=mlp,
        passthrough=np.where(mlp > 0, 1 - mlp, 0).astype(np.float32),
        bias=zeros if bias is None else bias,
        opaque=zeros if opaque is None else opaque,
        rest=np.where(edge_sums > floor, 0, edge_sums).sum(-1).astype(np.float32),
        certificate=zeros if certificate is None else certificate,
        edges=Edges(
            layer_ptr=np.searchsorted(layer, np.arange(L + 1)).astype(np.int64),
            destination=destination.astype(np.int32),
            source=source.astype(np.int32),
            weight=edge_sums[layer, destination, source],
            head_ptr=np.searchsorted(edge, np.arange(len(layer) + 1)).astype(np.int64),
            head=head.astype(np.int32),
            head_weight=of_edges[edge, head],
        ),
        neurons=Neurons(np.full((L, T, 1), -1, np.int32), zeros[..., None], zeros[..., None], zeros),
        predictions=Predictions(token_id, logit, np.log(np.exp(logit).sum(-1)) + np.float32(0.1)),
        resid_pre=None,
        meta={
            "model": {"name": "made by hand", "n_layers": L, "n_heads": H},
            "floor": floor,
            "screen": 0.0,
            "measure": "l1",
            "dtype": "float32",
            "versions": {"lmtt": "test"},
            "prediction_tokens": {str(i): f" p{i}" for i in range(PREDICTIONS)},
        },
        cost={"seconds": {}, "peak_bytes": {}, "backend": {}},
    )


def random_trace(
    seed: int,
    *,
    tokens: int = 5,
    parallel: Sequence[bool] = (False, True, False),
    heads: int = 3,
    floor: float = 0.0,
    units: int = 16,
    opaque: bool = True,
) -> TraceData:
    """Every share is a multiple of 1/units: exact in float32, and full of ties.

    Some rows have no share at all, as where every proximity is 0.
    """
    random = np.random.default_rng(seed)
    T, L = tokens, len(parallel)
    pairs = np.zeros((L, heads, T, T), np.float32)
    rows = {name: np.zeros((L, T), np.float32) for name in ("residual", "bias", "opaque", "mlp")}
    for layer in range(L):
        for i in range(T):
            # Few parts per row: what is likely to be above a threshold is what makes routes.
            sources = random.permutation(i + 1)[: random.integers(1, 4)]
            kept = [(h, int(j)) for j in sources for h in range(heads) if random.random() < 0.7]
            names = ["residual", "bias"] + ["opaque"] * opaque + ["mlp"] * bool(parallel[layer])
            drawn = random.multinomial(units, random.dirichlet(np.ones(len(kept) + len(names)))) / units
            if random.random() < 0.1:
                drawn[:] = 0
            for (h, j), share in zip(kept, drawn, strict=False):
                pairs[layer, h, i, j] = share
            for name, share in zip(names, drawn[len(kept) :], strict=True):
                rows[name][layer, i] = share
            if not parallel[layer]:
                rows["mlp"][layer, i] = random.integers(0, units + 1) / units
    return make_trace(
        pairs,
        residual=rows["residual"],
        mlp=rows["mlp"],
        bias=rows["bias"],
        opaque=rows["opaque"],
        parallel=parallel,
        floor=floor,
    )


def dense_pairs(data: TraceData, heads: int) -> NDArray[np.float32]:
    """[L, H, T, T]: the kept (head, source) shares as a dense array."""
    kept, (L, T) = data.edges, data.residual.shape
    layer = np.repeat(np.arange(L), np.diff(kept.layer_ptr))
    edge = np.repeat(np.arange(len(kept.weight)), np.diff(kept.head_ptr))
    result = np.zeros((L, heads, T, T), np.float32)
    result[layer[edge], kept.head, kept.destination[edge], kept.source[edge]] = kept.head_weight
    return result
