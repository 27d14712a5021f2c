"""A route on a colour terminal: the prompt shaded by share, the strongest edges, what heads and neurons say.

Plain text is `Route.summary`; this says the same with colours, and with promoted tokens where the model is at
hand. Every string of a prompt or vocabulary goes through `visible` and into a `Text`, never through markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from lmtt.errors import StructureError
from lmtt.graph.export import edge_heads, predictions
from lmtt.graph.summary import not_taken_apart, strongest_attention
from lmtt.graph.text import clipped, quoted, token_label, visible
from lmtt.spans import F64, Span, spans_of, summed

if TYPE_CHECKING:
    from lmtt.generate import Generation
    from lmtt.graph.routes import Route
    from lmtt.trace import Part, Trace

LISTED = 6  # rows of each table
PROMOTED = 4
SHOWN_TOKENS = 400  # of a longer prompt, only the strongest spans are listed
BAR = 16  # characters of a full bar
FAINT, STRONG = (255, 244, 205), (245, 130, 48)  # shades; black is readable on every mixture
VISIBLE_SHADE = 0.03  # of the largest share: less gets no shade


def show(
    trace: Trace,
    route: Route,
    *,
    by: str = "token",
    generation: Generation | None = None,
    file: IO[str] | None = None,
    always: bool = False,
) -> None:
    """Print it; `always` colours also what is not a terminal."""
    console = Console(file=file, force_terminal=True if always else None, highlight=False, markup=False)
    console.print(Group(*_parts(trace, route, by, generation)))


def _parts(trace: Trace, route: Route, by: str, generation: Generation | None) -> Iterator[RenderableType]:
    data, shares = route.trace, route.token_shares
    spans = spans_of(data, by)
    values = summed(shares.tokens, spans)
    model = visible(str(data.meta["model"]["name"]))
    yield Text.assemble((model, "bold"), f"  {len(data.parallel)} layers, {len(data.tokens)} tokens")
    for line in not_taken_apart(data.meta.get("whole_sublayers", [])):
        yield Text(line, "yellow")
    yield Text("")
    if len(data.tokens) <= SHOWN_TOKENS:
        yield shaded(spans, values, route.position)
        yield Text("")
    yield _heading(f"after {quoted(data.tokens[route.position])} [{route.position}] it says")
    yield _bars([(f'"{clipped(visible(p.token), 24)}"', p.probability) for p in predictions(route, k=3)])
    yield _heading(f"share of each {by}", "rollout over all kept edges")
    order = [int(n) for n in np.argsort(-values, kind="stable")[:LISTED] if values[n] > 0]
    rows = [(spans[n].label(), float(values[n])) for n in order]
    if shares.bias > 0:
        rows.append(("biases", shares.bias))
    yield _bars([*rows, ("unattributed", shares.unattributed)])
    if generation is not None:
        yield _heading("the output rests on", "through the output in between; direct")
        yield from _answer(generation, by)
    rows_of = strongest_attention(route, LISTED)
    if rows_of:
        yield _heading("strongest edges", f"of {len(route.edges)} above {route.threshold:g}")
        yield _edges(trace, route, rows_of)
    neurons = _neurons(trace, route)
    if neurons is not None:
        yield _heading("strongest neurons", f"at {quoted(data.tokens[route.position])} [{route.position}]")
        yield neurons


def shaded(spans: Sequence[Span], values: F64, position: int) -> Text:
    """The prompt's text, each span on a shade of its share; what comes after the target is dim."""
    text, most = Text(), float(values.max(initial=0))
    for span, value in zip(spans, values, strict=True):
        shade = float(value) / most if most > 0 else 0.0
        style = Style(dim=True) if span.first > position else Style()
        if shade >= VISIBLE_SHADE:
            style = Style(color="#000000", bgcolor=_shade(shade))
        if span.first <= position < span.last:
            style += Style(underline=True, bold=True)
        # A blank before a word is not the word's: shading it would run words together.
        bare = span.text.lstrip(" ")
        text.append(" " * (len(span.text) - len(bare)))
        text.append(visible(bare), style)
        text.append("\n" * span.text.endswith("\n"))
    return text


def _shade(part: float) -> str:
    mixed = [round(a + (b - a) * part) for a, b in zip(FAINT, STRONG, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _answer(generation: Generation, by: str) -> Iterator[RenderableType]:
    spans = generation.prompt_spans(by)
    through = summed(generation.through.tokens.mean(0), spans)
    direct = summed(generation.shares[:, : generation.prompt].mean(0), spans)
    yield Text.assemble("  ", (visible(generation.text), "italic"))
    order = np.argsort(-through, kind="stable")[:LISTED]
    yield _bars([(f"{spans[n].label()}  ({direct[n]:.1%})", float(through[n])) for n in order])


def _edges(trace: Trace, route: Route, rows: Sequence[int]) -> Table:
    """Edges with their strongest head and the tokens it promotes."""
    table = _table("share", "layer", "from", "to", "head", *_says(trace))
    for row in rows:
        edge, heads = route.edges[row], edge_heads(route, row)
        layer, source, target = (int(edge[c]) for c in ("layer", "source_position", "target_position"))
        said, head = [Text("")] * len(_says(trace)), ""
        if heads:
            head = f"{heads[0][0]} ({heads[0][1]:.3f})"
            said = _promoted(trace, layer, target, ("head", heads[0][0], source))
        ends = [f"{quoted(route.trace.tokens[p], 18)} [{p}]" for p in (source, target)]
        table.add_row(f"{edge['weight']:.3f}", str(layer), *(Text(end) for end in ends), head, *said)
    return table


def _neurons(trace: Trace, route: Route) -> Table | None:
    """The largest kept neurons of all layers at the target, None if none is kept."""
    kept = route.trace.neurons
    share, index = kept.contribution[:, route.position], kept.index[:, route.position]
    order = np.argsort(-np.where(index >= 0, share, 0), axis=None, kind="stable")[:LISTED]
    found = [divmod(int(at), share.shape[1]) for at in order if index.flat[at] >= 0 and share.flat[at] > 0]
    if not found:
        return None
    table = _table("share", "layer", "neuron", "activation", *_says(trace))
    for layer, rank in found:
        neuron = int(index[layer, rank])
        table.add_row(
            f"{share[layer, rank]:.3f}",
            str(layer),
            str(neuron),
            f"{kept.activation[layer, route.position, rank]:.2f}",
            *_promoted(trace, layer, route.position, ("neuron", neuron)),
        )
    return table


def _says(trace: Trace) -> list[str]:
    """The column for promoted tokens, where there is a model to ask."""
    return ["promotes"] if trace.has_model else []


def _promoted(trace: Trace, layer: int, position: int, part: Part) -> list[Text]:
    """The cell of that column; empty where the sublayer was not taken apart."""
    if not trace.has_model:
        return []
    try:
        scores, _ = trace.promoted(layer, position, part, k=PROMOTED)
    except StructureError:
        return [Text("")]
    return [Text(" ").join(Text(token_label(score.token, 14), style="cyan") for score in scores)]


def _heading(text: str, note: str = "") -> Text:
    return Text.assemble("\n", (text, "bold"), (f"  {note}" if note else "", "dim"))


def _bars(rows: Sequence[tuple[str, float]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    for name, value in rows:
        length = round(min(max(value, 0), 1) * BAR)
        table.add_row(f"{value:6.1%}", Text("█" * length + "·" * (BAR - length), "yellow"), Text(name))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), header_style="dim")
    for column in columns:
        right = column in ("share", "layer", "neuron", "activation")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "promotes")
    return table
