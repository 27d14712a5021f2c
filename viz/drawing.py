"""The drawing of a route as SVG: tokens along the bottom, layers upwards.

The residual stream is each token's column. Attention runs in the gap between a layer's input and its
middle, where no other node lies; i → i is an arc beside the column; an MLP is one square to the right of it,
a sublayer that was not taken apart one diamond to the left. Strength is width and lightness, kind is hue and
shape.

What moves with the slider carries its reveal threshold in `data-r` and the edges that it stands for in
`data-n`; what the route does not hold has the class `off`, so that the page is right without its script.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmtt.graph.export import edge_heads, predictions
from lmtt.graph.routes import Route
from lmtt.graph.text import quoted, token_label
from lmtt.viz.markup import STRENGTHS, named, numbers, safe, step

FOLD = 40  # more tokens than this: only those on the route get a column
CHARACTER = 7.4  # pixels of a monospaced character at the labels' size
NARROW = 84  # columns narrower than this have slanted labels
AXIS_WIDTH = 42
LISTED_HEADS = 6
LISTED_NEURONS = 4
LEVELS = {"opaque": 0.33, "mid": 0.66, "mlp": 0.83, "post": 1.0}  # heights within a layer: attention is flat


@dataclass(frozen=True)
class Layout:
    """Where things are, in pixels; y falls as layers rise."""

    column: dict[int, int]  # position -> column, for the positions that have one
    layers: int
    pitch: float  # width of a column
    row: float  # height of a layer
    top: float  # of the last layer
    bottom: float  # of the embeddings
    label: int  # characters of a token that fit
    slanted: bool
    width: float
    height: float

    @classmethod
    def of(cls, route: Route, drawn: Route) -> Layout:
        """Columns for the tokens up to the target, or, if they are too many, for those on the route."""
        positions: Sequence[int] = range(route.position + 1)
        if len(positions) > FOLD:
            ends = (drawn.edges["source_position"], drawn.edges["target_position"])
            positions = sorted({route.position, *np.concatenate(ends).tolist()})
        n, L = len(positions), len(route.trace.parallel)
        pitch = min(172.0, max(34.0, 800 / n))
        row = min(72.0, max(15.0, 720 / L))
        slanted = pitch < NARROW
        label = 13 if slanted else int(pitch / CHARACTER) - 1
        said = [predictions(route, p, k=1)[0].token for p in positions]
        above, below = (
            _room(tokens, label, slanted) for tokens in (said, [route.trace.tokens[p] for p in positions])
        )
        top = above + 16
        bottom = top + row * (L + 0.25)
        return cls(
            column={p: c for c, p in enumerate(positions)},
            layers=L,
            pitch=pitch,
            row=row,
            top=top,
            bottom=bottom,
            label=label,
            slanted=slanted,
            width=pitch * n + (60 if slanted else 0),  # the last slanted labels lean out
            height=bottom + below + 6,
        )

    @property
    def aside(self) -> float:
        """How far a square or a diamond stands beside its column."""
        return min(13.0, self.pitch * 0.3)

    def x(self, position: int) -> float:
        return self.pitch * (self.column[int(position)] + 0.5)

    def y(self, kind: str, layer: int) -> float:
        return self.bottom - self.row * (0.0 if kind == "embed" else int(layer) + LEVELS[kind])

    def ends(self, drawn: Route, edge: Any) -> tuple[float, float]:
        """Heights of an edge's source and target."""
        source, target = (drawn.nodes[edge[end]] for end in ("source", "target"))
        return self.y(str(source["kind"]), source["layer"]), self.y(str(target["kind"]), target["layer"])


def _room(tokens: list[str], label: int, slanted: bool) -> float:
    """Height that a line of labels takes."""
    longest = max(len(token_label(token, label)) for token in tokens)
    return 26 + 0.71 * CHARACTER * longest if slanted else 26  # 0.71: sin 45°


