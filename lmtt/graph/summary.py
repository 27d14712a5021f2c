"""A route in words: what was predicted, which tokens it came from, which attention edges carried most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmtt.graph.export import edge_heads, predictions
from lmtt.graph.text import clipped, quoted, visible
from lmtt.spans import spans_of, summed

if TYPE_CHECKING:
    from lmtt.graph.routes import Route

LISTED = 6  # how many tokens and edges are worth a line
HEADS = 3
PROMPT_WIDTH = 84


def not_taken_apart(sublayers: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each kind of sublayer that is one part (`Trace.whole_sublayers`), with its first reason."""
    lines = []
    for kind, sublayer in dict.fromkeys((s["kind"], s["sublayer"]) for s in sublayers):
        alike = [s for s in sublayers if (s["kind"], s["sublayer"]) == (kind, sublayer)]
        where = f"{len(alike)} layers" if len(alike) > 1 else f"layer {alike[0]['layer']}"
        lines.append(f"one part in {where}: {sublayer} ({kind}, {visible(alike[0]['reason'])})")
    return lines


def strongest_attention(route: Route, n: int) -> list[int]:
    """Rows of `route.edges`: the n heaviest attention edges between two positions, falling.

    An edge i → i is left out: it moves nothing from one token to another.
    """
    edges = route.edges
    moves = (edges["kind"] == "attention") & (edges["source_position"] != edges["target_position"])
    rows = np.flatnonzero(moves)
    order = np.lexsort((edges["layer"][rows], -edges["weight"][rows]))
    return [int(row) for row in rows[order][:n]]


def strongest_tokens(route: Route, n: int) -> list[int]:
    """Positions of the n tokens with the largest positive share of the target, falling."""
    shares = route.token_shares.tokens
    order = np.argsort(-shares, kind="stable")[:n]
    return [int(position) for position in order if shares[position] > 0]


def strongest_spans(route: Route, by: str, n: int) -> list[str]:
    """Lines for the n words, sentences or turns with the largest positive share, falling."""
    spans = spans_of(route.trace, by)
    shares = summed(route.token_shares.tokens, spans)
    order = [at for at in np.argsort(-shares, kind="stable")[:n] if shares[at] > 0]
    return [f"  {shares[at]:6.1%}  {spans[at].label()}" for at in order]


def heads_text(route: Route, edge: int, n: int = HEADS) -> str:
    """`3 (0.102), 7 (0.021), 2 more`: the strongest heads of an edge; empty if none is kept."""
    heads = edge_heads(route, edge)
    listed = [f"{head} ({weight:.3f})" for head, weight in heads[:n]]
    return ", ".join([*listed, f"{len(heads) - n} more"] if len(heads) > n else listed)


def route_summary(route: Route, by: str = "token") -> list[str]:
    """Lines of plain text for a terminal; every token is shown safely. by: whose shares are listed."""
    trace, edges, shares = route.trace, route.edges, route.token_shares
    T, L = len(trace.tokens), len(trace.parallel)
    attention = int(np.count_nonzero(edges["kind"] == "attention"))
    touched = len(np.unique(route.nodes["position"]))
    said = ", ".join(f"{quoted(p.token)} {p.probability:.1%}" for p in predictions(route, k=3))
    kind = "renormalised route" if route.renormalized else "route"
    lines = [
        f"{visible(str(trace.meta['model']['name']))}: {L} layers, {T} tokens",
        f"prompt: {clipped(visible(''.join(trace.tokens)), PROMPT_WIDTH)}",
        f"after {_named(route, route.position)} it says {said}",
        f"{kind} above {route.threshold:g}: {len(edges)} edges ({attention} of attention), "
        f"{len(route.nodes)} nodes, {touched} of {T} tokens",
        "",
        f"share of each {by} (rollout over all kept edges)",
    ]
    if by == "token":
        lines += [f"  {shares.tokens[p]:6.1%}  {_named(route, p)}" for p in strongest_tokens(route, LISTED)]
    else:
        lines += strongest_spans(route, by, LISTED)
    if shares.bias > 0:
        lines.append(f"  {shares.bias:6.1%}  biases")
    lines.append(f"  {shares.unattributed:6.1%}  unattributed")
    strongest = strongest_attention(route, LISTED)
    if strongest:
        lines += ["", "strongest attention edges between tokens"]
    for row in strongest:
        edge = edges[row]
        ends = [_named(route, int(edge[f"{end}_position"])) for end in ("source", "target")]
        heads = heads_text(route, row)
        lines.append(
            f"  {edge['weight']:.3f}  layer {edge['layer']:<3d} {' → '.join(ends)}"
            + (f"  heads {heads}" if heads else "")
        )
    return lines


def _named(route: Route, position: int) -> str:
    return f"{quoted(route.trace.tokens[position])} [{position}]"
