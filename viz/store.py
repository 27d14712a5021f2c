"""A trace's route graph as bytes for the browser: typed arrays, about 5 bytes an edge, for all starts.

Layout, in one zlib stream: uint32 length of the header, the header (JSON), padding, then the arrays, each
aligned to 4 bytes. The header's `columns` lists [name, type, count, offset]; types are f4, u4, u2 and u1,
little endian. `route.mjs` reads it. Nothing is computed here that the trace does not hold:

| array | holds |
|---|---|
| sumPtr, sumBlock | edges of a sum are sumPtr[s]:sumPtr[s+1]; its destination's block (graph/routes.py) |
| source, target, kind, weight | of each edge: positions, index into EDGE_KINDS, share |
| gate | renormalised only: what decides that an edge appears |
| headEdge, head, headWeight | kept heads of the strongest attention edges, by edge |
| neuronRow, neuron, neuronShare | top neurons of the strongest MLPs; row = layer * T + position |

All text is made visible and clipped before it is packed.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtt.graph.routes import ATTENTION, RouteGraph, renormalised_weights
from lmtt.graph.text import clipped, token_label, visible
from lmtt.run.data import TraceData

SCHEMA = "lmtt.store/1"
MAX_EDGES = 500_000  # the strongest are sent; the page says from which share on
LISTED_ABOVE = 0.02  # heads of edges and neurons of MLPs with a smaller share are left to the details
LISTED = 20_000  # and no more heads, or rows of neurons, than this
NEURONS = 4
SAID = 5  # predictions of each position
TEXT = 160  # characters of a token
MARGIN = 4

Array = NDArray[Any]


def pack(data: TraceData, *, renormalised_at: float | None = None, most: int = MAX_EDGES) -> bytes:
    """The store of a trace.

    renormalised_at : a threshold; weights are then those of the renormalised route at it, and of no other.
    most : keep the strongest edges, at most so many; `floor` in the header is the share that they exceed.
    """
    graph = RouteGraph.from_trace(data)
    weight, gate = graph.weight, graph.largest_head if renormalised_at is not None else graph.weight
    if renormalised_at is not None:
        weight, _ = renormalised_weights(graph, renormalised_at)
    floor = float(data.meta["floor"]) if renormalised_at is None else renormalised_at
    floor = max(floor, page_floor(gate, most))
    kept = np.flatnonzero(gate > np.float32(floor))
    T = graph.tokens
    block = graph.target[kept] // T
    sum_block, first = np.unique(block, return_index=True)
    small = np.uint16 if T <= 1 << 16 else np.uint32
    columns: dict[str, Array] = {
        "sumPtr": np.append(first, len(kept)).astype(np.uint32),
        "sumBlock": sum_block.astype(np.uint32),
        "weight": weight[kept],
        **({} if renormalised_at is None else {"gate": gate[kept]}),
        "source": (graph.source[kept] % T).astype(small),
        "target": (graph.target[kept] % T).astype(small),
        "kind": graph.kind[kept],
        **_heads(graph, kept),
        **_neurons(data),
    }
    return _packed(
        {
            "schema": SCHEMA,
            "tokens": T,
            "layers": graph.layers,
            "parallel": data.parallel.tolist(),
            "floor": floor,
            "renormalised": renormalised_at,
            "left": len(graph.weight) - len(kept),
            "name": clipped(visible(str(data.meta["model"]["name"])), TEXT),
            "token": [token_label(token, TEXT) for token in data.tokens],
            "said": _said(data),
        },
        columns,
    )


def page_floor(weight: NDArray[np.float32], most: int) -> float:
    """The smallest share that at most `most` of the edges exceed, 0 if all of them may stay."""
    if len(weight) <= most:
        return 0.0
    return float(np.partition(weight, len(weight) - most - 1)[len(weight) - most - 1])


def _packed(head: dict[str, Any], columns: dict[str, Array]) -> bytes:
    # Offsets stand in the header that they follow, so room is left for them first.
    described = [[name, _type(array), len(array), 10**11] for name, array in columns.items()]
    room = len(json.dumps({**head, "columns": described}).encode())
    start = (MARGIN + room + 3) // 4 * 4
    offset, body = start, []
    for entry, array in zip(described, columns.values(), strict=True):
        raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
        entry[3] = offset
        body.append(raw + b"\0" * (-len(raw) % 4))
        offset += len(body[-1])
    header = json.dumps({**head, "columns": described}).encode().ljust(start - MARGIN)
    return zlib.compress(b"".join([struct.pack("<I", len(header)), header, *body]), 6)


def _type(array: Array) -> str:
    return {"f4": "f4", "u4": "u4", "u2": "u2", "u1": "u1"}[array.dtype.str[1:]]


def _heads(graph: RouteGraph, kept: NDArray[np.int64]) -> dict[str, Array]:
    """Heads of the strongest attention edges."""
    edges = graph.data.edges
    strong = np.flatnonzero((graph.kind[kept] == ATTENTION) & (graph.weight[kept] > LISTED_ABOVE))
    row = graph.kept_edge[kept[strong]]
    counts = np.diff(edges.head_ptr)[row]
    if counts.sum() > LISTED:
        order = np.argsort(-edges.weight[row], kind="stable")
        strong = np.sort(strong[order[np.cumsum(counts[order]) <= LISTED]])
        row = graph.kept_edge[kept[strong]]
        counts = np.diff(edges.head_ptr)[row]
    at = np.repeat(edges.head_ptr[row] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    return {
        "headEdge": np.repeat(strong, counts).astype(np.uint32),
        "head": edges.head[at].astype(np.uint16),
        "headWeight": edges.head_weight[at],
    }


def _neurons(data: TraceData) -> dict[str, Array]:
    """NEURONS of each of the strongest MLPs; a missing one has share 0."""
    share, kept = data.mlp.reshape(-1), data.neurons
    strong = np.flatnonzero(share > LISTED_ABOVE)
    if len(strong) > LISTED:
        strong = np.sort(strong[np.argsort(-share[strong], kind="stable")[:LISTED]])
    n = min(NEURONS, kept.index.shape[2])
    index = kept.index.reshape(len(share), -1)[strong, :n]
    contribution = np.where(index >= 0, kept.contribution.reshape(len(share), -1)[strong, :n], 0)
    wide_index, wide = (
        np.zeros((len(strong), NEURONS), np.uint32),
        np.zeros((len(strong), NEURONS), np.float32),
    )
    wide_index[:, :n], wide[:, :n] = np.maximum(index, 0), contribution
    return {"neuronRow": strong.astype(np.uint32), "neuron": wide_index.ravel(), "neuronShare": wide.ravel()}


def _said(data: TraceData) -> list[list[list[Any]]]:
    """[T][SAID][token, probability]: what the model would say next at each position."""
    kept, names = data.predictions, data.meta["prediction_tokens"]
    probability = np.exp(kept.logit[:, :SAID].astype(np.float64) - kept.logsumexp[:, None])
    labels = {
        token: token_label(names[str(token)], TEXT) for token in np.unique(kept.token_id[:, :SAID]).tolist()
    }
    return [
        [[labels[token], round(p, 5)] for token, p in zip(tokens, row, strict=True)]
        for tokens, row in zip(kept.token_id[:, :SAID].tolist(), probability.tolist(), strict=True)
    ]