def axis(layout: Layout) -> str:
    """The layers' numbers, apart from the graph so that they stay in sight when it is scrolled."""
    every = math.ceil(15 / layout.row)
    numbers_ = (
        f'<text class="dim" x="34" y="{layout.y("mid", layer) + 4:.1f}" text-anchor="end">{layer}</text>'
        for layer in range(0, layout.layers, every)
    )
    return (
        f'<svg class="axis" aria-hidden="true" width="{AXIS_WIDTH}" height="{layout.height:.0f}">'
        f"{''.join(_bands(layout, AXIS_WIDTH))}{''.join(numbers_)}"
        f'<text class="dim" x="34" y="{layout.top - 6:.1f}" text-anchor="end">layer</text></svg>'
    )


def graph(route: Route, drawn: Route, layout: Layout) -> str:
    """The drawing of the edges of `drawn`, those that `route` does not hold switched off."""
    size = f'width="{layout.width:.0f}" height="{layout.height:.0f}"'
    parts = [
        f'<svg class="plot" role="img" aria-label="route graph" {size}>',
        *_bands(layout, layout.width),
    ]
    kinds = drawn.edges["kind"]
    for kind, draw in _FAMILIES.items():
        # The weakest first, so that the strongest are painted over them.
        rows = np.flatnonzero(kinds == kind)[::-1].tolist()
        parts += [draw(drawn, row, layout, _off(route, drawn.edges["reveal"][row])) for row in rows]
    parts += _nodes(route, drawn, layout)
    parts += _labels(route, layout)
    parts.append("</svg>")
    return "\n".join(part for part in parts if part)


def legend(route: Route) -> str:
    """What the hues and shapes stand for."""

    def sample(label: str, width: int, shapes: str) -> str:
        return f'<span><svg width="{width}" height="12" aria-hidden="true">{shapes}</svg>{label}</span>'

    strengths = range(1, len(STRENGTHS) + 1)
    lines = "".join(
        f'<g class="e att w{n}"><line x1="{15 * n - 12}" y1="10" x2="{15 * n - 2}" y2="2"/></g>'
        for n in strengths
    )
    squares = "".join(f'<g class="mlp w{n}">{_square(11 * n - 5, 6, _side(n))}</g>' for n in strengths)
    steps = " · ".join(f"{value:g}" for value in STRENGTHS)
    parts = [
        sample(f"attention, by contribution ({steps})", 76, lines),
        sample("MLP", 58, squares),
        sample("residual", 24, '<g class="e res w5"><line x1="2" y1="6" x2="22" y2="6"/></g>'),
    ]
    if route.trace.opaque.any():
        parts.append(sample("not taken apart", 16, f'<g class="opq">{_diamond(7, 6, 5)}</g>'))
    parts.append(sample("target", 14, '<polygon class="v goal" points="1,1 13,1 7,11"/>'))
    return "".join(parts)


# --- edges ---


def _off(route: Route, reveal: np.float32) -> str:
    return "" if reveal > np.float32(route.threshold) else " off"


def _group(edge: Any, family: str, off: str, edges: int, title: str, shapes: str) -> str:
    classes = f"e {family} w{step(edge['weight'], STRENGTHS)}{off}"
    data = f'data-r="{edge["reveal"]}" data-n="{edges}"'
    return f'<g class="{classes}" {data}><title>{title}\n{numbers(edge)}</title>{shapes}</g>'


def _residual(drawn: Route, row: int, layout: Layout, off: str) -> str:
    edge = drawn.edges[row]
    x, (y0, y1) = layout.x(edge["target_position"]), layout.ends(drawn, edge)
    title = f"layer {edge['layer']}, residual at {named(drawn, edge['target_position'])}"
    line = f'<line x1="{x:.1f}" y1="{y0:.1f}" x2="{x:.1f}" y2="{y1:.1f}"/>'
    return _group(edge, "res", off, 1, title, line)


