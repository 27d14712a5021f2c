"""A route as an attribution graph: the JSON that circuit-tracer writes and Neuronpedia draws.

| their field | holds |
|---|---|
| node, layer "E" | an embedding; `feature` is the token's id |
| node, layer "0" to "L-1" | a state or block there; `feature` is its slot (opaque 0, mid 1, mlp 2, post 3) |
| node, layer "L" | a next token, linked from the target's final state by its probability |
| influence | k / N for the k-th of N nodes in falling order of reveal: a slider at t keeps the first t · N |
| link | an edge; edges of several kinds between the same two nodes are one link, their shares added |

Their readers ask for more than their schema does: identifiers of few characters, a probability in a logit
node's label, a layer above 0, a file of 1,024 bytes to 100 MB, one node for each (layer, feature, ctx_idx).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from lmtt.errors import InputError
from lmtt.graph.export import Prediction, predictions
from lmtt.graph.text import clipped, quoted, visible

if TYPE_CHECKING:
    from lmtt.graph.routes import Route

MIN_BYTES, MAX_BYTES = 1024, 100_000_000
_ALLOWED = re.compile(r"[A-Za-z0-9_.-]+")
_FEATURE_TYPES = {
    "embed": "embedding",
    "opaque": "sublayer",
    "mid": "residual stream after attention",
    "mlp": "mlp",
    "post": "residual stream",
}
_PLACES = {"opaque": 0, "mid": 1, "mlp": 2, "post": 3}


def route_neuronpedia(route: Route, slug: str | None = None, scan: str | None = None) -> dict[str, Any]:
    """The document of this module's table.

    Parameters
    ----------
    slug : name of the graph; from the model, the prompt's ids, position and threshold if None.
    scan : their name of the model; the trace's own if None.

    Raises
    ------
    InputError
        A name with other characters than A-Z a-z 0-9 _ . -, a model of one layer, a graph of over 100 MB.
    """
    L = len(route.trace.parallel)
    if L < 2:
        raise InputError(
            "an attribution graph needs a layer above the first", expected="2 layers or more", got=L
        )
    scan = _identifier("scan", scan, str(route.trace.meta["model"]["name"]))
    slug = _identifier("slug", slug, f"{scan}-{_fingerprint(route)}")
    logits = predictions(route)
    names = _node_names(route)
    target = f"{L - 1}_{_PLACES['post']}_{route.position}"
    document = {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": list(route.trace.tokens),
            "prompt": "".join(route.trace.tokens),
            "node_threshold": 1.0,
            "schema_version": 1,
            "info": {
                "description": "Information flow route: a node's links hold its parts' shares of it.",
                "generator": {"name": "lmtt", "version": str(route.trace.meta["versions"]["lmtt"])},
            },
            "generation_settings": {
                "max_n_logits": len(logits),
                "threshold": route.threshold,
                "renormalized": route.renormalized,
                "measure": route.trace.meta["measure"],
                "floor": route.trace.meta["floor"],
            },
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": _logit_name(route, logits[0]),
            "sg_pos": "",
        },
        "nodes": [*_nodes(route, names), *(_logit_node(route, p, n == 0) for n, p in enumerate(logits))],
        "links": [
            *_links(route, names),
            *({"source": target, "target": _logit_name(route, p), "weight": p.probability} for p in logits),
        ],
    }
    size = len(json.dumps(document, ensure_ascii=False).encode("utf-8", "replace"))
    if not MIN_BYTES <= size <= MAX_BYTES:
        raise InputError(
            "the attribution graph would be too large or too small to be read",
            expected=f"{MIN_BYTES} to {MAX_BYTES} bytes",
            got=size,
            remedy="raise the threshold" if size > MAX_BYTES else "lower the threshold",
        )
    return document


def influence(route: Route) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[n nodes], in (0, 1]: k / n for the k-th node, by falling reveal and then from the target downwards.

    A node comes after one of the nodes it leads to, ties included, so what a slider keeps hangs together.
    """
    nodes = route.nodes
    # Rows follow the stream: of two nodes that are revealed together, the later row is nearer the target.
    order = np.lexsort((-np.arange(len(nodes)), -nodes["reveal"]))
    values = np.empty(len(nodes))
    values[order] = np.arange(1, len(nodes) + 1) / len(nodes)
    return values


# --- nodes and links ---


def _node_names(route: Route) -> list[str]:
    ids = route.trace.input_ids
    return [
        f"E_{ids[p]}_{p}" if kind == "embed" else f"{layer}_{_PLACES[kind]}_{p}"
        for kind, layer, p, *_ in route.nodes.tolist()
    ]


def _nodes(route: Route, names: list[str]) -> list[dict[str, Any]]:
    values = influence(route).tolist()
    nodes = []
    for name, value, (kind, layer, position, *_) in zip(names, values, route.nodes.tolist(), strict=True):
        embedded = kind == "embed"
        feature = int(route.trace.input_ids[position]) if embedded else _PLACES[kind]
        at = f"{quoted(route.trace.tokens[position])} [{position}]"
        nodes.append(
            {
                "node_id": name,
                "feature": feature,
                "layer": "E" if embedded else str(layer),
                "ctx_idx": position,
                "feature_type": _FEATURE_TYPES[kind],
                "jsNodeId": name.rpartition("_")[0] + f"-{position}",
                "clerp": f"embedding of {at}" if embedded else f"layer {layer} {kind} at {at}",
                "influence": value,
            }
        )
    return nodes


def _logit_name(route: Route, prediction: Prediction) -> str:
    return f"{len(route.trace.parallel)}_{prediction.id}_{route.position}"


def _logit_node(route: Route, prediction: Prediction, first: bool) -> dict[str, Any]:
    # Readers cut the label at its quotation marks and at "(p=": neither may come from the token.
    token = clipped(visible(prediction.token), 24).replace('"', "”").replace("(p=", "❨p=")
    return {
        "node_id": _logit_name(route, prediction),
        "feature": prediction.id,
        "layer": str(len(route.trace.parallel)),
        "ctx_idx": route.position,
        "feature_type": "logit",
        "jsNodeId": f"L_{prediction.id}-{route.position}",
        "clerp": f'Output "{token}" (p={prediction.probability:.3f})',
        "token_prob": prediction.probability,
        "is_target_logit": first,
    }


def _links(route: Route, names: list[str]) -> list[dict[str, Any]]:
    weights: defaultdict[tuple[int, int], float] = defaultdict(float)
    for source, target, weight in zip(
        *(route.edges[column].tolist() for column in ("source", "target", "weight")), strict=True
    ):
        weights[source, target] += weight
    return [
        {"source": names[source], "target": names[target], "weight": weight}
        for (source, target), weight in weights.items()
    ]


# --- names ---


def _identifier(what: str, given: str | None, otherwise: str) -> str:
    if given is None:
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", otherwise).strip("-") or "model"
    if not isinstance(given, str) or not _ALLOWED.fullmatch(given):
        raise InputError(f"{what} has other characters", expected="A-Z a-z 0-9 _ . - only", got=repr(given))
    return given


def _fingerprint(route: Route) -> str:
    """Eight digits that differ for another prompt, position or threshold."""
    asked = f"{route.trace.input_ids.tolist()} {route.position} {route.threshold} {route.renormalized}"
    return hashlib.sha256(asked.encode()).hexdigest()[:8]
