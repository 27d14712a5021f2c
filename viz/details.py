"""What a click on the route shows. Every number comes from the trace; asking goes through the worker.

| picked | shown |
|---|---|
| attention edge | its heads as bars; of one head: attention and contribution map, promoted and suppressed |
| MLP | its top neurons: activation, contribution, what each promotes and suppresses |
| node | the logit lens there, and how ranks changed since the state before |
| token | attention edges that it received and gave, and where its final state came from |
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_not
from typing import Any, TypeVar

import panel as pn

from lmtt.errors import LmttError
from lmtt.trace import Site, Trace
from lmtt.viz import tables
from lmtt.viz.edge_view import NO_MODEL, EdgeView
from lmtt.viz.markup import safe
from lmtt.viz.panes import FILLING, WIDE, Ask, html
from lmtt.viz.token_view import TokenView
from lmtt.viz.views import parts_as_one

T = TypeVar("T")
V = TypeVar("V", EdgeView, TokenView)

NEURONS = 8  # of an MLP
LISTED = 10  # tokens of a lens
QUICK = ("attention", "token")  # answered before a sign of work could be seen
AS_ONE = "A sublayer that was not taken apart: it enters the route as one part."
NOTHING = "What you click in the graph is shown here, once there is a run."
HINT = (
    "Click something in the graph: an attention edge for its heads, a square for its neurons, "
    "a node for what the model would say there, a token for what it received and gave."
)


class Details:
    """The pane beside the graph. `show` may be called again before it is done: the last call wins."""

    def __init__(self, ask: Ask[Any]) -> None:
        self._ask = ask
        self._latest = 0
        self._made: dict[type, tuple[Trace, bool, Any]] = {}  # views of this run and theme
        self.pane = pn.Column(name="details", stylesheets=[FILLING], **WIDE)
        self.pane[:] = [html(tables.sentence(NOTHING))]

    async def show(self, trace: Trace | None, picked: dict[str, Any], dark: bool) -> None:
        """Fill the pane for a pick; errors of the caller become a sentence there."""
        self._latest += 1
        mine = self._latest
        if trace is None or not picked:
            said = tables.sentence(NOTHING) if trace is None else tables.sentence(HINT) + parts_as_one(trace)
            self.pane[:] = [html(said)]
            return
        views = {
            "attention": self._attention, "mlp": self._mlp, "node": self._node,
            "token": self._token, "opaque": self._opaque,
        }  # fmt: skip
        try:
            view = views[picked["kind"]]
            self.pane.loading = trace.has_model and picked["kind"] not in QUICK
            found = await view(trace, picked, dark)
        except LmttError as error:
            found = [html(tables.sentence(str(error)))]
        except (KeyError, TypeError, ValueError, IndexError):
            found = [html(tables.sentence("This selection is not in the run that is shown."))]
        finally:
            self.pane.loading = False
        if mine == self._latest and (len(found) != len(self.pane) or any(map(is_not, found, self.pane))):
            self.pane[:] = found

    # --- an attention edge ---

    async def _attention(self, trace: Trace, picked: dict[str, Any], dark: bool) -> list[Any]:
        layer, source, position = picked["layer"], picked["source"], picked["position"]
        weight = float(trace.attention(layer)[position, source])
        where = f"{tables.place(trace, source)} → {tables.place(trace, position)}"
        title = self._titled(f"layer {layer}, attention", where, f"contribution {weight:.4f}")
        return await self._kept(EdgeView, trace, dark).show(layer, source, position, title)

    # --- an MLP ---

    async def _mlp(self, trace: Trace, picked: dict[str, Any], _dark: bool) -> list[Any]:
        layer, position = picked["layer"], picked["position"]
        weight = float(trace.mlp[layer, position])
        head = self._title(
            f"layer {layer}, MLP", f"at {tables.place(trace, position)}", f"contribution {weight:.4f}"
        )

        def look() -> tuple[Any, Any]:
            k = min(NEURONS, trace.data.neurons.index.shape[2])
            neurons = trace.neurons(layer, position, k=k)
            if not trace.has_model:
                return neurons, None
            each = [trace.promoted(layer, position, ("neuron", n.neuron), k=4) for n in neurons]
            return neurons, (each, trace.promoted(layer, position, "mlp", k=LISTED))

        neurons, says = await self._of(trace, look)
        rows = []
        for i, n in enumerate(neurons):
            row = [str(n.neuron), f"{n.activation:+.2f}", f"{n.contribution:.4f}"]
            if says is not None:
                row.append("▲ {}<br>▼ {}".format(*map(tables.words, says[0][i])))
            rows.append(row)
        heads = ["neuron", "activation", "contribution"]
        if says is None:
            listed = tables.table(heads, rows, numbers=(0, 1, 2))
            return [head, html(listed + tables.sentence(f"{NO_MODEL} what each neuron promotes."))]
        listed = tables.table([*heads, "▲ promotes, ▼ suppresses"], rows, numbers=(0, 1, 2))
        whole = f"<h4>what the whole block says</h4>{tables.scores(*says[1])}"
        return [head, html(f"<h4>its top neurons</h4>{listed}"), html(whole)]

    # --- a state of the stream ---

    async def _node(self, trace: Trace, picked: dict[str, Any], _dark: bool) -> list[Any]:
        layer, site, position = picked["layer"], picked["site"], picked["position"]
        where = {
            "embed": "embedding",
            "mid": f"after layer {layer}’s attention",
            "post": f"after layer {layer}",
        }[site]
        head = self._title("residual stream", f"{tables.place(trace, position)}, {where}")
        if not trace.has_model:
            return [head, html(tables.sentence(f"{NO_MODEL} the logit lens."))]
        at: int = 0 if site == "embed" else layer
        kind: Site = "pre" if site == "embed" else site
        split = site == "post" and not trace.data.parallel[layer]
        before: Site | None = None if site == "embed" else "mid" if split else "pre"

        def look() -> tuple[Any, Any, Any]:
            lens = trace.lens(at, position, site=kind, k=LISTED)
            ids = [t.id for t in lens]
            was = None if before is None else trace.lens_ranks(at, position, ids, site=before)
            said = trace.next_tokens(position, 1)[0]
            final = trace.lens_ranks(at, position, [said.id], site=kind)[0]
            return lens, was, (said, final)

        lens, was, (said, final) = await self._ask(look)
        rows = []
        for rank, t in enumerate(lens):
            change = "" if was is None else self._change(was[rank], rank)
            rows.append(
                [
                    str(rank + 1),
                    tables.token(t.token),
                    f"{t.probability:.1%}",
                    tables.share(t.probability),
                    f"{t.logit:.2f}",
                    change,
                ]
            )
        heads = ["rank", "token", "probability", "", "logit", "before"]
        note = f"<p>The model’s final choice {tables.token(said.token)} ranks {final + 1:,} here.</p>"
        return [
            head,
            html(f"<h4>the model would say here</h4>{tables.table(heads, rows, numbers=(0, 2, 4))}{note}"),
        ]

    @staticmethod
    def _change(before: int, now: int) -> str:
        sign = "▲" if before > now else "▼" if before < now else "="
        return f"{sign} {before + 1:,}"

    # --- a token ---

    async def _token(self, trace: Trace, picked: dict[str, Any], dark: bool) -> list[Any]:
        position = picked["position"]
        title = self._titled("token", tables.place(trace, position))
        return await self._kept(TokenView, trace, dark).show(position, title)

    async def _opaque(self, trace: Trace, picked: dict[str, Any], _dark: bool) -> list[Any]:
        layer, position = picked["layer"], picked["position"]
        share = float(trace.opaque[layer, position])
        return [
            self._title(f"layer {layer}", f"at {tables.place(trace, position)}", f"contribution {share:.4f}"),
            html(tables.sentence(AS_ONE) + parts_as_one(trace)),
        ]

    # --- pieces ---

    async def _of(self, trace: Trace, look: Callable[[], T]) -> T:
        """From the model through the worker; from what is kept at once."""
        return await self._ask(look) if trace.has_model else look()

    def _kept(self, view: type[V], trace: Trace, dark: bool) -> V:
        """The view of this kind, made again for another run or theme only."""
        made = self._made.get(view)
        if made is None or made[0] is not trace or made[1] != dark:
            made = self._made[view] = (trace, dark, view(trace, dark, self._ask))
        kept: V = made[2]
        return kept

    @staticmethod
    def _titled(what: str, where: str, number: str = "") -> str:
        aside = f'<span class="dim"> · {safe(number)}</span>' if number else ""
        return f'<h3><span class="dim">{safe(what)}</span> {where}{aside}</h3>'

    def _title(self, *parts: str) -> Any:
        return html(self._titled(*parts))