def _attention(drawn: Route, row: int, layout: Layout, off: str) -> str:
    edge = drawn.edges[row]
    x0, x1 = layout.x(edge["source_position"]), layout.x(edge["target_position"])
    y0, y1 = layout.ends(drawn, edge)
    if x0 == x1:  # as a straight line it would hide under the residual edge
        bend = x0 - layout.aside
        control = f"{bend:.1f} {y0:.1f} {bend:.1f} {y1:.1f}"
    else:
        reach = 0.3 * (x1 - x0)
        control = f"{x0 + reach:.1f} {0.9 * y0 + 0.1 * y1:.1f} {x1 - reach:.1f} {y1:.1f}"
    path = f'd="M{x0:.1f} {y0:.1f}C{control} {x1:.1f} {y1:.1f}"'
    heads = edge_heads(drawn, row)
    listed = [f"head {head} {weight:.4f}" for head, weight in heads[:LISTED_HEADS]]
    if len(heads) > LISTED_HEADS:
        listed.append(f"{len(heads) - LISTED_HEADS} more")
    ends = f"{named(drawn, edge['source_position'])} → {named(drawn, edge['target_position'])}"
    title = f"layer {edge['layer']}, attention {ends}\n{', '.join(listed)}"
    # A thin line is hard to point at: the first path is wide and transparent.
    return _group(edge, "att", off, 1, title, f'<path class="hit" {path}/><path {path}/>')


def _mlp(drawn: Route, row: int, layout: Layout, off: str) -> str:
    """Both edges through an MLP, which share one reveal threshold, as one glyph."""
    edge = drawn.edges[row]
    if drawn.nodes["kind"][edge["source"]] != "mlp":
        return ""
    layer, position = int(edge["layer"]), int(edge["target_position"])
    # A parallel block has no middle: its MLP reads what the attention reads.
    reads = layout.y("post", layer - 1) if drawn.trace.parallel[layer] else layout.y("mid", layer)
    x, y, writes = layout.x(position), layout.y("mlp", layer), layout.y("post", layer)
    side = min(_side(step(edge["weight"], STRENGTHS)), layout.row * 0.45, layout.pitch * 0.3)
    title = f"layer {layer}, MLP at {named(drawn, position)}{_neurons(drawn, layer, position)}"
    shapes = _detour(x, x + layout.aside, reads, y, writes) + _square(x + layout.aside, y, side)
    return _group(edge, "mlp", off, 2, title, shapes)


def _opaque(drawn: Route, row: int, layout: Layout, off: str) -> str:
    """Both edges through a sublayer that was not taken apart, as one glyph."""
    edge = drawn.edges[row]
    if drawn.nodes["kind"][edge["source"]] != "opaque":
        return ""
    layer, position = int(edge["layer"]), int(edge["target_position"])
    x, (y, writes) = layout.x(position), layout.ends(drawn, edge)
    size = min(4.0 + step(edge["weight"], STRENGTHS), layout.row * 0.35)
    title = f"layer {layer}, a sublayer not taken apart, at {named(drawn, position)}"
    path = _detour(x, x - layout.aside, layout.y("post", layer - 1), y, writes)
    return _group(edge, "opq", off, 2, title, path + _diamond(x - layout.aside, y, size))


_FAMILIES = {"residual": _residual, "opaque": _opaque, "mlp": _mlp, "attention": _attention}  # painted so


def _detour(x: float, beside: float, reads: float, y: float, writes: float) -> str:
    """The way out of a column to a glyph at height y beside it, and back."""
    return (
        f'<path d="M{x:.1f} {reads:.1f}Q{beside:.1f} {reads:.1f} {beside:.1f} {y:.1f}'
        f'Q{beside:.1f} {writes:.1f} {x:.1f} {writes:.1f}"/>'
    )


def _side(strength: int) -> float:
    return 4 + 1.2 * strength


def _square(x: float, y: float, side: float) -> str:
    corner = f'x="{x - side / 2:.1f}" y="{y - side / 2:.1f}"'
    return f'<rect {corner} width="{side:.1f}" height="{side:.1f}" rx="1"/>'


