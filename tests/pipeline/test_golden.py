"""The published LM Transparency Tool's own numbers for a real model, on three prompts (../golden/README.md).

Arrays through the Python API without screening, routes through `lmtt trace --json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from lmtt.engine import Engine
    from lmtt.trace import Trace

pytestmark = pytest.mark.model

PROMPTS = ("capital", "ioi", "induction")
SHARE = 5e-4  # the peer works in float32 with a difference of two norms, clipped at 1e-5 absolute
NEURON_RESIDUAL = 1e-3
LOGIT = 1e-4
TAU = 0.04


class Golden:
    """One prompt's numbers, and our trace of the same tokens with everything exact."""

    def __init__(self, name: str, folder: Path, engine: Engine) -> None:
        self.arrays = np.load(folder / f"{name}.npz")
        self.routes: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        self.trace: Trace = engine.trace(input_ids=self.arrays["input_ids"], floor=0, screen=0)
        self.T = len(self.arrays["input_ids"])


@pytest.fixture(scope="module", params=PROMPTS)
def golden(request: pytest.FixtureRequest, golden_folder: Path, demo_engine: Engine) -> Golden:
    return Golden(request.param, golden_folder, demo_engine)


def assert_close(got: np.ndarray, want: np.ndarray, bound: float) -> None:
    assert got.shape == want.shape
    worst = np.abs(got.astype(np.float64) - want).max()
    assert worst <= bound, f"differs by {worst:.2e}, allowed {bound:.0e}"


def merged_edges(trace: Trace) -> np.ndarray:
    """[L, T, T] with the residual added on the diagonal, as the peer has it."""
    edges = np.stack([trace.attention(layer) for layer in range(trace.n_layers)])
    edges[:, np.arange(edges.shape[1]), np.arange(edges.shape[1])] += trace.residual
    return edges


def test_attention_edges(golden: Golden) -> None:
    assert_close(merged_edges(golden.trace), golden.arrays["attention_edges"], SHARE)


def test_mlp_edges(golden: Golden) -> None:
    """Where neither part is close to the sum both are 0; the peer clips at 1e-5, which makes them 0.5."""
    nothing = (golden.trace.mlp == 0) & (golden.trace.data.passthrough == 0)
    assert nothing.sum() <= 1
    assert_close(np.where(nothing, 0.5, golden.trace.mlp), golden.arrays["ffn_edges"], SHARE)


@pytest.mark.parametrize("layer", [0, 7, 15, 29])
def test_heads(golden: Golden, layer: int) -> None:
    maps = np.stack([golden.trace.contribution_map(layer, head) for head in range(9)], axis=-1)
    assert_close(maps, golden.arrays[f"heads_layer{layer}"], SHARE)
    one = golden.trace.heads(layer, source=0, destination=golden.T - 1)
    assert_close(one, golden.arrays[f"heads_layer{layer}"][-1, 0], SHARE)


@pytest.mark.parametrize("layer", [3, 20, 29])
def test_neurons(golden: Golden, layer: int) -> None:
    want = golden.arrays[f"neurons_layer{layer}"]
    got = np.zeros_like(want)
    for neuron, contribution, _ in golden.trace.neurons(layer, -1, k=len(want)):
        got[neuron] = contribution
    assert_close(got, want, SHARE)
    residual = 1 - got.sum()  # this model has no MLP bias: the stream is the one other part
    assert abs(residual - float(golden.arrays[f"neurons_layer{layer}_resid"])) <= NEURON_RESIDUAL


def test_logits(golden: Golden) -> None:
    want = golden.arrays["logits_last"]
    got = np.zeros_like(want)
    for _, index, logit, _ in golden.trace.lens(golden.trace.n_layers - 1, -1, k=len(want)):
        got[index] = logit
    assert_close(got, want, LOGIT)
    assert golden.trace.next_tokens(k=1)[0].id == int(want.argmax())


# --- routes, through the JSON of the command line ---


def node_name(node: str) -> str:
    """Our names in the peer's: embed.7 -> X0_7, L3.mid.7 -> A3_7, L3.mlp.7 -> M3_7, L3.post.7 -> I3_7."""
    layer, *rest = node.split(".")
    if layer == "embed":
        return f"X0_{rest[0]}"
    kind = {"mid": "A", "mlp": "M", "post": "I"}[rest[0]]
    return f"{kind}{layer[1:]}_{rest[1]}"


