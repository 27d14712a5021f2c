"""A route in the forms that other programs read: the JSON document and a networkx graph.

The document, `lmtt.route/1`:

| field | holds |
|---|---|
| schema | "lmtt.route/1" |
| model, measure, screen, dtype, versions, floor | what made the trace |
| tokens, input_ids | the prompt |
| position, threshold, renormalized | what was asked; position >= 0 |
| predictions | the ten most probable next tokens at the position: token, id, probability |
| nodes | id, layer (-1 for embeddings), position, kind, rest, certificate |
| edges | source, target, kind, layer, weight, reveal, heads: [head, weight]; strongest reveal first |
| whole_sublayers | sublayers that are one part: layer, sublayer, kind (mixer, opaque), reason |
| cost | what was measured: seconds, peak_bytes, backend |

`rest` is the share of the attention edges into a node that the trace did not keep, `certificate` the bound
on the error of any share into it; both are 0 where every share is there and exact.
"""

from __future__ import annotations

import json
import os
import tempfile
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmtt.errors import InputError, LmttError

if TYPE_CHECKING:
    from lmtt.graph.routes import Route

SCHEMA = "lmtt.route/1"
PREDICTIONS = 10


class Prediction(NamedTuple):
    """A next token and its probability."""

    token: str
    id: int
    probability: float


def predictions(route: Route, position: int | None = None, k: int = PREDICTIONS) -> list[Prediction]:
    """The most probable next tokens at a position (the route's own if None), as many as are kept up to k."""
    kept, at = route.trace.predictions, route.position if position is None else position
    names = route.trace.meta["prediction_tokens"]
    probability = np.exp(kept.logit[at, :k].astype(np.float64) - kept.logsumexp[at])
    return [
        Prediction(names[str(token)], token, p)
        for token, p in zip(kept.token_id[at, :k].tolist(), probability.tolist(), strict=True)
    ]


def edge_heads(route: Route, edge: int) -> list[tuple[int, float]]:
    """The kept heads of one edge of the route, strongest first."""
    heads = route.heads[route.edges["head_start"][edge] : route.edges["head_end"][edge]]
    order = np.argsort(-heads["weight"], kind="stable")
    return list(zip(heads["head"][order].tolist(), heads["weight"][order].tolist(), strict=True))


def route_json(route: Route) -> dict[str, Any]:
    """The document of this module's table; plain Python values, finite numbers only."""
    trace, meta, ids = route.trace, route.trace.meta, route.node_ids
    heads = [
        {"head": head, "weight": weight}
        for head, weight in zip(route.heads["head"].tolist(), route.heads["weight"].tolist(), strict=True)
    ]
    return {
        "schema": SCHEMA,
        "model": meta["model"],
        "measure": meta["measure"],
        "floor": meta["floor"],
        "screen": meta["screen"],
        "dtype": meta["dtype"],
        "versions": meta["versions"],
        "tokens": list(trace.tokens),
        "input_ids": trace.input_ids.tolist(),
        "position": route.position,
        "threshold": route.threshold,
        "renormalized": route.renormalized,
        "predictions": [prediction._asdict() for prediction in predictions(route)],
        "nodes": [
            {"id": name, "layer": layer, "position": at, "kind": kind, "rest": rest, "certificate": bound}
            for name, (kind, layer, at, _, rest, bound) in zip(ids, route.nodes.tolist(), strict=True)
        ],
        "edges": [
            {
                "source": ids[source],
                "target": ids[target],
                "kind": kind,
                "layer": layer,
                "weight": weight,
                "reveal": revealed,
                "heads": heads[first:last],
            }
            for source, target, kind, layer, _, _, weight, revealed, first, last in route.edges.tolist()
        ],
        "whole_sublayers": meta.get("whole_sublayers", []),
        "cost": dict(trace.cost),
    }


def route_networkx(route: Route) -> Any:
    """A `networkx.MultiDiGraph`, its parallel edges keyed by kind.

    Nodes carry kind, layer, position, reveal, rest and certificate; edges kind, layer, weight, reveal and
    heads {head: weight}; the graph position, threshold and renormalized.
    """
    try:
        import networkx
    except ImportError:
        raise LmttError(
            "to_networkx needs networkx, which is not installed", remedy="pip install 'lmtt[graph]'"
        ) from None
    graph = networkx.MultiDiGraph(
        position=route.position, threshold=route.threshold, renormalized=route.renormalized
    )
    names = route.nodes.dtype.names or ()
    for name, node in zip(route.node_ids, route.nodes.tolist(), strict=True):
        graph.add_node(name, **dict(zip(names, node, strict=True)))
    for number, (source, target, kind, layer, _, _, weight, revealed, _, _) in enumerate(
        route.edges.tolist()
    ):
        heads = dict(edge_heads(route, number)) if kind == "attention" else {}
        graph.add_edge(
            route.node_ids[source],
            route.node_ids[target],
            key=kind,
            kind=kind,
            layer=layer,
            weight=weight,
            reveal=revealed,
            heads=heads,
        )
    return graph


# --- files ---


def write_json(path: str | PathLike[str], document: dict[str, Any]) -> None:
    """Write a document as UTF-8 JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(document, ensure_ascii=False, allow_nan=False))


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write a whole file or none; InputError if it cannot be written."""
    target = Path(path)
    try:
        # Lone surrogates can be in a token, but in no UTF-8 file.
        data = text.encode("utf-8", "replace")
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".lmtt-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}", remedy="name a writable file") from None
