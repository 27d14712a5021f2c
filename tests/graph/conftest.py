"""A route found the slow way, edge by edge: what the fast one is compared with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lmtt.run.data import TraceData

Edge = tuple[str, str, str]
Weights = dict[Edge, float]


def every_edge(data: TraceData) -> list[tuple[Edge, float, float]]:
    """(source, target, kind), its share and its largest part's, read off the definition one by one."""
    kept, found = data.edges, []
    for layer in range(len(data.parallel)):
        whole = "post" if data.parallel[layer] else "mid"
        for e in range(kept.layer_ptr[layer], kept.layer_ptr[layer + 1]):
            heads = kept.head_weight[kept.head_ptr[e] : kept.head_ptr[e + 1]]
            ends = pre(layer, kept.source[e]), f"L{layer}.{whole}.{kept.destination[e]}"
            found.append(((*ends, "attention"), kept.weight[e], max(heads, default=np.float32(0))))
        for p in range(len(data.tokens)):
            before, mid, mlp, opaque, post = (
                pre(layer, p),
                *(f"L{layer}.{kind}.{p}" for kind in ("mid", "mlp", "opaque", "post")),
            )
            into = post if data.parallel[layer] else mid
            rows = [
                (before, into, "residual", data.residual),
                (before, opaque, "opaque", data.opaque),
                (opaque, into, "opaque", data.opaque),
                (before if data.parallel[layer] else mid, mlp, "mlp", data.mlp),
                (mlp, post, "mlp", data.mlp),
            ]
            if not data.parallel[layer]:
                rows.append((mid, post, "residual", data.passthrough))
            for source, target, kind, share in rows:
                found.append(((source, target, kind), share[layer, p], share[layer, p]))
    return found


def pre(layer: int, position: int) -> str:
    return f"L{layer - 1}.post.{position}" if layer else f"embed.{position}"


def search(data: TraceData, position: int, tau: float, renormalized: bool = False) -> Weights:
    """Depth first from the target, over edges strictly above the threshold."""
    into: dict[str, list[tuple[Edge, float]]] = {}
    for edge, share, part in every_edge(data):
        if (part if renormalized else share) > np.float32(tau):
            into.setdefault(edge[1], []).append((edge, float(share)))
    found: Weights = {}
    stack, seen = [f"L{len(data.parallel) - 1}.post.{position}"], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for edge, share in into.get(node, []):
            found[edge] = share
            stack.append(edge[0])
    return found


@pytest.fixture(scope="session")
def brute_force() -> Callable[..., Weights]:
    return search
