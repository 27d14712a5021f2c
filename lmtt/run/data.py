"""What a trace is made of: host arrays only, so that it can be stored, opened and drawn without a model.

`L` layers, `T` tokens, `D` d_model, `N` kept edges, `M` kept heads of kept edges, `K` top neurons,
`P` predictions. Kept edges are sorted by (layer, destination, source), heads within an edge by head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Edges:
    """Kept attention edges of all layers, with the heads that made them."""

    layer_ptr: I64  # [L + 1]: edges of layer l are layer_ptr[l]:layer_ptr[l+1]
    destination: I32  # [N]
    source: I32  # [N]
    weight: F32  # [N], share of the stage's whole, summed over all heads
    head_ptr: I64  # [N + 1]: heads of edge e are head_ptr[e]:head_ptr[e+1]
    head: I32  # [M]
    head_weight: F32  # [M]


@dataclass(frozen=True)
class Neurons:
    """Top neurons of every row; index -1 where a layer has no MLP that was taken apart."""

    index: I32  # [L, T, K]
    contribution: F32  # [L, T, K]
    activation: F32  # [L, T, K]
    certificate: F32  # [L, T]


@dataclass(frozen=True)
class Predictions:
    """The most probable next tokens at every position."""

    token_id: I32  # [T, P], falling
    logit: F32  # [T, P]
    logsumexp: F32  # [T]


@dataclass(frozen=True)
class TraceData:
    """One prompt's trace. `meta` is JSON: model, settings, versions, closure; `cost` is what was measured."""

    tokens: tuple[str, ...]  # T
    input_ids: I64  # [T]
    parallel: NDArray[np.bool_]  # [L]: no resid_mid; attention and MLP share one sum
    residual: F32  # [L, T], share of resid_pre in resid_mid (parallel: in resid_post)
    mlp: F32  # [L, T], share of the MLP block in resid_post
    passthrough: (
        F32  # [L, T], share of resid_mid in resid_post: 1 - mlp, 0 where both are 0; unused if parallel
    )
    bias: F32  # [L, T], share of the attention sublayer's own bias
    opaque: F32  # [L, T], share of sublayers that were not taken apart
    rest: F32  # [L, T], share of the attention edges that are not kept
    certificate: F32  # [L, T], error bound of every attention-stage share
    edges: Edges
    neurons: Neurons
    predictions: Predictions
    resid_pre: NDArray[Any] | None  # [L + 1, T, D], the last one is the final state; None if kept light
    meta: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
