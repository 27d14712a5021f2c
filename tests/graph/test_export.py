"""What other programs read of a route: JSON, networkx, lines on a terminal."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest

from lmtt.errors import InputError, LmttError
from lmtt.graph.routes import route
from lmtt.graph.testing import make_trace, random_trace
from lmtt.graph.text import clipped, quoted, token_label, visible

HOSTILE = [
    "\x1b[31mred",
    "\x00",
    "\u202eevil",
    "</script><script>alert(1)</script>",
    "\n\n",
    "\ud800",
    "",
    " ",
]


def hostile_trace():
    data = random_trace(5, tokens=len(HOSTILE), parallel=(False, True))
    meta = {**data.meta, "prediction_tokens": {str(i): HOSTILE[i % len(HOSTILE)] for i in range(10)}}
    return dataclasses.replace(data, tokens=tuple(HOSTILE), meta=meta)


def test_the_document_holds_what_it_promises():
    data = random_trace(5, tokens=6, parallel=(False, True, False), floor=1 / 16)
    found = route(data, -1, 0.07)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["schema"] == "lmtt.route/1"
    asked = {k: document[k] for k in ("position", "threshold", "floor", "renormalized", "measure", "screen")}
    assert asked == {
        "position": 5,
        "threshold": 0.07,
        "floor": 1 / 16,
        "renormalized": False,
        "measure": "l1",
        "screen": 0.0,
    }
    assert document["tokens"] == list(data.tokens)
    assert document["input_ids"] == list(range(6))
    assert document.keys() >= {"model", "dtype", "versions", "cost"}
    probabilities = [p["probability"] for p in document["predictions"]]
    assert len(probabilities) == 10
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) < 1

    nodes = {node["id"]: node for node in document["nodes"]}
    assert len(nodes) == len(document["nodes"])
    for name, node in nodes.items():
        if node["kind"] == "embed":
            assert (name, node["layer"]) == (f"embed.{node['position']}", -1)
        else:
            assert name == f"L{node['layer']}.{node['kind']}.{node['position']}"
        assert {"rest", "certificate"} <= node.keys()
    assert f"L2.post.{document['position']}" in nodes
    assert len(document["edges"]) >= 20
    order = [edge["reveal"] for edge in document["edges"]]
    assert order == sorted(order, reverse=True)
    for edge in document["edges"]:
        source, target = nodes[edge["source"]], nodes[edge["target"]]
        assert edge["kind"] in ("attention", "residual", "mlp", "opaque")
        assert edge["layer"] == target["layer"]
        assert edge["weight"] >= edge["reveal"] > np.float32(0.07)
        assert source["position"] == target["position"] or edge["kind"] == "attention"
        if edge["kind"] == "attention":
            assert sum(h["weight"] for h in edge["heads"]) <= edge["weight"] + 1e-6
            assert {h["head"] for h in edge["heads"]} <= {0, 1, 2}
        else:
            assert edge["heads"] == []
    assert sum(len(edge["heads"]) for edge in document["edges"]) > 10


def test_attention_to_the_own_position_and_the_residual_stay_two_edges():
    half = np.full((1, 1), 0.5, np.float32)
    data = make_trace(np.full((1, 1, 1, 1), 0.5, np.float32), residual=half, mlp=half)
    found = route(data)
    ends = [(e["source"], e["target"], e["kind"]) for e in found.to_json()["edges"]]
    assert ("embed.0", "L0.mid.0", "attention") in ends
    assert ("embed.0", "L0.mid.0", "residual") in ends
    assert found.to_networkx().number_of_edges("embed.0", "L0.mid.0") == 2


def test_the_file_is_the_document(tmp_path):
    found = route(hostile_trace(), -1, 0.07)
    document = found.to_json(tmp_path / "route.json")
    read = json.loads((tmp_path / "route.json").read_text("utf-8"))
    read["tokens"] = document["tokens"]  # a lone surrogate has no UTF-8 and was replaced
    read["predictions"] = document["predictions"]
    assert read == document
    with pytest.raises(InputError, match="cannot write"):
        found.to_json(tmp_path / "no folder" / "route.json")
    assert [p.name for p in tmp_path.iterdir()] == ["route.json"]


def test_a_number_that_is_none_is_not_written(tmp_path):
    data = dataclasses.replace(random_trace(0), cost={"seconds": {"total": float("nan")}})
    with pytest.raises(ValueError, match="JSON"):
        route(data).to_json(tmp_path / "route.json")
    assert not list(tmp_path.iterdir())


def test_networkx_and_back():
    import networkx

    found = route(random_trace(5, tokens=6, parallel=(False, True, False)), -1, 0.07)
    graph = found.to_networkx()
    assert isinstance(graph, networkx.MultiDiGraph)
    assert networkx.is_directed_acyclic_graph(graph)
    assert set(graph.nodes) == set(found.node_ids)
    target = f"L2.post.{found.position}"
    assert all(networkx.has_path(graph, node, target) for node in graph)
    document = found.to_json()
    back = {
        (source, target, key): (edge["weight"], edge["reveal"], edge["heads"])
        for source, target, key, edge in graph.edges(keys=True, data=True)
    }
    assert back == {
        (e["source"], e["target"], e["kind"]): (
            e["weight"],
            e["reveal"],
            {h["head"]: h["weight"] for h in e["heads"]},
        )
        for e in document["edges"]
    }


def test_networkx_missing_is_said_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(
        LmttError, match=r"needs networkx, which is not installed; pip install 'lmtt\[graph\]'"
    ):
        route(random_trace(0)).to_networkx()


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_summary_is_safe_to_print(renormalize):
    found = route(hostile_trace(), -1, 0.07, renormalize)
    lines = [*found.summary(), repr(found)]
    assert len(lines) > 8
    assert all(line.isprintable() for line in lines)
    assert any("attention" in line for line in lines)


def test_the_summary_tells_what_the_route_holds():
    data = random_trace(5, tokens=6, parallel=(False, True, False))
    found = route(data, -1, 0.07)
    text = "\n".join(found.summary())
    attention = found.edges[found.edges["kind"] == "attention"]
    assert f"{len(found.edges)} edges ({len(attention)} of attention)" in text
    between = attention[attention["source_position"] != attention["target_position"]]
    strongest = between[np.argmax(between["weight"])]
    head = found.heads[strongest["head_start"] : strongest["head_end"]]
    assert f"{strongest['weight']:.3f}  layer {strongest['layer']}" in text
    assert f"heads {head['head'][np.argmax(head['weight'])]} (" in text
    top = int(np.argmax(found.token_shares.tokens))
    assert f'{found.token_shares.tokens[top]:.1%}  " t{top}" [{top}]' in text


def test_the_summary_lists_attention_between_tokens_only():
    pairs = np.zeros((1, 1, 2, 2), np.float32)
    pairs[0, 0, 1] = 0.1, 0.8
    pairs[0, 0, 0, 0] = 0.9
    rest = np.full((1, 2), 0.1, np.float32)
    lines = route(make_trace(pairs, residual=rest, mlp=rest), -1, 0.05).summary()
    edges = [line for line in lines if "→" in line]
    assert edges == ['  0.100  layer 0   " t0" [0] → " t1" [1]  heads 0 (0.100)']


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("a\nb\tc\x1b[0m", "a⏎b⇥c␛[0m"),
        ("\x00\x7f\x9b", "␀␡⟨U+009B⟩"),
        ("\u202eabc\u2066\u200b", "⟨U+202E⟩abc⟨U+2066⟩⟨U+200B⟩"),
        ("\ud800\ue000\u2028", "⟨U+D800⟩⟨U+E000⟩⟨U+2028⟩"),
        ("\u0301x", "◌\u0301x"),
        ("né 漢字 שלום", "né 漢字 שלום"),
        ("a\xa0b", "a b"),
    ],
)
def test_text_is_shown_as_what_it_is(text, shown):
    assert visible(text) == shown
    assert visible(text).isprintable()


def test_blanks_are_shown_where_asked():
    assert visible(" a b\xa0", spaces=True) == "·a·b⟨U+00A0⟩"
    assert token_label("") == "∅"
    assert token_label(" x" * 30, 5) == "·x·x…"
    assert quoted(" a\n") == '" a⏎"'
    assert clipped("abc", 3) == "abc"
