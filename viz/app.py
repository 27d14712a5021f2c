"""The dashboard of one session: the form on the left, the route, what was asked about it beside.

State is `state.State`; the panes read it and write it, and know nothing of each other.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

import panel as pn
import panel_material_ui as pmui
from panel.util.parameters import edit_readonly

from lmtt.errors import LmttError
from lmtt.trace import Trace
from lmtt.viz import tables, theme, views
from lmtt.viz.component import RouteView
from lmtt.viz.details import Details
from lmtt.viz.jobs import CancelledError, Run
from lmtt.viz.panes import FILLING, WIDE, fill, html
from lmtt.viz.state import Asked, Server, Shown, State, read_upload, saved

WAIT = "One moment …"
NOTHING = "No run is shown yet."
POLL = 0.1  # seconds between looks at a run's progress
TABS = ("Details", "Lens", "Contrast", "Heads", "Output", "Cost", "Save")
EXAMPLE = "When Mary and John went to the store, John gave a drink to"


class Dashboard:
    """One session's page."""

    def __init__(self, server: Server, owner: str, front: str = "") -> None:
        """front: digest of the store that the page holds already (`front.py`); empty for none."""
        self.server = server
        self.owner = owner
        self._front = front
        self.state = State()
        self._run: Run[Shown] | None = None
        self._form()
        self.route = RouteView(sizing_mode="stretch_both", min_height=420)
        self.details = Details(self.ask)
        self._tabs()
        self._wire()
        self.page = self._page()
        if server.opened is not None:
            self.state.show(server.opened, keep=True)

    def join(self) -> None:
        """Tie state and session together: the address keeps the state, and who leaves stops their run."""
        if pn.state.location is not None:
            pn.state.location.sync(self.state, {n: n for n in ("threshold", "position", "picked")})
        pn.state.onload(self._sent)
        pn.state.on_session_destroyed(lambda _context: self.stop())

    async def ask(self, question: Callable[[], Any]) -> Any:
        """The answer of the worker's thread."""
        try:
            return await asyncio.wrap_future(self.server.worker.ask(question))
        except LmttError as error:
            told = self.server.policy.told(error)
            if told == str(error):
                raise
            raise LmttError(told) from None

    # --- the form ---

    def _form(self) -> None:
        names = list(self.server.models.names)
        self.model = pmui.Select(
            label="Model", options=names, value=names[0] if names else None, margin=(16, 10, 5, 10), **WIDE
        )
        opened = self.server.opened
        given = (EXAMPLE if names else "") if opened is None else opened.prompt
        self.prompt = pmui.TextAreaInput(
            label="Prompt", value=given, rows=4, max_rows=12, auto_grow=True, **WIDE
        )
        self.generate = pmui.IntInput(label="Output tokens to generate", value=0, start=0, end=256, **WIDE)
        self.floor = pmui.Select(label="Keep edges above", options=[0.0001, 0.001, 0.01], value=0.001, **WIDE)
        self.measure = pmui.Select(label="Measure", options=["l1", "l2"], value="l1", **WIDE)
        self.special = pmui.Checkbox(label="Add the tokenizer’s special tokens", value=True)
        options = pn.Column(self.generate, self.floor, self.measure, self.special, **WIDE)
        self.options = pmui.Accordion(
            ("Options", options), disable_gutters=True, margin=(5, 10), sx=_OPTIONS, **WIDE
        )
        self.button = pmui.Button(label="Trace", color="primary", variant="contained", **WIDE)
        self.cancel = pmui.Button(
            label="Cancel", color="error", variant="outlined", visible=False, sx=_CANCEL, **WIDE
        )
        self.progress = pmui.LinearProgress(
            value=0, variant="determinate", visible=False, margin=(0, 10), **WIDE
        )
        self.message = html("")
        self.recent = pmui.Select(label="Recent runs", options=[], visible=False, **WIDE)
        self.upload = pn.widgets.FileInput(accept=".lmtt", multiple=False, stylesheets=[_FILE], **WIDE)
        self.path = pmui.TextInput(label="or a run on this machine", placeholder="path, then Enter", **WIDE)

    def say(self, text: str, *, trouble: bool = False) -> None:
        """A sentence below the run button; `trouble`: one that must not be overlooked."""
        kind = 'role="alert" class="trouble"' if trouble else 'role="status"'
        fill(self.message, f"<div {kind}>{tables.sentence(text)}</div>" if text else "")

    async def run(self, *_: Any) -> None:
        """Trace what the form holds; progress and trouble are said on the page."""
        asked = Asked(
            str(self.model.value or ""), self.prompt.value or "", int(self.generate.value or 0),
            float(self.floor.value), str(self.measure.value), bool(self.special.value),
        )  # fmt: skip
        models, policy, worker = self.server.models, self.server.policy, self.server.worker
        try:
            if not models.names:
                raise LmttError("this server has no model", remedy="start it with lmtt serve MODEL")
            asked.check(policy)
            run = worker.run(lambda report: asked.run(models, policy, report), self.owner)
        except LmttError as error:
            self.say(policy.told(error), trouble=True)
            return
        self._run = run
        self.button.disabled, self.cancel.visible, self.progress.visible = True, True, True
        try:
            while not run.result.done():
                self._show_progress(run)
                await asyncio.sleep(POLL)
            shown = run.result.result()
        except CancelledError:
            self.say("The run was cancelled.")
        except LmttError as error:
            self.say(policy.told(error), trouble=True)
        except MemoryError:
            self.say("The run needs more memory than there is; trace a shorter prompt.", trouble=True)
        except Exception as error:  # a defect of ours; the session and the server live on
            self.say(f"The run failed: {policy.told(error)}", trouble=True)
            raise
        else:
            self.say("")
            self.state.show(shown)
        finally:
            self._run = None
            self.button.disabled, self.cancel.visible, self.progress.visible = False, False, False

    def _show_progress(self, run: Run[Shown]) -> None:
        ahead, (done, total) = self.server.worker.ahead(run), run.progress
        if ahead:
            self.progress.variant = "indeterminate"
            self.say(f"Waiting: {ahead} run{'s' if ahead > 1 else ''} before yours.")
        elif not total:
            self.progress.variant = "indeterminate"
            self.say("Preparing the model …")
        else:
            self.progress.variant, self.progress.value = "determinate", int(100 * done / total)
            self.say(f"layer {done} of {total}")

    def stop(self, *_: Any) -> None:
        """Cancel the run that is going, before its next layer."""
        if self._run is not None:
            self._run.cancel()

    async def open_upload(self, event: Any) -> None:
        """Show a run file that the browser sent."""
        if event.new:
            name = str(self.upload.filename or "the file")
            models, most = self.server.models, self.server.policy.max_tokens
            await self._open(lambda: read_upload(name, event.new, models.attach, most))

    async def open_path(self, event: Any) -> None:
        """Show a run on this machine; for servers that only this machine can reach."""
        if event.new and self.server.policy.loopback:
            from lmtt.run.reader import read_run

            await self._open(lambda: Shown(self.server.models.attach(Trace(read_run(event.new)))))

    async def _open(self, read: Callable[[], Shown]) -> None:
        try:
            shown = await asyncio.to_thread(read)
        except LmttError as error:
            self.say(f"This run cannot be opened: {self.server.policy.told(error)}", trouble=True)
        else:
            self.say("")
            self.state.show(shown)

    # --- tabs ---

    def _tabs(self) -> None:
        self.lens_shade = pmui.RadioButtonGroup(
            options=["top token", "rank", "entropy"], value="top token", size="small", sx=_CHOICE
        )
        self.chosen = pmui.TextInput(
            label="rank of token", placeholder="what it says (a space in front counts)", size="small", **WIDE
        )
        self.target = pmui.TextInput(label="target token", placeholder="predicted", size="small", **WIDE)
        self.foil = pmui.TextInput(label="minus foil", placeholder="none", size="small", **WIDE)
        self.per = pmui.RadioButtonGroup(
            options=["the route", "the start alone"], value="the route", size="small", sx=_CHOICE
        )
        self.bodies = {name: pn.Column(name=name, stylesheets=[FILLING], **WIDE) for name in TABS[1:]}
        self.files = self._downloads()
        columns: dict[str, Any] = {
            "Details": self.details.pane,
            "Lens": pn.Column(pn.Row(self.lens_shade, self.chosen, **WIDE), self.bodies["Lens"], **WIDE),
            "Contrast": pn.Column(pn.Row(self.target, self.foil, **WIDE), self.bodies["Contrast"], **WIDE),
            "Heads": pn.Column(self.per, self.bodies["Heads"], **WIDE),
            "Output": self.bodies["Output"],
            "Cost": self.bodies["Cost"],
            "Save": self.files,
        }
        # Tabs that nobody looked at are not sent: a third of the page.
        self.tabs = pmui.Tabs(*columns.items(), dynamic=True, sx=_TABS, **WIDE)
        self._fresh: dict[str, Any] = {}

    def _downloads(self) -> Any:
        def file(label: str, name: str, make: Callable[[], bytes]) -> Any:
            def ready() -> io.BytesIO:
                if self.state.trace is None:
                    raise LmttError("there is no run yet", remedy="trace a prompt first")
                return io.BytesIO(make())

            made = pmui.FileDownload(
                callback=ready, filename=name, label=label, auto=True, embed=False, sx=_OUTLINED, **WIDE
            )
            made.variant = "outlined"  # given above, panel would take it for two settings and warn
            return made

        def route() -> Any:
            assert self.state.trace is not None
            return self.state.trace.route(self.state.start, self.state.threshold)

        def page() -> bytes:
            from lmtt.viz.page import route_page

            return route_page(route()).encode()

        def csv() -> bytes:
            from lmtt.graph.tables import route_csv

            return route_csv(route()).encode("utf-8", "replace")

        def document(make: Callable[[], Any]) -> Callable[[], bytes]:
            return lambda: json.dumps(make(), ensure_ascii=False).encode("utf-8", "replace")

        return pn.Column(
            html(
                tables.sentence(
                    "The route as it is shown now, and the whole run. PNG and SVG: above the graph."
                )
            ),
            file("One interactive page (HTML)", "route.html", page),
            file("Route (JSON)", "route.json", document(lambda: route().to_json())),
            file("Edges (CSV)", "route.csv", csv),
            file(
                "Neuronpedia graph (JSON)",
                "route-neuronpedia.json",
                document(lambda: route().to_neuronpedia()),
            ),
            file("The run (.lmtt)", "run.lmtt", lambda: saved(self.state.trace)),  # type: ignore[arg-type]
            name="Save",
            **WIDE,
        )

    async def refresh(self, *_: Any) -> None:
        """Fill the tab that is looked at, if what it shows has changed since."""
        name, state = TABS[self.tabs.active], self.state
        trace = state.trace
        if name in ("Details", "Save"):
            return
        if trace is None:
            self.bodies[name][:] = [html(tables.sentence(NOTHING))]
            return
        body, start, dark = self.bodies[name], state.start, state.dark
        depends = {
            "Lens": (start, self.lens_shade.value, self.chosen.value),
            "Contrast": (start, self.target.value, self.foil.value),
            "Heads": (start, self.per.value, state.threshold),
            "Output": (),
            "Cost": (),
        }[name]
        key = (trace, dark, depends)
        if self._fresh.get(name) == key:
            return
        self._fresh[name] = key
        body.loading = True
        if not body.objects:
            body[:] = [html(tables.sentence(WAIT))]
        try:
            found = await self._tab(name, trace, start, dark)
        except LmttError as error:
            found = [html(tables.sentence(str(error)))]
        finally:
            body.loading = False
        if self._fresh.get(name) == key:  # else somebody was quicker, and that call fills it
            body[:] = found

    async def _tab(self, name: str, trace: Trace, start: int, dark: bool) -> list[Any]:
        match name:
            case "Lens":
                shade, chosen = self.lens_shade.value, self.chosen.value or ""
                return await views.lens(trace, start, shade, chosen, dark, self.ask, html, self.pick)
            case "Contrast":
                target, foil = self.target.value or "", self.foil.value or ""
                return await views.contrast(trace, start, target, foil, dark, self.ask, html)
            case "Heads":
                return await views.heads(trace, start, self.state.threshold, self.per.value, dark, self.pick)
            case "Output":
                return views.output(self.state.shown.generation, dark, html, self.pick)
        return views.cost(trace, dark, html)

    def pick(self, what: dict[str, Any]) -> None:
        """As if it had been clicked in the graph."""
        if what["kind"] == "trace":
            self.state.position = what["position"]
            return
        self.state.picked = what
        self.tabs.active = 0

    # --- who tells whom ---

    def _wire(self) -> None:
        state, route = self.state, self.route
        self.button.on_click(self.run)
        self.cancel.on_click(self.stop)
        self.upload.param.watch(self.open_upload, "value")
        self.path.param.watch(self.open_path, "value")
        self.recent.param.watch(self._again, "value")
        for name in ("threshold", "position", "picked"):
            route.link(state, **{name: name}, bidirectional=True)
        route.link(state, dark="dark", bidirectional=True)
        state.param.watch(self._shown, "shown")
        state.param.watch(self._listed, "recent")
        route.param.watch(self._wanted, "wanted")
        state.param.watch(self._picked, ["picked", "shown", "dark"])
        state.param.watch(self.refresh, ["shown", "position", "threshold", "dark"])
        self.tabs.param.watch(self.refresh, "active")
        self.tabs.param.watch(self._sent, "active")
        for widget in (self.lens_shade, self.chosen, self.target, self.foil, self.per):
            widget.param.watch(self.refresh, "value")

    def _shown(self, event: Any) -> None:
        here = event.old is None and event.new is self.server.opened and self._front
        what = {"opened": self._front} if here else {"store": event.new.store}
        self.route.param.update(**what, threshold=self.state.threshold, position=self.state.start)

    def _sent(self, *_: Any) -> None:
        self.route.sent += 1

    def _wanted(self, event: Any) -> None:
        """The page was made by a server that showed another run: it came back to this one by itself."""
        if event.new and self.state.shown is not None:
            self.route.store = self.state.shown.store

    def _listed(self, event: Any) -> None:
        # Two runs of one prompt must stay two entries.
        names = [f"{n + 1}. {shown.label}" for n, shown in enumerate(event.new)]
        self.recent.param.update(options=dict(zip(names, event.new, strict=True)), value=self.state.shown)
        self.recent.visible = len(event.new) > 1

    def _again(self, event: Any) -> None:
        if event.new is not None and event.new is not self.state.shown:
            self.state.show(event.new)

    async def _picked(self, *changed: Any) -> None:
        # Not for another theme, which would take readers from what they look at.
        jump = self.state.picked and self.tabs.active != 0 and any(one.name == "picked" for one in changed)
        if jump:
            self.tabs.active = 0
        await self.details.show(self.state.trace, self.state.picked, self.state.dark)
        if jump and self.tabs.active == 0:
            # Panel keeps this from a browser that has just told it of another tab.
            self.tabs.param.trigger("active")

    # --- the page ---

    def _page(self) -> Any:
        opens: list[Any] = [html("<h4>Open a run file (.lmtt)</h4>"), self.upload]
        if self.server.policy.loopback:
            opens.append(self.path)
        form = [self.model, self.prompt, self.options, self.button, self.cancel, self.progress]
        sidebar = (
            [*form, self.message, self.recent, *opens]
            if self.server.models.names
            else [self.message, self.recent, *opens]
        )
        graph = pn.Column(self.route, sizing_mode="stretch_both", css_classes=["graph"], stylesheets=[_LEFT])
        beside = pn.Column(
            self.tabs,
            css_classes=["beside"],
            stylesheets=[_RIGHT],
            scroll="y-auto",
            sizing_mode="stretch_both",
        )
        page = pmui.Page(
            title="lmtt · why did it say that?",
            sidebar=sidebar,
            sidebar_width=300,
            main=[pn.Row(graph, beside, sizing_mode="stretch_both", styles=_MAIN)],
            theme_config=_THEMES,
            busy_indicator=None,
        )
        with edit_readonly(page):
            # It follows whatever anybody on this server does, at the price of a search through this page's
            # models each time.
            page.busy = False
        page.param.watch(self._switched, "dark_theme")
        self.state.param.watch(lambda e: setattr(page, "dark_theme", e.new), "dark")
        self.state.dark = bool(page.dark_theme)
        return page

    def _switched(self, event: Any) -> None:
        """The page's own switch: from now on the reader's system is not followed."""
        if bool(event.new) != self.state.dark:
            self.route.by_hand = True
            self.state.dark = bool(event.new)


