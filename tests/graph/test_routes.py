"""Routes are what a search from the target finds, at every threshold; each is a prefix of longer ones."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtt.errors import InputError, RunError
from lmtt.graph.routes import Route, RouteGraph, prefix, reveal, route
from lmtt.graph.testing import dense_pairs, make_trace, random_trace

TAUS = [0.0, 1 / 16, 0.07, 2 / 16, 0.15, 3 / 16, 0.25, 0.3, 0.5, 15 / 16]  # on the weights and between them
STACKS = [(False,), (True,), (False, False, False), (True, True, True), (False, True, True, False)]


def edges_of(found: Route) -> dict[tuple[str, str, str], float]:
    ids = found.node_ids
    listed = {(ids[e["source"]], ids[e["target"]], str(e["kind"])): float(e["weight"]) for e in found.edges}
    assert len(listed) == len(found.edges)
    return listed


@pytest.mark.parametrize("parallel", STACKS)
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_route_is_what_a_search_finds(brute_force, parallel, renormalize):
    sizes = set()
    for seed in range(4):
        data = random_trace(seed, parallel=parallel)
        for position, tau in itertools.product(range(len(data.tokens)), TAUS):
            with np.errstate(all="raise"):
                found = edges_of(route(data, position, tau, renormalize))
            wanted = brute_force(data, position, tau, renormalize)
            assert set(found) == set(wanted), (seed, position, tau)
            if not renormalize:
                assert found == wanted
            sizes.add(len(found))
    assert len(sizes) > 4, "the cases are too much alike to prove anything"


def test_an_edge_with_no_kept_head_is_on_no_renormalised_route(brute_force):
    """Two heads at the floor make an edge above it: the edge is kept, neither head is."""
    headless = 0
    for seed, tau in itertools.product(range(6), TAUS[2:]):
        data = random_trace(seed, floor=1 / 16)
        headless += np.count_nonzero(np.diff(data.edges.head_ptr) == 0)
        assert set(edges_of(route(data, -1, tau, True))) == set(brute_force(data, 4, tau, True))
    assert headless > 10


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.integers(1, 6),
    st.floats(0, 0.9375, width=32),
    st.booleans(),
)
def test_a_route_is_what_a_search_finds_anywhere(brute_force, seed, parallel, tokens, tau, renormalize):
    data = random_trace(seed, parallel=parallel, tokens=tokens, units=11)  # 1/11 is no float32
    found = edges_of(route(data, -1, tau, renormalize))
    assert set(found) == set(brute_force(data, tokens - 1, tau, renormalize))


@pytest.mark.parametrize("renormalize", [False, True])
def test_every_route_is_a_prefix_and_every_prefix_hangs_together(renormalize):
    for seed in range(12):
        data = random_trace(seed, tokens=6, parallel=(False, True, False, True))
        graph = RouteGraph.from_trace(data)
        revealed = reveal(graph, 5, graph.largest_head if renormalize else None)
        order = prefix(graph, revealed, 0.0)
        assert (np.diff(revealed[order]) <= 0).all()
        for tau in TAUS:
            shorter = prefix(graph, revealed, tau)
            assert np.array_equal(order[: len(shorter)], shorter)
        reached = {graph.final(5)}
        for edge in order:
            assert graph.target[edge] in reached, "an edge came before the one that it hangs on"
            reached.add(graph.source[edge])
        again = reveal(RouteGraph.from_trace(data), 5, graph.largest_head if renormalize else None)
        assert np.array_equal(again, revealed)


def test_reveal_is_the_supremum_of_the_thresholds(brute_force):
    data = random_trace(3, tokens=4, parallel=(False, True))
    found = route(data, 3, 0.0)
    ids = found.node_ids
    for edge in found.edges:
        key = (ids[edge["source"]], ids[edge["target"]], str(edge["kind"]))
        assert key not in brute_force(data, 3, float(edge["reveal"]))
        assert key in brute_force(data, 3, float(np.nextafter(edge["reveal"], np.float32(0))))


def test_a_threshold_is_compared_as_float32():
    share = np.float32(0.1)  # greater than 0.1 as a double, and equal to it as float32
    pairs = np.array([[[[0.0, 0], [share, 0]]]], np.float32)
    data = make_trace(pairs, residual=np.full((1, 2), 0.9, np.float32), mlp=np.zeros((1, 2), np.float32))
    data = dataclasses.replace(data, passthrough=np.ones((1, 2), np.float32))
    assert "attention" not in route(data, 1, 0.1).edges["kind"]
    assert "attention" in route(data, 1, float(np.nextafter(share, np.float32(0)))).edges["kind"]


def test_shares_of_what_enters_a_node_add_up_with_what_has_no_edge():
    for seed, parallel in enumerate(STACKS):
        data = random_trace(seed, parallel=parallel)
        graph = RouteGraph.from_trace(data)
        into = np.bincount(graph.target, graph.weight.astype(np.float64), graph.nodes)
        kinds = into.reshape(-1, graph.tokens)[1:].reshape(len(parallel), 4, -1)  # opaque, mid, mlp, post
        for layer, is_parallel in enumerate(parallel):
            whole = kinds[layer, 3 if is_parallel else 1]
            total = whole + data.bias[layer] + data.rest[layer]
            assert np.all((np.abs(total - 1) < 1e-6) | (total == 0))
            assert np.array_equal(kinds[layer, 0], data.opaque[layer])
            assert np.array_equal(kinds[layer, 2], data.mlp[layer])


def test_renormalised_weights_are_those_of_the_rows(brute_force):
    """Row by row in float64: drop what is not above the threshold, divide the rest by its sum."""
    heads, checked, dropped = 3, 0, 0
    for seed, tau in itertools.product(range(5), TAUS[1:6]):
        data = random_trace(seed, parallel=(False, True, False), heads=heads)
        pairs = dense_pairs(data, heads).astype(np.float64)
        with np.errstate(all="raise"):
            found = route(data, -1, tau, renormalize=True)
        for edge in found.edges:
            layer, i, j = int(edge["layer"]), int(edge["target_position"]), int(edge["source_position"])
            source, target = (found.nodes[edge[end]]["kind"] for end in ("source", "target"))
            kind, parallel = str(edge["kind"]), bool(data.parallel[layer])
            rows = [pairs[layer, :, i, : i + 1].ravel()]
            rows += [np.atleast_1d(share[layer, i]) for share in (data.residual, data.bias, data.opaque)]
            rows += [np.atleast_1d(data.mlp[layer, i])] * parallel
            if not parallel and (kind == "mlp" or (source, target) == ("mid", "post")):
                rows = [np.array([data.mlp[layer, i], data.passthrough[layer, i]])]
            parts = np.concatenate(rows)
            mine = {
                "attention": pairs[layer, :, i, j],
                "opaque": data.opaque[layer, [i]],
                "mlp": data.mlp[layer, [i]],
                "residual": (data.passthrough if source == "mid" else data.residual)[layer, [i]],
            }[kind]
            wanted = mine[mine > np.float32(tau)].sum() / parts[parts > np.float32(tau)].sum()
            assert edge["weight"] == pytest.approx(wanted, abs=1e-6)
            kept = found.heads[edge["head_start"] : edge["head_end"]]
            if kind == "attention":
                assert kept["weight"].sum() == pytest.approx(wanted, abs=1e-6)
                assert set(kept["head"]) == set(np.flatnonzero(mine > np.float32(tau)))
                dropped += len(kept) < np.count_nonzero(mine)
            checked += 1
    assert checked > 200
    assert dropped > 5


def test_renormalised_routes_are_within_the_plain_one():
    for seed in range(8):
        data = random_trace(seed)
        for tau in TAUS:
            assert set(edges_of(route(data, -1, tau, True))) <= set(edges_of(route(data, -1, tau)))


def test_heads_of_an_edge_are_the_kept_ones():
    data = random_trace(5, floor=1 / 16, tokens=8)
    pairs = dense_pairs(data, 3)
    found = route(data, -1, 1 / 16)
    attention = found.edges[found.edges["kind"] == "attention"]
    assert len(attention) > 5
    for edge in attention:
        heads = found.heads[edge["head_start"] : edge["head_end"]]
        column = pairs[edge["layer"], :, edge["target_position"], edge["source_position"]]
        assert dict(zip(heads["head"].tolist(), heads["weight"].tolist(), strict=True)) == {
            h: w for h, w in enumerate(column.tolist()) if w > 1 / 16
        }
    others = found.edges[found.edges["kind"] != "attention"]
    assert (others["head_start"] == others["head_end"]).all()


def test_nodes_carry_what_their_sum_has_lost():
    data = random_trace(5, parallel=(False, True), floor=1 / 16)
    data = dataclasses.replace(data, certificate=np.random.default_rng(0).random((2, 5)).astype(np.float32))
    found = route(data, -1, 1 / 16)
    assert {str(k) for k in found.nodes["kind"]} >= {"embed", "mid", "mlp", "post"}
    for node in found.nodes:
        whole = node["kind"] == ("post" if node["layer"] == 1 else "mid") and node["layer"] >= 0
        at = int(node["layer"]), int(node["position"])
        assert node["rest"] == (data.rest[at] if whole else 0)
        assert node["certificate"] == (data.certificate[at] if whole else 0)
    assert found.nodes["reveal"].max() == np.inf


def test_a_target_that_nothing_leads_to_is_a_route_of_one_node():
    nothing = np.zeros((1, 2), np.float32)
    data = make_trace(np.zeros((1, 1, 2, 2), np.float32), residual=nothing, mlp=nothing)
    found = route(data)
    assert found.node_ids == ["L0.post.1"]
    assert len(found.edges) == len(found.heads) == 0


def test_a_route_cannot_be_changed():
    found = route(random_trace(0), -1, 0.1)
    with pytest.raises(ValueError, match="read-only"):
        found.edges["weight"][0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.threshold = 0.2


@pytest.mark.parametrize("position", [5, -6, True, 1.0, None])
def test_positions_out_of_range_are_refused(position):
    with pytest.raises(InputError, match="position is out of range, expected -5 to 4"):
        route(random_trace(0), position)


@pytest.mark.parametrize("threshold", [1.0, -0.1, float("nan"), float("inf"), "0.1"])
def test_thresholds_out_of_range_are_refused(threshold):
    with pytest.raises(InputError, match="threshold is out of range"):
        route(random_trace(0), -1, threshold)


def test_a_threshold_below_the_floor_names_the_floor_to_trace_with():
    data = random_trace(0, floor=0.05)
    assert route(data, -1, 0.05).threshold == 0.05
    with pytest.raises(InputError, match=r"0\.05 <= threshold < 1, got 0\.01; trace with floor=0\.01"):
        route(data, -1, 0.01)


def test_negative_positions_count_from_the_end():
    data = random_trace(2)
    assert route(data, -2).position == route(data, 3).position == 3


@pytest.mark.parametrize("name", ["residual", "mlp", "passthrough", "bias", "opaque"])
def test_a_share_that_is_no_number_is_refused(name):
    data = random_trace(0)
    broken = getattr(data, name).copy()
    broken[0, 0] = np.nan
    with pytest.raises(RunError, match=name):
        route(dataclasses.replace(data, **{name: broken}))


@pytest.mark.parametrize(("name", "value"), [("source", -1), ("source", 99), ("destination", 99)])
def test_an_edge_that_points_nowhere_is_refused(name, value):
    data = random_trace(0)
    broken = getattr(data.edges, name).copy()
    broken[-1] = value
    with pytest.raises(RunError, match="do not fit"):
        route(dataclasses.replace(data, edges=dataclasses.replace(data.edges, **{name: broken})))


def test_a_hundred_thousand_edges_take_no_loop():
    random = np.random.default_rng(0)
    L, T = 24, 120
    pairs = np.tril(random.random((L, 2, T, T), np.float32)) ** 4
    residual = random.random((L, T), np.float32)
    whole = pairs.sum((1, 3)) + residual
    pairs /= whole[:, None, :, None]
    data = make_trace(pairs, residual=residual / whole, mlp=random.random((L, T), np.float32))
    assert len(data.edges.weight) > 100_000
    for renormalize in (False, True):
        start = time.process_time()  # of this process alone: no other load counts
        found = route(data, -1, 1e-4, renormalize)
        seconds = time.process_time() - start
        assert len(found.edges) > 50_000
        assert seconds < 0.5
