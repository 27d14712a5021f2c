"""What a click on the route shows. Every number comes from the trace; asking goes through the worker.

| picked | shown |
|---|---|
| attention edge | its heads as bars; of one head: attention and contribution map, promoted and suppressed |
| MLP | its top neurons: activation, contribution, what each promotes and suppresses |
| node | the logit lens there, and how ranks changed since the state before |
| token | attention edges that it received and gave, and where its final state came from |
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import panel as pn

from lmtt.errors import LmttError
from lmtt.graph.text import quoted, token_label
from lmtt.trace import Site, Trace
from lmtt.viz import figures, tables
from lmtt.viz.markup import safe

T = TypeVar("T")
Ask = Callable[[Callable[[], T]], Awaitable[T]]

HEADS = 12  # of an edge
NEURONS = 8  # of an MLP
LISTED = 10  # tokens of a lens, edges of a token
HINT = (
    "Click something in the graph: an attention edge for its heads, a square for its neurons, "
    "a node for what the model would say there, a token for what it received and gave."
)
NO_MODEL = "This run was opened without its model; start `lmtt serve RUN --model MODEL` to see"


class Details:
    """The pane beside the graph. `show` may be called again before it is done: the last call wins."""

    def __init__(self, ask: Ask[Any], css: str) -> None:
        self._ask = ask
        self._css = css
        self._latest = 0
        self.pane = pn.Column(sizing_mode="stretch_width", name="details")
        self.pane[:] = [self.html(tables.sentence(HINT))]

    def html(self, text: str) -> Any:
        """A pane of our own HTML."""
        return pn.pane.HTML(
            f'<div class="lmtt">{text}</div>', stylesheets=[self._css], sizing_mode="stretch_width"
        )

    async def show(self, trace: Trace | None, picked: dict[str, Any], dark: bool) -> None:
        """Fill the pane for a pick; errors of the caller become a sentence there."""
        self._latest += 1
        mine = self._latest
        if trace is None or not picked:
            self.pane[:] = [self.html(tables.sentence(HINT))]
            return
        views = {
            "attention": self._attention, "mlp": self._mlp, "node": self._node,
            "token": self._token, "opaque": self._opaque,
        }  # fmt: skip
        try:
            view = views[picked["kind"]]
            self.pane.loading = trace.has_model
            found = await view(trace, picked, dark)
        except LmttError as error:
            found = [self.html(tables.sentence(str(error)))]
        except (KeyError, TypeError, ValueError, IndexError):
            found = [self.html(tables.sentence("This selection is not in the run that is shown."))]
        finally:
            self.pane.loading = False
        if mine == self._latest:
            self.pane[:] = found

    # --- an attention edge, and one of its heads ---

    async def _attention(self, trace: Trace, picked: dict[str, Any], dark: bool) -> list[Any]:
        layer, source, position = picked["layer"], picked["source"], picked["position"]
        weight = float(trace.attention(layer)[position, source])
        title = f"{self._named(trace, source)} → {self._named(trace, position)}"
        head = self._title(f"layer {layer}, attention", title, f"contribution {weight:.4f}")
        shares = await self._of(trace, lambda: trace.heads(layer, source=source, destination=position))
        order = [int(h) for h in np.argsort(-shares, kind="stable")[:HEADS] if shares[h] > 0]
        if not order:
            return [head, self.html(tables.sentence("None of its heads is kept in this run."))]
        below = pn.Column(sizing_mode="stretch_width")

        async def show_head(index: int) -> None:
            below.loading = True
            try:
                below[:] = await self._head(trace, layer, order[index], source, position, dark)
            except LmttError as error:
                below[:] = [self.html(tables.sentence(str(error)))]
            finally:
                below.loading = False

        plot = figures.bars(
            [f"head {h}" for h in order], shares[order], dark,
            title="its heads (click one)", picked=lambda index: pn.state.execute(lambda: show_head(index)),
        )  # fmt: skip
        await show_head(0)
        return [head, pn.pane.Bokeh(plot, sizing_mode="stretch_width"), below]

    async def _head(
        self, trace: Trace, layer: int, head: int, source: int, position: int, dark: bool
    ) -> list[Any]:
        if not trace.has_model:
            return [self.html(tables.sentence(f"{NO_MODEL} this head's maps and what it promotes."))]

        def look() -> tuple[Any, ...]:
            return (
                trace.attention_map(layer, head),
                trace.contribution_map(layer, head),
                trace.promoted(layer, position, ("head", head, source), k=LISTED),
                trace.promoted(layer, position, ("head", head), k=LISTED),
            )

        attention, contribution, here, whole = await self._ask(look)
        labels = [token_label(token, 16) for token in trace.tokens]
        titles = (f"head {head}: attention", f"head {head}: contribution")
        left, right = figures.maps(attention, contribution, labels, dark, titles=titles)
        reading = safe(quoted(trace.tokens[source]))
        return [
            pn.Row(
                *(pn.pane.Bokeh(p, sizing_mode="stretch_width") for p in (left, right)),
                sizing_mode="stretch_width",
            ),
            self.html(f"<h4>what head {head} says by reading {reading}</h4>{tables.scores(*here)}"),
            self.html(
                f"<h4>what head {head} says at {self._named(trace, position)}</h4>{tables.scores(*whole)}"
            ),
        ]

    # --- an MLP ---

    async def _mlp(self, trace: Trace, picked: dict[str, Any], _dark: bool) -> list[Any]:
        layer, position = picked["layer"], picked["position"]
        weight = float(trace.mlp[layer, position])
        head = self._title(
            f"layer {layer}, MLP", f"at {self._named(trace, position)}", f"contribution {weight:.4f}"
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
            return [head, self.html(listed + tables.sentence(f"{NO_MODEL} what each neuron promotes."))]
        listed = tables.table([*heads, "promotes ▲ and suppresses ▼"], rows, numbers=(0, 1, 2))
        whole = f"<h4>what the whole block says</h4>{tables.scores(*says[1])}"
        return [head, self.html(f"<h4>its top neurons</h4>{listed}"), self.html(whole)]

    # --- a state of the stream ---

    async def _node(self, trace: Trace, picked: dict[str, Any], _dark: bool) -> list[Any]:
        layer, site, position = picked["layer"], picked["site"], picked["position"]
        where = {
            "embed": "embedding",
            "mid": f"after layer {layer}’s attention",
            "post": f"after layer {layer}",
        }[site]
        head = self._title("residual stream", f"{self._named(trace, position)}, {where}")
        if not trace.has_model:
            return [head, self.html(tables.sentence(f"{NO_MODEL} the logit lens."))]
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
            self.html(
                f"<h4>the model would say here</h4>{tables.table(heads, rows, numbers=(0, 2, 4))}{note}"
            ),
        ]

    @staticmethod
    def _change(before: int, now: int) -> str:
        sign = "▲" if before > now else "▼" if before < now else "="
        return f"{sign} {before + 1:,}"

    # --- a token ---

    async def _token(self, trace: Trace, picked: dict[str, Any], dark: bool) -> list[Any]:
        position = picked["position"]
        kept = trace.data.edges
        layer = np.repeat(np.arange(trace.n_layers), np.diff(kept.layer_ptr))

        def listed(mine: Any, other: Any) -> str:
            rows_ = np.flatnonzero((mine == position) & (other != position))
            rows_ = rows_[np.argsort(-kept.weight[rows_], kind="stable")[:LISTED]]
            rows = [
                [
                    str(layer[r]),
                    self._cell(trace, int(other[r])),
                    f"{kept.weight[r]:.4f}",
                    tables.share(float(kept.weight[r])),
                ]
                for r in rows_
            ]
            return (
                tables.table(["layer", "token", "contribution", ""], rows, numbers=(0, 2))
                if rows
                else "<p>nothing above the floor</p>"
            )

        received, gave = listed(kept.destination, kept.source), listed(kept.source, kept.destination)
        rolled = await asyncio.to_thread(trace.rollout, position)
        shares = np.asarray(rolled.shares)
        top = [int(p) for p in np.argsort(-shares, kind="stable")[:LISTED] if shares[p] > 0]
        plot = figures.bars(
            [f"{token_label(trace.tokens[p], 14)} [{p}]" for p in top], shares[top], dark,
            title="what its final state came from (rollout over all kept edges)",
        )  # fmt: skip
        return [
            self._title("token", self._named(trace, position)),
            pn.pane.Bokeh(plot, sizing_mode="stretch_width"),
            self.html(f"<h4>received: strongest attention edges into it</h4>{received}"),
            self.html(f"<h4>gave: strongest attention edges out of it</h4>{gave}"),
        ]

    async def _opaque(self, trace: Trace, picked: dict[str, Any], _dark: bool) -> list[Any]:
        layer, position = picked["layer"], picked["position"]
        share = float(trace.opaque[layer, position])
        return [
            self._title(f"layer {layer}", f"at {self._named(trace, position)}", f"contribution {share:.4f}"),
            self.html(
                tables.sentence("A sublayer that was not taken apart: it enters the route as one part.")
            ),
        ]

    # --- pieces ---

    async def _of(self, trace: Trace, look: Callable[[], T]) -> T:
        """From the model through the worker; from what is kept at once."""
        return await self._ask(look) if trace.has_model else look()

    def _title(self, what: str, where: str, number: str = "") -> Any:
        aside = f'<span class="dim"> · {safe(number)}</span>' if number else ""
        return self.html(f'<h3><span class="dim">{safe(what)}</span> {where}{aside}</h3>')

    @staticmethod
    def _named(trace: Trace, position: int) -> str:
        return f'{tables.token(trace.tokens[position])} <span class="dim">[{int(position)}]</span>'

    @staticmethod
    def _cell(trace: Trace, position: int) -> str:
        return f'{tables.token(trace.tokens[position], 16)} <span class="dim">{position}</span>'
