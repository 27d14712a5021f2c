"""The route graph and the routes in it (Ferrando & Voita 2024, *Information Flow Routes*).

1. `RouteGraph.from_trace`: every share of a trace becomes an edge between two integers.
2. `reveal`: one pass from the target down gives each edge the threshold at which it appears,
       reveal(target) = inf,  reveal(node) = max over the edges that leave it,
       reveal(edge) = min(weight, reveal(its destination)).
3. `prefix`: the route at a threshold τ is the edges with reveal > τ; in reveal order, every route is a prefix
   of every longer one, and every prefix hangs together.
4. `renormalised_weights`: for the variant that first drops every part of a sum that is not above τ. Its edges
   follow the same rule with an attention edge weighed by its largest single (head, source) share; its
   weights depend on τ.

Only min, max and > are used on weights, all in float32, so nothing rounds.

Nodes are `block * T + position`. Block 0 is the embeddings; layer l has the blocks `1 + 4l + slot`, in which
the slots opaque, mid, mlp, post follow the stream. Along every edge the block rises. Edges are stored by
rising block of their destination (an edge's id is its place), and reveal walks the blocks downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmtt.errors import InputError, RunError
from lmtt.run.data import F32, I64, TraceData

F64 = NDArray[np.float64]

if TYPE_CHECKING:
    from lmtt.graph.rollout import TokenShares

ATTENTION, RESIDUAL, MLP, OPAQUE_PART = range(4)  # kinds of edges
EDGE_KINDS = np.array(["attention", "residual", "mlp", "opaque"])
OPAQUE, MID, MLP_BLOCK, POST = range(4)  # slots of a layer, in the order of the stream
NODE_KINDS = np.array(["opaque", "mid", "mlp", "post"])
SLOTS = 4

NODE = np.dtype(
    [
        ("kind", "U6"),  # embed, mid, mlp, post or opaque
        ("layer", np.int32),  # -1 for the embeddings
        ("position", np.int32),
        ("reveal", np.float32),  # the largest reveal of the edges that leave it; inf for the target
        ("rest", np.float32),  # share of the attention edges into this node that the trace did not keep
        ("certificate", np.float32),  # no share into this node is further than this from its exact value
    ]
)
EDGE = np.dtype(
    [
        ("source", np.int32),  # row of `nodes`
        ("target", np.int32),  # row of `nodes`
        ("kind", "U9"),  # attention, residual, mlp or opaque
        ("layer", np.int32),  # of the target
        ("source_position", np.int32),
        ("target_position", np.int32),
        ("weight", np.float32),  # share of the target's whole (mlp, opaque: of what their block is added to)
        ("reveal", np.float32),  # on the route at every threshold below this
        ("head_start", np.int64),  # its heads are heads[head_start:head_end]; none but for attention
        ("head_end", np.int64),
    ]
)
HEAD = np.dtype([("head", np.int32), ("weight", np.float32)])


@dataclass(frozen=True, eq=False)
class RouteGraph:
    """Every edge of a trace with a positive share, in rising order of its destination's block.

    Sequential layer: pre → mid (attention, residual), mid → mlp → post (mlp), mid → post (residual).
    Parallel layer: pre → post (attention, residual), pre → mlp → post (mlp). What was not taken apart:
    pre → opaque → whole of the attention's sum. Both edges through an mlp or opaque node carry its share.
    """

    data: TraceData
    source: I64  # [E] node
    target: I64  # [E] node
    kind: NDArray[np.uint8]  # [E], index into EDGE_KINDS
    weight: F32  # [E]
    largest_head: F32  # [E]: largest single (head, source) share of an attention edge, else the weight
    kept_edge: I64  # [E]: attention edge's row in `data.edges`, else -1
    sum_ptr: I64  # [S + 1]: edges sum_ptr[s]:sum_ptr[s+1] have one destination block; S rises with it

    @classmethod
    def from_trace(cls, data: TraceData) -> RouteGraph:
        """The graph of a trace. Raises RunError if the trace's numbers cannot be a trace's."""
        _check(data)
        T, kept = len(data.tokens), data.edges
        largest = _largest_heads(data)
        everywhere = np.arange(T, dtype=np.int64)
        none = np.full(T, -1, np.int64)
        parts: list[tuple[I64, I64, int, F32, F32, I64]] = []
        sizes: list[int] = []

        def add(*runs: tuple[I64, I64, int, F32, F32, I64]) -> None:
            """One sum's edges, of those with a positive share."""
            size = 0
            for source, target, kind, weight, head, row in runs:
                there = weight > 0
                parts.append((source[there], target[there], kind, weight[there], head[there], row[there]))
                size += int(np.count_nonzero(there))
            sizes.append(size)

        def rows(
            source: np.int64, target: np.int64, kind: int, weight: F32
        ) -> tuple[I64, I64, int, F32, F32, I64]:
            """One edge at every position."""
            return source + everywhere, target + everywhere, kind, weight, weight, none

        pre = np.int64(0)
        for layer in range(len(data.parallel)):
            opaque, mid, mlp, post = ((1 + SLOTS * layer + slot) * np.int64(T) for slot in range(SLOTS))
            span = slice(int(kept.layer_ptr[layer]), int(kept.layer_ptr[layer + 1]))
            whole = post if data.parallel[layer] else mid
            into_whole = [
                (
                    pre + kept.source[span],
                    whole + kept.destination[span],
                    ATTENTION,
                    kept.weight[span],
                    largest[span],
                    np.arange(span.start, span.stop, dtype=np.int64),
                ),
                rows(pre, whole, RESIDUAL, data.residual[layer]),
                rows(opaque, whole, OPAQUE_PART, data.opaque[layer]),
            ]
            mlp_share = data.mlp[layer]
            add(rows(pre, opaque, OPAQUE_PART, data.opaque[layer]))
            if data.parallel[layer]:
                add(rows(pre, mlp, MLP, mlp_share))
                add(*into_whole, rows(mlp, post, MLP, mlp_share))
            else:
                add(*into_whole)
                add(rows(mid, mlp, MLP, mlp_share))
                add(rows(mid, post, RESIDUAL, data.passthrough[layer]), rows(mlp, post, MLP, mlp_share))
            pre = post

        source, target, kinds, weight, head, row = zip(*parts, strict=True)
        return cls(
            data=data,
            source=np.concatenate(source),
            target=np.concatenate(target),
            kind=np.repeat(np.array(kinds, np.uint8), [len(s) for s in source]),
            weight=np.concatenate(weight),
            largest_head=np.concatenate(head),
            kept_edge=np.concatenate(row),
            sum_ptr=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        )

    @property
    def tokens(self) -> int:
        """T"""
        return len(self.data.tokens)

    @property
    def layers(self) -> int:
        """L"""
        return len(self.data.parallel)

    @property
    def nodes(self) -> int:
        """Size of the node numbering; not every number is a node that an edge reaches."""
        return (1 + SLOTS * self.layers) * self.tokens

    def final(self, position: int) -> int:
        """The last layer's post node of a position: what a route starts from."""
        return self.nodes - self.tokens + position

    @cached_property
    def depth(self) -> I64:
        """[E]: how many blocks below the final one an edge's destination is; falls along every edge."""
        return SLOTS * self.layers - self.target // self.tokens

    @cached_property
    def layer(self) -> I64:
        """[E]: layer of an edge's destination."""
        return (self.target // self.tokens - 1) // SLOTS


def reveal(graph: RouteGraph, position: int, weight: F32 | None = None) -> F32:
    """[E]: the supremum of the thresholds at which each edge is on the route to `position`; 0 if never.

    `weight` takes the place of the edges' own (the renormalised variant passes `largest_head`).
    """
    weight = graph.weight if weight is None else weight
    node = np.zeros(graph.nodes, np.float32)
    node[graph.final(position)] = np.inf
    edge = np.zeros(len(weight), np.float32)
    # Blocks rise along every edge: when a sum's turn comes from above, all that leaves its whole is done.
    for first, last in zip(graph.sum_ptr[-2::-1], graph.sum_ptr[:0:-1], strict=True):
        np.minimum(weight[first:last], node[graph.target[first:last]], out=edge[first:last])
        np.maximum.at(node, graph.source[first:last], edge[first:last])
    return edge


def prefix(graph: RouteGraph, revealed: F32, threshold: float) -> I64:
    """Ids of the edges with reveal > threshold: reveal falling, then depth rising, then id rising.

    With depth as the second key an edge always comes after one that leaves its destination, ties included,
    so that the first n edges hang together for every n.
    """
    found = np.flatnonzero(revealed > np.float32(threshold))
    return found[np.lexsort((graph.depth[found], -revealed[found]))]


def renormalised_weights(graph: RouteGraph, threshold: float) -> tuple[F32, F32]:
    """Weights after dropping every part of a sum that is not above the threshold: ([E], [M] of the heads).

    The parts are those of each row: every (head, source) pair, the residual, the bias, what was not taken
    apart; in the second sum of a sequential layer, the MLP and resid_mid. Dropped parts weigh 0.
    """
    data, tau = graph.data, np.float32(threshold)
    kept, (L, T) = data.edges, data.residual.shape

    def above(share: F32) -> F64:
        return np.where(share > tau, share, 0).astype(np.float64)

    head = above(kept.head_weight)
    counts = np.diff(kept.head_ptr)
    attention = _sums(np.repeat(np.arange(len(counts)), counts), head, len(counts))
    row = np.repeat(np.arange(L), np.diff(kept.layer_ptr)) * T + kept.destination
    mlp = above(data.mlp)
    first_sum = _sums(row, attention, L * T).reshape(L, T)
    first_sum += above(data.residual) + above(data.bias) + above(data.opaque)
    first_sum[data.parallel] += mlp[data.parallel]
    second_sum = mlp + above(data.passthrough)

    in_second_sum = (graph.kind == MLP) & ~data.parallel[graph.layer]
    in_second_sum |= (graph.kind == RESIDUAL) & _leaves(graph, MID)
    share = above(graph.weight)
    is_attention = graph.kept_edge >= 0
    share[is_attention] = attention[graph.kept_edge[is_attention]]
    at = graph.layer, graph.target % T
    whole = np.where(in_second_sum, second_sum[at], first_sum[at])
    # A whole of 0 has no part above the threshold, hence nothing to divide.
    weight = np.divide(share, whole, out=np.zeros_like(share), where=whole > 0)
    head_whole = np.repeat(first_sum.reshape(-1)[row], counts)
    head = np.divide(head, head_whole, out=np.zeros_like(head), where=head_whole > 0)
    return weight.astype(np.float32), head.astype(np.float32)


def route(data: TraceData, position: int = -1, threshold: float = 0.04, renormalize: bool = False) -> Route:
    """The route to a position's final state: the edges above `threshold` that lead there.

    Parameters
    ----------
    position : int, from -T to T - 1
        Negative positions count from the end.
    threshold : float, from the trace's floor to 1 (1 excluded)
        An edge is kept if its share is strictly greater; both are compared as float32.
    renormalize : bool
        First drop every part that is not above the threshold and renormalise the rest of each row.

    Raises InputError for a position or threshold out of range.
    """
    position = _position(data, position)
    threshold = _threshold(data, threshold)
    graph = RouteGraph.from_trace(data)
    revealed = reveal(graph, position, graph.largest_head if renormalize else None)
    ids = prefix(graph, revealed, threshold)
    weight, head_weight = graph.weight, data.edges.head_weight
    if renormalize:
        weight, head_weight = renormalised_weights(graph, threshold)
    nodes, source, target = _route_nodes(graph, ids, revealed, position)
    heads, head_ptr = _route_heads(graph, ids, head_weight)

    edges = np.empty(len(ids), EDGE)
    edges["source"], edges["target"] = source, target
    edges["kind"] = EDGE_KINDS[graph.kind[ids]]
    edges["layer"] = graph.layer[ids]
    edges["source_position"] = graph.source[ids] % graph.tokens
    edges["target_position"] = graph.target[ids] % graph.tokens
    edges["weight"], edges["reveal"] = weight[ids], revealed[ids]
    edges["head_start"], edges["head_end"] = head_ptr[:-1], head_ptr[1:]
    return Route(data, position, threshold, renormalize, _frozen(nodes), _frozen(edges), _frozen(heads))


@dataclass(frozen=True, eq=False)
class Route:
    """The edges by which information reached one position, strongest reveal first. Arrays are read-only.

    `nodes`, `edges` and `heads` are structured arrays of the dtypes NODE, EDGE and HEAD: columns are
    `route.edges["weight"]`, rows `route.edges[0]`, and an edge's ends `route.nodes[route.edges["source"]]`.
    """

    trace: TraceData
    position: int
    threshold: float
    renormalized: bool
    nodes: NDArray[np.void]  # NODE, in the order of the stream
    edges: NDArray[np.void]  # EDGE: reveal falling, then depth below the target rising
    heads: NDArray[np.void]  # HEAD

    @cached_property
    def node_ids(self) -> list[str]:
        """A name for each node: `embed.7`, `L3.mid.7`, `L3.mlp.7`, `L3.post.7`, `L3.opaque.7`."""
        kinds, layers, positions = (self.nodes[name].tolist() for name in ("kind", "layer", "position"))
        return [
            f"embed.{p}" if kind == "embed" else f"L{layer}.{kind}.{p}"
            for kind, layer, p in zip(kinds, layers, positions, strict=True)
        ]

    @cached_property
    def token_shares(self) -> TokenShares:
        """How much of the target each token accounts for, over all kept edges (see `lmtt.graph.rollout`)."""
        from lmtt.graph.rollout import rollout

        return rollout(self.trace, self.position)

    def to_json(self, path: str | PathLike[str] | None = None) -> dict[str, Any]:
        """The route as `lmtt.route/1` (see `lmtt.graph.export`); written to `path` too if one is given."""
        from lmtt.graph.export import route_json, write_json

        document = route_json(self)
        if path is not None:
            write_json(path, document)
        return document

    def to_networkx(self) -> Any:
        """A `networkx.MultiDiGraph` whose parallel edges are told apart by their kind."""
        from lmtt.graph.export import route_networkx

        return route_networkx(self)

    def to_neuronpedia(
        self, path: str | PathLike[str] | None = None, slug: str | None = None, scan: str | None = None
    ) -> dict[str, Any]:
        """The route as a graph for circuit-tracer and Neuronpedia; written to `path` too if one is given.

        slug and scan name graph and model there (A-Z a-z 0-9 _ . - only); see `lmtt.graph.neuronpedia`.
        """
        from lmtt.graph.export import write_json
        from lmtt.graph.neuronpedia import route_neuronpedia

        document = route_neuronpedia(self, slug, scan)
        if path is not None:
            write_json(path, document)
        return document

    def to_pandas(self) -> Any:
        """The edges as a `pandas.DataFrame` (columns in `lmtt.graph.tables`)."""
        from lmtt.graph.tables import route_pandas

        return route_pandas(self)

    def to_polars(self) -> Any:
        """The edges as a `polars.DataFrame` (columns in `lmtt.graph.tables`)."""
        from lmtt.graph.tables import route_polars

        return route_polars(self)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the edges as CSV with a header (columns in `lmtt.graph.tables`)."""
        from lmtt.graph.export import write_text
        from lmtt.graph.tables import route_csv

        write_text(path, route_csv(self))

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the route as one self-contained page that asks no server for anything."""
        from lmtt.graph.export import write_text
        from lmtt.viz.page import route_page

        write_text(path, route_page(self))

    def summary(self, by: str = "token") -> list[str]:
        """What a terminal shows: lines of plain text, safe to print whatever the prompt holds.

        by: list the shares of each token, word, sentence or (chat) turn.
        """
        from lmtt.graph.summary import route_summary

        return route_summary(self, by)

    def __repr__(self) -> str:
        from lmtt.graph.text import quoted

        kinds = np.count_nonzero(self.edges["kind"] == "attention")
        renormalized = ", renormalized" if self.renormalized else ""
        return (
            f"Route(to {quoted(self.trace.tokens[self.position])} at {self.position}, "
            f"threshold {self.threshold:g}{renormalized}: {len(self.edges)} edges, {kinds} of attention)"
        )

    def _repr_html_(self) -> str:
        import html

        from lmtt.viz.page import route_page

        # In a frame of its own the page's styles cannot reach the notebook, nor its script the kernel.
        page = html.escape(route_page(self))
        return (
            '<iframe sandbox="allow-scripts allow-downloads" width="100%" height="820" '
            f'style="border:0" title="route" srcdoc="{page}"></iframe>'
        )


# --- arguments and checks ---


def _position(data: TraceData, position: int) -> int:
    T = len(data.tokens)
    if isinstance(position, bool) or not isinstance(position, (int, np.integer)) or not -T <= position < T:
        raise InputError("position is out of range", expected=f"{-T} to {T - 1}", got=position)
    return int(position) % T


def _threshold(data: TraceData, threshold: float) -> float:
    floor = float(data.meta["floor"])
    if not isinstance(threshold, (int, float, np.number)) or not 0 <= threshold < 1:
        raise InputError("threshold is out of range", expected=f"{floor:g} <= threshold < 1", got=threshold)
    if threshold < floor:
        raise InputError(
            "threshold is below the floor that the trace keeps edges above",
            expected=f"{floor:g} <= threshold < 1",
            got=threshold,
            remedy=f"trace with floor={threshold:g}",
        )
    return float(threshold)


def _check(data: TraceData) -> None:
    """Numbers from a file may be anything; a NaN would cut routes silently, an index point anywhere."""
    kept, (L, T) = data.edges, data.residual.shape
    shares = {name: getattr(data, name) for name in ("residual", "mlp", "passthrough", "bias", "opaque")} | {
        "edges.weight": kept.weight,
        "edges.head_weight": kept.head_weight,
    }
    for name, share in shares.items():
        if not np.isfinite(share).all():
            raise RunError(f"the trace's {name} holds values that are not finite", expected="shares")
    within = (
        len(data.tokens) == T
        and len(data.parallel) == L
        and _points_into(kept.layer_ptr, L, len(kept.weight))
        and _points_into(kept.head_ptr, len(kept.weight), len(kept.head_weight))
        and bool(((kept.source >= 0) & (kept.source <= kept.destination) & (kept.destination < T)).all())
    )
    if not within:
        raise RunError(
            "the trace's edges do not fit its tokens and layers", expected=f"{L} layers, {T} tokens"
        )


def _points_into(pointers: I64, rows: int, size: int) -> bool:
    return (
        len(pointers) == rows + 1
        and pointers[0] == 0
        and pointers[-1] == size
        and bool((np.diff(pointers) >= 0).all())
    )


# --- pieces ---


def _largest_heads(data: TraceData) -> F32:
    """[N]: the largest head of each kept edge, 0 for an edge none of whose heads is kept."""
    kept = data.edges
    largest = np.zeros(len(kept.weight), np.float32)
    some = np.diff(kept.head_ptr) > 0
    if some.any():
        # Edges without heads have no place in reduceat: it would hand them the next edge's first head.
        largest[some] = np.maximum.reduceat(kept.head_weight, kept.head_ptr[:-1][some])
    return largest


def _sums(group: NDArray[np.integer[Any]], values: F64, size: int) -> F64:
    """[size]: the sum of the values of each group."""
    sums: F64 = np.bincount(group, values, size).astype(np.float64, copy=False)
    return sums


def _leaves(graph: RouteGraph, slot: int) -> NDArray[np.bool_]:
    """[E]: the edge's source is in this slot of a layer."""
    block = graph.source // graph.tokens
    leaves: NDArray[np.bool_] = (block > 0) & ((block - 1) % SLOTS == slot)
    return leaves


def _route_nodes(
    graph: RouteGraph, ids: I64, revealed: F32, position: int
) -> tuple[NDArray[np.void], I64, I64]:
    """The nodes of some edges and of the target, and each edge's ends as rows of them."""
    final = graph.final(position)
    numbers, rows = np.unique(
        np.concatenate([graph.source[ids], graph.target[ids], [final]]), return_inverse=True
    )
    source, target = rows[: len(ids)], rows[len(ids) : -1]
    block, at = numbers // graph.tokens, numbers % graph.tokens
    layer, slot = (block - 1) // SLOTS, (block - 1) % SLOTS
    nodes = np.zeros(len(numbers), NODE)
    nodes["kind"] = np.where(block == 0, "embed", NODE_KINDS[slot])
    nodes["layer"], nodes["position"] = np.where(block == 0, -1, layer), at
    np.maximum.at(nodes["reveal"], source, revealed[ids])
    nodes["reveal"][numbers == final] = np.inf
    # Only the attention's sum loses edges and carries a bound; every other share is complete and exact.
    whole = (block > 0) & (slot == np.where(graph.data.parallel[layer], POST, MID))
    for name in ("rest", "certificate"):
        nodes[name][whole] = getattr(graph.data, name)[layer[whole], at[whole]]
    return nodes, source, target


def _route_heads(graph: RouteGraph, ids: I64, weight: F32) -> tuple[NDArray[np.void], I64]:
    """Heads of some edges, one edge after the other, and the pointers into them: [n + 1].

    `weight` [M] holds the heads' shares; a head that weighs 0, as one that was dropped, is left out.
    """
    kept, row = graph.data.edges, graph.kept_edge[ids]
    first = kept.head_ptr[np.maximum(row, 0)]
    counts = (
        np.where(row >= 0, kept.head_ptr[np.maximum(row, 0) + 1] - first, 0) if len(kept.weight) else row * 0
    )
    edge = np.repeat(np.arange(len(ids)), counts)
    begins = np.concatenate([[0], np.cumsum(counts)])
    at = np.arange(begins[-1]) - begins[edge] + first[edge]
    edge, at = edge[weight[at] > 0], at[weight[at] > 0]
    heads = np.empty(len(at), HEAD)
    heads["head"], heads["weight"] = kept.head[at], weight[at]
    return heads, np.concatenate([[0], np.cumsum(np.bincount(edge, minlength=len(ids)))])


def _frozen(array: NDArray[np.void]) -> NDArray[np.void]:
    array.flags.writeable = False
    return array
