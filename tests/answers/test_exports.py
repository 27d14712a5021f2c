"""What other programs demand of a route: the published schema, its readers' unwritten rules, tables."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from jsonschema import Draft7Validator

from lmtt.cli import main
from lmtt.errors import InputError, LmttError
from lmtt.graph.neuronpedia import influence
from lmtt.graph.routes import Route, route
from lmtt.graph.testing import random_trace

if TYPE_CHECKING:
    from lmtt.engine import Engine

SCHEMA = json.loads((Path(__file__).parent / "attribution-graph.schema.json").read_text())


def routes() -> list[Route]:
    kinds = [(False, True, False), (False, False), (True, True, True, False)]
    return [
        route(random_trace(seed, tokens=6, parallel=kind), position, threshold=0.05, renormalize=again)
        for seed, kind in enumerate(kinds)
        for position in (-1, 2)
        for again in (False, True)
    ]


def read_rules(document: dict[str, Any]) -> None:
    """What the loaders ask for besides the schema."""
    text = json.dumps(document, allow_nan=False)
    assert 1024 <= len(text) <= 100_000_000
    for name in ("slug", "scan"):
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", document["metadata"][name])
    nodes = document["nodes"]
    names = [node["node_id"] for node in nodes]
    assert len(set(names)) == len(names)
    # Their front end identifies a node by these three and drops what repeats.
    keys = [(node["layer"], node["feature"], node["ctx_idx"]) for node in nodes]
    assert len(set(keys)) == len(keys)
    logits = [node for node in nodes if node["feature_type"] == "logit"]
    for node in logits:
        assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(
            node["token_prob"], abs=6e-4
        )
    others = [node for node in nodes if node["feature_type"] != "logit"]
    assert any(node["layer"] != "E" and int(node["layer"]) > 0 for node in others)
    assert not any("error" in node["feature_type"] for node in nodes), "these would be drawn as errors"
    ends = [(link["source"], link["target"]) for link in document["links"]]
    assert len(set(ends)) == len(ends), "one link for a pair of nodes"
    assert {name for pair in ends for name in pair} <= set(names)


@pytest.mark.parametrize("number", range(12))
def test_attribution_graph_is_valid(number: int) -> None:
    found = routes()[number]
    document = found.to_neuronpedia()
    Draft7Validator(SCHEMA).validate(document)
    read_rules(document)


def test_schema_is_not_vacuous() -> None:
    document = routes()[0].to_neuronpedia()
    del document["nodes"][0]["clerp"]
    assert list(Draft7Validator(SCHEMA).iter_errors(document))


def test_links_are_the_edges_added_up() -> None:
    """Attention i -> i beside the residual is one link of both shares; probabilities leave the target."""
    merged = 0
    for found in routes():
        document = found.to_neuronpedia()
        logits = {node["node_id"] for node in document["nodes"] if node["feature_type"] == "logit"}
        inside = [link for link in document["links"] if link["target"] not in logits]
        pairs = {(int(e["source"]), int(e["target"])) for e in found.edges}
        merged += len(found.edges) - len(pairs)
        assert len(inside) == len(pairs)
        assert sum(link["weight"] for link in inside) == pytest.approx(
            float(found.edges["weight"].sum(dtype=np.float64)), rel=1e-12
        )
        into_logits = [link for link in document["links"] if link["target"] in logits]
        assert len(into_logits) == len(logits) == 10
        layers = len(found.trace.parallel)
        assert {link["source"] for link in into_logits} == {f"{layers - 1}_3_{found.position}"}
        kept = found.trace.predictions
        p = np.exp(kept.logit[found.position].astype(np.float64) - kept.logsumexp[found.position])
        np.testing.assert_allclose([link["weight"] for link in into_logits], p, rtol=1e-6)
    assert merged > 0, "no two edges between the same nodes: the test would pass without merging"


def test_slider_keeps_a_prefix_that_hangs_together() -> None:
    """Their slider keeps influence <= t: the strongest first, nothing cut off from the target."""
    for found in routes():
        values, n = influence(found), len(found.nodes)
        assert values[np.isinf(found.nodes["reveal"])] == [values.min()] == [1 / n]
        assert values.max() == 1
        for t in np.linspace(0, 1, 21):
            kept = values <= t
            assert kept.sum() == np.floor(t * n + 1e-9)
            if 0 < kept.sum() < n:
                assert found.nodes["reveal"][kept].min() >= found.nodes["reveal"][~kept].max()
            reached = {int(np.flatnonzero(np.isinf(found.nodes["reveal"]))[0])} if kept.any() else set()
            for edge in found.edges[np.argsort(-found.edges["target"], kind="stable")]:
                if edge["target"] in reached and kept[edge["source"]]:
                    reached.add(int(edge["source"]))
            assert len(reached) == kept.sum()


def test_hostile_tokens() -> None:
    """Quotation marks and "(p=" in a token must not end up where readers cut the label."""
    data = random_trace(0, tokens=5)
    names = dict(data.meta["prediction_tokens"]) | {"0": '" (p=0.5) "', "1": "\x1b[2J\u202e", "2": "\ud800"}
    data = replace(
        data, tokens=("\n", '"', "\u202e", "", "\ud800"), meta={**data.meta, "prediction_tokens": names}
    )
    document = route(data, threshold=0.05).to_neuronpedia()
    for node in document["nodes"]:
        if node["feature_type"] == "logit":
            assert node["clerp"].count("(p=") == 1
            assert node["clerp"].count('"') == 2
            assert node["clerp"].isprintable()


def test_names_and_files(tmp_path: Path) -> None:
    found = routes()[0]
    again = routes()[0].to_neuronpedia()
    assert found.to_neuronpedia() == again, "the same route must give the same graph"
    document = found.to_neuronpedia(tmp_path / "g.json", slug="my-graph_1.0", scan="gpt2-small")
    assert json.loads((tmp_path / "g.json").read_text()) == document
    assert document["metadata"]["slug"] == "my-graph_1.0"
    for bad in ("", "a b", "a/b", "é", "a\n"):
        with pytest.raises(InputError, match="slug"):
            found.to_neuronpedia(slug=bad)
        with pytest.raises(InputError, match="scan"):
            found.to_neuronpedia(scan=bad)
    with pytest.raises(InputError, match="layer"):
        route(random_trace(0, parallel=(False,)), threshold=0.05).to_neuronpedia()
    with pytest.raises(InputError, match="cannot write"):
        found.to_neuronpedia(tmp_path / "missing" / "g.json")


def graph_models() -> Any:
    """circuit-tracer's own pydantic models, read from its files: nothing else of it is imported."""
    try:
        files = importlib.metadata.files("circuit-tracer") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("circuit-tracer is not installed (pip install --no-deps circuit-tracer)")
    path = next(f for f in files if f.name == "graph_models.py").locate()
    spec = importlib.util.spec_from_file_location("circuit_tracer_graph_models", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks annotations up by module name
    spec.loader.exec_module(module)
    return module


def test_circuit_tracer_reads_it(tmp_path: Path) -> None:
    models = graph_models()
    for number, found in enumerate(routes()):
        path = tmp_path / f"{number}.json"
        document = found.to_neuronpedia(path)
        read = models.Model.model_validate_json(path.read_text())
        assert len(read.nodes) == len(document["nodes"])
        assert [node.influence for node in read.nodes] == [n.get("influence") for n in document["nodes"]]
        assert sum(node.is_target_logit for node in read.nodes) == 1


# --- tables ---


def test_csv_holds_every_edge(tmp_path: Path) -> None:
    data = random_trace(1, tokens=5)
    data = replace(data, tokens=(",", '"', "a\nb", "é", " x"))
    found = route(data, threshold=0.05)
    found.to_csv(tmp_path / "edges.csv")
    with (tmp_path / "edges.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.edges)
    for row, edge in zip(rows, found.edges, strict=True):
        assert np.float32(row["weight"]) == edge["weight"]
        assert np.float32(row["reveal"]) == edge["reveal"]
        assert row["source"] == found.node_ids[edge["source"]]
        assert row["source_token"] == data.tokens[edge["source_position"]]
        heads = [float(pair.split(":")[1]) for pair in row["heads"].split()]
        assert heads == sorted(heads, reverse=True)
        assert bool(heads) == (edge["head_end"] > edge["head_start"])


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_data_frame(library: str) -> None:
    module = pytest.importorskip(library)
    found = routes()[0]
    frame = getattr(found, f"to_{library}")()
    assert isinstance(frame, module.DataFrame)
    assert frame.shape == (len(found.edges), 11)
    np.testing.assert_array_equal(np.asarray(frame["weight"], np.float32), found.edges["weight"])


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_data_frame_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(LmttError, match=f"pip install {library}") as caught:
        getattr(routes()[0], f"to_{library}")()
    assert len(str(caught.value).splitlines()) == 1


# --- the command line ---


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[], str]:
    from lmtt.trace import Trace

    def write() -> str:
        Trace(random_trace(0, tokens=6)).save(tmp_path / "run")
        return str(tmp_path / "run")

    return write


def test_show_writes_both(
    stored: Callable[[], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, table, graph = stored(), str(tmp_path / "e.csv"), str(tmp_path / "g.json")
    assert main(["show", run, "--threshold", "0.05", "--csv", table, "--neuronpedia", graph]) == 0
    out = capsys.readouterr().out
    assert table in out
    assert graph in out
    document = json.loads(Path(graph).read_text())
    Draft7Validator(SCHEMA).validate(document)
    assert Path(table).read_text().startswith("source,target,kind,layer,")
    for option in ("--csv", "--neuronpedia"):
        assert main(["show", run, option, str(tmp_path / "missing" / "file")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.model
def test_real_model(demo_engine: Engine) -> None:
    found = demo_engine.trace("The capital of France is").route()
    document = found.to_neuronpedia()
    Draft7Validator(SCHEMA).validate(document)
    read_rules(document)
    assert document["metadata"]["prompt"] == "The capital of France is"
    best = next(node for node in document["nodes"] if node.get("is_target_logit"))
    assert "Paris" in best["clerp"]