_THEMES = {
    name: {
        "palette": {"primary": {"main": blue}, "background": {"default": colours.bg, "paper": colours.card}}
    }
    for name, colours, blue in (("light", theme.LIGHT, "#0f6ba8"), ("dark", theme.DARK, "#2b6b99"))
}
_FILE = """
input { color: var(--muted) !important; background: var(--card) !important; }
input { border-color: var(--line) !important; }
input::file-selector-button { color: var(--text) !important; background: var(--band) !important; }
"""
_MAIN = {"height": "calc(100vh - 68px)", "padding": "10px", "gap": "10px"}
_LEFT = ":host { flex: 1 1 56%; min-width: 460px; height: 100%; }"
_TABS = {
    "& .MuiTab-root": {
        "minWidth": 0,
        "px": 0.9,
        "py": 0.5,
        "textTransform": "none",
        "minHeight": 40,
        "fontSize": 13,
    },
    "& .MuiTab-root.Mui-selected": {"color": "var(--text)", "fontWeight": 600},
    "& .MuiTabs-scrollButtons.Mui-disabled": {"display": "none"},
}
_OPTIONS = {
    "& .MuiAccordion-root": {"boxShadow": "none", "border": "1px solid var(--line)", "borderRadius": "4px"},
    "& .MuiAccordion-root::before": {"display": "none"},
    "& .MuiAccordionSummary-root": {"minHeight": 40, "px": 1.75},
    "& .MuiAccordionSummary-content": {"my": 0.75},
    "& .MuiAccordionSummary-content .MuiTypography-root": {"fontSize": 14},
    "& .MuiAccordionDetails-root": {"p": 0},
    "& .MuiSvgIcon-root": {"color": "var(--muted)"},
}
_CANCEL = {"textTransform": "none", "fontWeight": 600}
_OUTLINED = {"color": "var(--text)", "borderColor": "var(--node-line)", "textTransform": "none"}
_CHOICE = {"& .MuiButtonBase-root": {"textTransform": "none", "whiteSpace": "nowrap", "py": 0.2}}
_RIGHT = ":host { flex: 1 1 44%; min-width: 380px; height: 100%; overflow-x: hidden; }"