def pairs_of(route: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(from, to) -> weight, parallel edges added, in the peer's node names."""
    pairs: dict[tuple[str, str], float] = {}
    for edge in route["edges"]:
        pair = node_name(edge["source"]), node_name(edge["target"])
        pairs[pair] = pairs.get(pair, 0.0) + edge["weight"]
    return pairs


def cli_route(trace: Trace, folder: Path, *options: str) -> dict[str, Any]:
    """The route that `lmtt show --json` prints of the stored trace."""
    from lmtt.cli import main

    run, out = folder / "run.lmtt", folder / "route.json"
    if not run.exists():
        trace.save(run)
    assert main(["show", str(run), "--json", str(out), "--threshold", str(TAU), *options]) == 0
    route: dict[str, Any] = json.loads(out.read_text())
    assert route["schema"] == "lmtt.route/1"
    return route


def brute_force_reveal(trace: Trace, start: int) -> dict[tuple[str, str], float]:
    """Reveal threshold of every (from, to) pair with the peer's merging, from the definition."""
    edges = merged_edges(trace)
    T, L = edges.shape[1], edges.shape[0]
    reveal: dict[tuple[str, str], float] = {}
    post = {start: np.inf}
    for layer in reversed(range(L)):
        mid: dict[int, float] = {}
        for p, r in post.items():
            mlp = min(r, float(trace.mlp[layer, p]))
            stay = min(r, 1 - float(trace.mlp[layer, p]))
            reveal[f"M{layer}_{p}", f"I{layer}_{p}"] = mlp
            reveal[f"A{layer}_{p}", f"M{layer}_{p}"] = min(mlp, float(trace.mlp[layer, p]))
            reveal[f"A{layer}_{p}", f"I{layer}_{p}"] = stay
            mid[p] = max(mid.get(p, 0.0), mlp, stay)
        post = {}
        for p, r in mid.items():
            for j in range(T):
                weight = min(r, float(edges[layer, p, j]))
                if weight > 0:
                    name = f"X0_{j}" if layer == 0 else f"I{layer - 1}_{j}"
                    reveal[name, f"A{layer}_{p}"] = weight
                    post[j] = max(post.get(j, 0.0), weight)
    return reveal


def test_routes(golden: Golden, tmp_path: Path) -> None:
    """Edge for edge, but for edges whose reveal threshold is as close to τ as the peer's rounding."""
    edges = merged_edges(golden.trace)
    for start, path in golden.routes["paths"].items():
        want = {(a, b): weight for a, b, weight in path}
        got = pairs_of(cli_route(golden.trace, tmp_path, "--position", start))
        reveal = brute_force_reveal(golden.trace, int(start))
        for pair in set(want) ^ set(got):
            # The peer merges the residual with the i -> i attention edge: such a pair may be there or not
            # by the merged weight alone, which is the reveal computed here.
            assert abs(reveal.get(pair, 0.0) - TAU) <= SHARE, (
                f"{pair} is on one side only: {reveal.get(pair)}"
            )
        for pair, weight in want.items():
            source, target = pair
            if target[0] == "A" and source.split("_")[1] == target.split("_")[1]:
                layer, p = (int(x) for x in target[1:].split("_"))
                assert abs(edges[layer, p, p] - weight) <= SHARE
            elif pair in got:
                assert abs(got[pair] - weight) <= SHARE, pair


def test_renormalised_route(golden: Golden, tmp_path: Path) -> None:
    """The set of edges, and the weights into A nodes; the peer's MLP weights carry a known defect."""
    want = {(a, b): weight for a, b, weight in golden.routes["renormalised_last"]}
    got = pairs_of(cli_route(golden.trace, tmp_path, "--renormalize"))
    missing = set(want) ^ set(got)
    heads = np.stack(
        [golden.trace.exact(layer, range(golden.T)).pairs.max(1) for layer in range(golden.trace.n_layers)]
    )
    for source, target in missing:
        layer, p = (int(x) for x in target[1:].split("_"))
        j = int(source.split("_")[1])
        assert target[0] == "A", (source, target)
        assert abs(heads[layer, p, j] - TAU) <= SHARE, (source, target, heads[layer, p, j])
    for (source, target), weight in want.items():
        if target[0] == "A" and (source, target) in got:
            assert abs(got[source, target] - weight) <= SHARE, (source, target)


def test_the_trace_command_itself(golden_folder: Path, tmp_path: Path) -> None:
    """`lmtt trace --json` on the prompt as text, with its default floor, is the same route."""
    from lmtt.cli import main

    out = tmp_path / "route.json"
    assert main(["trace", "--prompt", "The capital of France is", "--json", str(out), "--device", "cpu"]) == 0
    route = json.loads(out.read_text())
    golden = json.loads((golden_folder / "capital.json").read_text())
    assert route["input_ids"] == golden["input_ids"]
    want = {(a, b): weight for a, b, weight in golden["paths"]["4"]}
    assert set(pairs_of(route)) <= set(want), (
        "an attention edge i -> i under the threshold may be missing, no more"
    )
    missing = set(want) - set(pairs_of(route))
    assert all(a.split("_")[1] == b.split("_")[1] for a, b in missing)
    assert route["predictions"][0]["token"] == " Paris"
