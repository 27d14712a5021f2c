"""Routes through the shares that a published tool measured on a real model, against the routes it found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtt.graph.routes import Route, RouteGraph, reveal, route
from lmtt.graph.testing import make_trace
from lmtt.run.data import TraceData

PROMPTS = ["capital", "induction", "ioi"]
TAU = 0.04
NEAR = 5e-4  # an edge may be on one side only if it is revealed this close to the threshold


def golden(folder: Path, name: str) -> tuple[dict[str, Any], Any]:
    return json.loads((folder / f"{name}.json").read_text()), np.load(folder / f"{name}.npz")


def merged_trace(arrays: Any) -> TraceData:
    """Their residual edge and their edge i → i are one number: here it is the residual edge."""
    attention, mlp = arrays["attention_edges"], arrays["ffn_edges"]
    residual = np.diagonal(attention, axis1=1, axis2=2).copy()
    between = attention.copy()
    at = np.arange(residual.shape[1])
    between[:, at, at] = 0
    return make_trace(between[:, None], residual=residual, mlp=mlp)


def our_name(theirs: str) -> str:
    kind, layer, position = re.fullmatch(r"([XAMI])(\d+)_(\d+)", theirs).groups()
    return f"embed.{position}" if kind == "X" else f"L{layer}.{_KINDS[kind]}.{position}"


_KINDS = {"A": "mid", "M": "mlp", "I": "post"}


def merged(found: Route) -> dict[tuple[str, str], float]:
    ids = found.node_ids
    return {(ids[e["source"]], ids[e["target"]]): float(e["weight"]) for e in found.edges}


@pytest.mark.parametrize("name", PROMPTS)
def test_plain_routes_agree_edge_for_edge(golden_folder, name):
    document, arrays = golden(golden_folder, name)
    data = merged_trace(arrays)
    for start, edges in document["paths"].items():
        theirs = {(our_name(source), our_name(target)): weight for source, target, weight in edges}
        ours = merged(route(data, int(start), TAU))
        graph = RouteGraph.from_trace(data)
        near = np.abs(reveal(graph, int(start)) - np.float32(TAU)) <= NEAR
        assert len(set(ours) ^ set(theirs)) <= np.count_nonzero(near)
        assert len(set(ours) & set(theirs)) >= 0.99 * len(theirs) > 150
        for edge in set(ours) & set(theirs):
            assert ours[edge] == pytest.approx(theirs[edge], abs=NEAR), edge


@pytest.mark.parametrize("name", PROMPTS)
def test_renormalised_attention_of_the_last_layer_agrees(golden_folder, name):
    """All heads of layer 29 are known, and of its rows the last one is on every route from the last token."""
    document, arrays = golden(golden_folder, name)
    heads = np.tril(arrays["heads_layer29"].transpose(2, 0, 1))[None]  # [1, H, T, T]; theirs round above 0
    own = np.diagonal(heads[0].sum(0)).copy()
    residual = np.diagonal(arrays["attention_edges"][29]) - own
    data = make_trace(heads, residual=residual[None].astype(np.float32), mlp=arrays["ffn_edges"][29:])
    last = heads.shape[-1] - 1
    theirs = {
        int(source.split("_")[1]): weight
        for source, target, weight in document["renormalised_last"]
        if target == f"A29_{last}"
    }
    found = route(data, last, TAU, renormalize=True)
    into_mid = found.edges[found.nodes["kind"][found.edges["target"]] == "mid"]
    into_last = into_mid[into_mid["target_position"] == last]
    ours = dict.fromkeys(into_last["source_position"].tolist(), 0.0)
    for edge in into_last:  # they merge the residual with i → i
        ours[int(edge["source_position"])] += float(edge["weight"])
    assert ours.keys() == theirs.keys()
    for source, weight in theirs.items():
        assert ours[source] == pytest.approx(weight, abs=NEAR)