def _diamond(x: float, y: float, size: float) -> str:
    corners = ((x, y - size), (x + size, y), (x, y + size), (x - size, y))
    return f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}"/>'


def _neurons(drawn: Route, layer: int, position: int) -> str:
    kept = drawn.trace.neurons
    index = kept.index[layer, position, :LISTED_NEURONS].tolist()
    share = kept.contribution[layer, position, :LISTED_NEURONS].tolist()
    top = [f"{n} ({c:.4f})" for n, c in zip(index, share, strict=True) if n >= 0 and c > 0]
    return f"\nneurons {', '.join(top)}" if top else ""


# --- nodes and labels ---


def _bands(layout: Layout, width: float) -> Iterator[str]:
    for layer in range(0, layout.layers, 2):
        y = layout.y("post", layer)
        yield f'<rect class="band" x="0" y="{y:.1f}" width="{width:.0f}" height="{layout.row:.1f}"/>'


def _nodes(route: Route, drawn: Route, layout: Layout) -> Iterator[str]:
    """The stream's nodes that an edge touches; each appears with the first edge that leaves it."""
    for row in np.unique(np.concatenate([drawn.edges["source"], drawn.edges["target"]])):
        node = drawn.nodes[row]
        kind, layer, reveal = str(node["kind"]), int(node["layer"]), node["reveal"]
        if kind not in ("embed", "mid", "post") or np.isinf(reveal):
            continue
        where = {
            "embed": "embedding",
            "mid": f"after layer {layer}’s attention",
            "post": f"after layer {layer}",
        }
        title = f"{where[kind]}, {named(drawn, node['position'])}\nrevealed at {reveal:.4f}"
        if node["rest"] > 0 or node["certificate"] > 0:
            title += f"\nedges not kept {node['rest']:.4f}, error of any share ≤ {node['certificate']:.4f}"
        x, y = layout.x(node["position"]), layout.y(kind, layer)
        radius = 3.2 if kind == "embed" else min(2.4, layout.row * 0.12)
        yield (
            f'<circle class="v {kind}{_off(route, reveal)}" data-r="{reveal}" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="{radius:.1f}"><title>{title}</title></circle>'
        )
    x, y = layout.x(route.position), layout.y("post", layout.layers - 1)
    corners = f"{x - 7:.1f},{y - 11:.1f} {x + 7:.1f},{y - 11:.1f} {x:.1f},{y + 1:.1f}"
    title = f"the target: final state of {named(route, route.position)}"
    yield f'<polygon class="v goal" points="{corners}"><title>{title}</title></polygon>'


def _labels(route: Route, layout: Layout) -> Iterator[str]:
    """Tokens below; above them, what the model would say next at each."""
    on_route = set(route.nodes["position"].tolist())
    previous = -1
    for position in layout.column:
        x = layout.x(position)
        goal = " target" if position == route.position else ""
        dim = "" if position in on_route else " dim"
        token = route.trace.tokens[position]
        yield _label(layout, x, token, f"tok{goal}{dim}", named(route, position), above=False)
        said = predictions(route, position, k=1)[0]
        title = f"after {named(route, position)}: {safe(quoted(said.token))} {said.probability:.1%}"
        yield _label(layout, x, said.token, f"tok said{goal}", title, above=True)
        if position > previous + 1:
            title = f"{position - previous - 1} tokens that are not on the route"
            yield (
                f'<text class="dim" x="{x - layout.pitch / 2:.1f}" y="{layout.bottom + 4:.1f}" '
                f'text-anchor="middle">⋯<title>{title}</title></text>'
            )
        previous = position


def _label(layout: Layout, x: float, token: str, classes: str, title: str, *, above: bool) -> str:
    text = f"{safe(token_label(token, layout.label))}<title>{title}</title>"
    y = layout.top - 18 if above else layout.bottom + 20
    if not layout.slanted:
        return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'
    place = f"translate({x - 3:.1f} {y + (4 if above else -6):.1f}) rotate({-45 if above else 45})"
    return f'<text class="{classes}" transform="{place}">{text}</text>'
