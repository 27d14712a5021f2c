"""What the dashboard costs in a browser: headless Chromium, software rasterisation, medians.

    python benchmarks/dashboard.py [--moves 15] [--only file served] [--out FILE.json]
    python benchmarks/dashboard.py --docs     # nothing is measured: the stored report into docs/dashboard.md

About four minutes on two quiet cores. Status 1 if a limit is missed. A whole measurement that goes to the
usual place is written into docs/dashboard.md as well.

1. Traces without a model are made up at two sizes: 141 tokens x 30 layers, and 1024 x 80 with 500,000 edges.
2. As a file: bytes, load to a usable view, `frame` of slider moves, starts and pans, heap.
3. Served: load, bytes to the server for a slider move, a click to its details (two 256 x 256 maps and tables)
   and another person's click while a run is going: traces of a random model of the demo model's size, on all
   processors.

`frame` is from setting a widget to the second animation frame after, so that what was drawn is on the screen;
`draw` is the time of our own script within it. `stretch` is how many times as long as its fastest repetition
a fixed computation takes in the median: 1.0 on a quiet machine; where it is more, others use the processors,
and every figure beside it is too large.

`received until then` is what had come over the network when the graph could be used. `complete` is all that
had come when the session behind it answered: our own part, and the scripts of Panel and Bokeh.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from playwright.sync_api import Browser, Page, sync_playwright

from lmtt import load
from lmtt.graph.routes import route
from lmtt.graph.testing import random_trace
from lmtt.run.data import Edges, Neurons, Predictions, TraceData
from lmtt.testing_memory import write_llama
from lmtt.trace import ExactRows, Neuron, TokenScore, Trace
from lmtt.viz.models import Models
from lmtt.viz.page import route_page
from lmtt.viz.state import Policy, Server

LIMITS = {
    "frame, ms": 100.0, "start, ms": 150.0, "load, s": 2.0, "served load, s": 2.0, "page, MB": 6.0,
    "received until then, MB": 5.0, "short page, MB": 2.0, "heap, MB": 100.0, "bytes a slider move": 1000.0,
    "click to details, ms": 150.0, "another's click during a run, ms": 250.0,
}  # fmt: skip
UNLIMITED = ("complete: own, MB", "complete: Panel and Bokeh, MB")  # shown beside what is limited
RUN_MODEL = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152,
}  # fmt: skip # of the run beside somebody's clicks: as the demo model
RUN_TOKENS = 256
LOADS = 10
FIRST = 2  # clicks that are not counted: they load the charts' code
OUT = Path(__file__).with_name("results") / "dashboard.json"
DOCS = Path(__file__).parents[1] / "docs" / "dashboard.md"
MARKERS = ("<!-- figures -->", "<!-- end of figures -->")  # what is between them in DOCS is written here


# --- traces without a model ---


def made_up(tokens: int, layers: int, per_row: int, seed: int = 0) -> TraceData:
    """Shares that look like a run's: most of a row is residual, a few sources take the rest."""
    random = np.random.default_rng(seed)
    destination = np.repeat(np.tile(np.arange(tokens), layers), per_row)
    layer = np.repeat(np.arange(layers), tokens * per_row)
    near = random.geometric(0.08, len(destination)) - 1
    source = np.where(random.random(len(near)) < 0.3, 0, np.maximum(0, destination - near))
    unique = np.unique(np.stack([layer, destination, source]), axis=1)
    layer, destination, source = unique
    weight = np.minimum(0.6, random.lognormal(-4.0, 1.4, len(layer))).astype(np.float32) + np.float32(1.1e-3)
    shape = (layers, tokens)
    mlp = random.beta(1.2, 6, shape).astype(np.float32)
    zeros = np.zeros(shape, np.float32)
    logit = -np.sort(-random.normal(0, 3, (tokens, 5)), axis=1).astype(np.float32)
    return TraceData(
        tokens=tuple(f" t{i}" for i in range(tokens)), input_ids=np.arange(tokens),
        parallel=np.zeros(layers, bool), residual=random.beta(8, 2, shape).astype(np.float32), mlp=mlp,
        passthrough=1 - mlp, bias=zeros, opaque=zeros, rest=zeros, certificate=zeros,
        edges=Edges(
            np.searchsorted(layer, np.arange(layers + 1)), destination.astype(np.int32),
            source.astype(np.int32), weight, np.arange(len(layer) + 1),
            random.integers(0, 32, len(layer)).astype(np.int32), weight,
        ),
        neurons=Neurons(np.full((*shape, 1), -1, np.int32), zeros[..., None], zeros[..., None], zeros),
        predictions=Predictions(np.tile(np.arange(5, dtype=np.int32), (tokens, 1)), logit, logit.max(1) + 1),
        resid_pre=None,
        meta={
            "model": {"name": "made up", "n_layers": layers, "n_heads": 32}, "floor": 1e-3, "screen": 0.0,
            "measure": "l1", "dtype": "float32", "versions": {},
            "prediction_tokens": {str(i): f" p{i}" for i in range(5)},
        },
        cost={},
    )  # fmt: skip


class Prepared:
    """Answers at once: what is measured is the page and the server, not a model."""

    def __init__(self, tokens: int, heads: int) -> None:
        self._map = np.tril(np.random.default_rng(1).random((tokens, tokens), np.float32))
        self._scores = [TokenScore(f" word{i}", i, float(i)) for i in range(10)]
        self._heads = heads

    def exact_rows(self, data: TraceData, layer: int, rows: list[int]) -> ExactRows:
        zero = np.zeros(len(rows), np.float32)
        pairs = np.full((len(rows), self._heads, len(data.tokens)), 0.01, np.float32)
        return ExactRows(pairs, zero, zero, zero)

    def head_shares(self, data: TraceData, layer: int, head: int) -> Any:
        return self._map

    attention_pattern = head_shares

    def promoted(self, *_: Any) -> Any:
        return self._scores, self._scores

    def neurons(self, data: TraceData, layer: int, position: int, k: int) -> list[Neuron]:
        return [Neuron(i, 0.1, 1.0) for i in range(k)]

    def check_same_model(self, data: TraceData) -> None:
        return


class Endless:
    """Traces a random model of the demo model's size over and over on all processors, until cancelled."""

    tokenizer = None

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._engine = load(write_llama(Path(folder) / "model", torch.float32, tied=True, **RUN_MODEL))
        self.info = self._engine.info

    def trace(self, prompt: str, progress: Any, **_: Any) -> Any:
        torch.set_num_threads(os.cpu_count() or 1)  # of this thread, whatever the environment says
        ids = np.arange(RUN_TOKENS)
        while True:
            self._engine.trace(input_ids=ids, progress=progress)


# --- measuring ---

MOVE = """async (action) => {
  const times = [], draws = [];
  const frame = () => new Promise(requestAnimationFrame);
  const draw = view.draw.bind(view);
  view.draw = () => { const t = performance.now(); draw(); draws.push(performance.now() - t); };
  for (let i = 0; i < MOVES; i++) {
    await frame(); await frame();
    const t = performance.now();
    ACTION;
    await frame(); await frame();
    times.push(performance.now() - t);
  }
  delete view.draw;
  return [times, draws];
}"""
SLIDER = (  # from the page's floor to 0.3, in no order
    "view.slider.value = Math.log10(store.floor * 1.02) * (1 - ((i * 7) % MOVES) / MOVES)"
    " + Math.log10(0.3) * ((i * 7) % MOVES) / MOVES;"
    "view.slider.dispatchEvent(new Event('input'))"
)
START = "view.trace(store.tokens - 2 - i)"
PAN = "view.pan(i % 2 ? 3 : -3)"
STRETCH = """() => {
  const times = [];
  for (let i = 0; i < 31; i++) {
    const t = performance.now();
    let sum = 0;
    for (let x = 0; x < 2e6; x++) sum += Math.sqrt(x);
    if (sum > 0) times.push(performance.now() - t);
  }
  times.sort((a, b) => a - b);
  return times[15] / times[0];
}"""
TWO_FRAMES = "async () => { const f = () => new Promise(requestAnimationFrame); await f(); await f() }"


def median_ms(page: Page, action: str, moves: int) -> tuple[float, float]:
    """(frame, draw), medians in ms."""
    script = MOVE.replace("ACTION", action).replace("MOVES", str(moves))
    prelude = "const {view, store} = window.lmtt; return ("
    times, draws = page.evaluate(f"async () => {{ {prelude}{script})() }}")
    return statistics.median(times), statistics.median(draws or [0.0])


def as_file(browser: Browser, data: TraceData, moves: int) -> dict[str, dict[str, float]]:
    """Figures of the exported page, by window."""
    start = time.perf_counter()
    text = route_page(route(data, -1, 0.04))
    written = time.perf_counter() - start
    # The page's own policy would refuse what the driver evaluates, so it is set aside here.
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, offline=True, bypass_csp=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "route.html"
        path.write_text(text, "utf-8")
        loads = []
        for n in range(LOADS):
            page = context.new_page()
            start = time.perf_counter()
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready]")
            page.evaluate(TWO_FRAMES)
            loads.append(time.perf_counter() - start)
            if n < LOADS - 1:
                page.close()
    store = page.evaluate("document.getElementById('store').textContent.length * 0.75 / 1e6")
    figures = {
        "edges": page.evaluate("lmtt.store.size"), "written, s": written, "load, s": statistics.median(loads),
        "page, MB": len(text.encode()) / 1e6, "store, MB": store,
        "received until then, MB": len(text.encode()) / 1e6,  # a file comes whole and alone
    }  # fmt: skip
    result = {"file": figures}
    windows = {"40 tokens": 40, "48 tokens": 48, "all tokens": len(data.tokens)}
    page.evaluate("lmtt.view.fold && lmtt.view._toggleFold()")
    for name, width in windows.items():
        page.evaluate(
            "(n) => { const v = lmtt.view; v.fit(); v.view.x0 = Math.max(0, v.view.x1 - n); v.draw() }", width
        )
        slider, draw = median_ms(page, SLIDER, moves)
        pan, stretch = median_ms(page, PAN, moves)[0], page.evaluate(STRETCH)
        result[name] = {"frame, ms": slider, "draw, ms": draw, "pan, ms": pan, "stretch": stretch}
    page.evaluate("lmtt.view._toggleFold()")
    result["folded"] = {"frame, ms": median_ms(page, SLIDER, moves)[0]}
    start_, stretch = median_ms(page, START, moves)[0], page.evaluate(STRETCH)
    heap = page.context.new_cdp_session(page)
    heap.send("HeapProfiler.collectGarbage")
    usage = heap.send("Runtime.getHeapUsage")
    held = (usage["usedSize"] + usage.get("backingStorageSize", 0)) / 1e6
    result["start"] = {"start, ms": start_, "stretch": stretch, "heap, MB": held}
    context.close()
    return result


@contextmanager
def serving(models: Models, first: Trace | None) -> Iterator[str]:
    """The dashboard in a thread of its own."""
    from lmtt.viz.jobs import Worker
    from lmtt.viz.serve import Settings, listen

    worker, ready, found = Worker(), threading.Event(), []

    def loop() -> None:
        asyncio.set_event_loop(asyncio.new_event_loop())
        found.append(listen(Settings(port=0), Server(models, worker, Policy(), first)))
        ready.set()
        found[0].io_loop.start()

    threading.Thread(target=loop, daemon=True).start()
    ready.wait()
    yield f"http://127.0.0.1:{found[0].port}/"
    found[0].io_loop.add_callback(found[0].io_loop.stop)
    worker.close()


@dataclass
class Traffic:
    """What a page sent by websocket, message by message, and how many bytes came to it, as transferred."""

    sent: list[int] = field(default_factory=list)
    # Bytes by when they came, in seconds of the clock on the wall.
    scripts: list[tuple[float, int]] = field(default_factory=list)  # Panel's and Bokeh's, which never change
    own: list[tuple[float, int]] = field(default_factory=list)  # our page with the store in it, and messages

    def watch(self, page: Page) -> None:
        """Count from now on. Heads of answers, a few hundred bytes each, are not counted."""
        addresses: dict[str, str] = {}
        clock = 0.0  # from the browser's own clock to the one on the wall

        def asked(event: dict[str, Any]) -> None:
            nonlocal clock
            addresses[event["requestId"]] = event["request"]["url"]
            clock = event["wallTime"] - event["timestamp"]

        def arrived(event: dict[str, Any]) -> None:
            path = urlsplit(addresses.get(event["requestId"], "")).path
            # The length as transferred is left at nothing for what comes in pieces that are not compressed.
            count = event["encodedDataLength"] or event["dataLength"]
            kind = self.own if path in ("", "/") else self.scripts
            kind.append((event["timestamp"] + clock, count))

        def message(event: dict[str, Any]) -> None:
            frame = event["response"]
            text = frame["payloadData"]
            size = len(text.encode()) if frame["opcode"] == 1 else len(text) * 3 // 4  # in base64
            self.own.append((event["timestamp"] + clock, size))

        network = page.context.new_cdp_session(page)
        network.on("Network.requestWillBeSent", asked)
        network.on("Network.dataReceived", arrived)
        network.on("Network.webSocketFrameReceived", message)
        network.on(
            "Network.webSocketFrameSent", lambda e: self.sent.append(len(e["response"]["payloadData"]))
        )
        network.send("Network.enable")


def opened(browser: Browser, address: str) -> Page:
    """A page on the dashboard whose session answers."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    _go(page, address)
    return page


def loaded(browser: Browser, address: str) -> tuple[Page, Traffic, dict[str, float]]:
    """Likewise, what it sends and gets, and figures of its load: to watch the network takes time by itself.

    It is loaded where its graph is drawn and can be used, by the page's own clock from when it was asked for;
    it is complete where its session answers.
    """
    page, traffic = browser.new_page(viewport={"width": 1280, "height": 900}), Traffic()
    traffic.watch(page)
    _go(page, address)
    began, took = page.evaluate(
        "[performance.timeOrigin, performance.getEntriesByName('lmtt drawn')[0].startTime]"
    )
    drawn = (began + took) / 1e3
    received = [*traffic.own, *traffic.scripts]
    figures = {
        "served load, s": took / 1e3,
        "received until then, MB": sum(size for when, size in received if when <= drawn) / 1e6,
        "complete: own, MB": sum(size for _, size in traffic.own) / 1e6,
        "complete: Panel and Bokeh, MB": sum(size for _, size in traffic.scripts) / 1e6,
    }
    return page, traffic, figures


def _go(page: Page, address: str) -> None:
    page.goto(address, wait_until="commit")  # the document ends long after its graph can be used
    page.wait_for_selector("[data-ready][data-session] .rv-canvas")  # the session behind it
    page.wait_for_timeout(1500)


def click(page: Page, picked: dict[str, Any], text: str) -> float:
    """ms from a click in the graph to the details' new text and the frame after it."""
    script = """async (root, [picked, text]) => {
      const frame = () => new Promise(requestAnimationFrame);
      const within = (node, found) => {
        for (const e of node.querySelectorAll('*')) if (e.shadowRoot) within(e.shadowRoot, found);
        if (node.host) found.push(node);
        return found;
      };
      // Only where a title is: to read the whole page at each frame would be most of what is measured.
      const titles = () => within(document.body, []).flatMap((r) => [...r.querySelectorAll('.lmtt h3')]);
      let shown = titles();
      const t = performance.now();
      root.view.options.onPick(picked);
      for (let n = 0; !shown.some((h) => h.textContent.includes(text)); n++) {
        await frame();
        if (performance.now() - t > 60_000) throw new Error(`no details of ${text}`);
        if (n % 5 === 4 || shown.some((h) => !h.isConnected)) shown = titles();
      }
      await frame();
      return performance.now() - t;
    }"""
    return float(page.locator(".rv").evaluate(script, [picked, text]))


def attention_pick(trace: Trace, row: int) -> tuple[dict[str, Any], str]:
    """A click on a kept attention edge, and the text by which its details are known."""
    kept = trace.data.edges
    layer = int(np.searchsorted(kept.layer_ptr, row, side="right") - 1)
    picked = {
        "kind": "attention", "layer": layer, "source": int(kept.source[row]),
        "position": int(kept.destination[row]),
    }  # fmt: skip
    return picked, f"contribution {trace.attention(layer)[picked['position'], picked['source']]:.4f}"


def served(browser: Browser, moves: int) -> dict[str, dict[str, float]]:
    """Figures of the served dashboard."""
    result: dict[str, dict[str, float]] = {}
    with serving(Models([], lambda name: None), Trace(made_up(1024, 80, 4))) as address:
        loads = []
        for n in range(LOADS):
            page, traffic, figures = loaded(browser, address)
            loads.append(figures)
            if n < LOADS - 1:
                page.close()
        result["load"] = {what: statistics.median(one[what] for one in loads) for what in loads[0]}
        traffic.sent.clear()
        for value in np.linspace(-1.8, -0.5, moves):
            page.locator(".rv-slider").fill(f"{value:.3f}")
            page.wait_for_timeout(400)
        result["slider"] = {"bytes a slider move": sum(traffic.sent) / moves}
        page.close()

    data = made_up(256, 30, 6)
    # A residual stream of one number is enough for a trace to say that it can ask its model.
    trace = Trace(replace(data, resid_pre=np.zeros((1, 1, 1), np.float32)), Prepared(256, 32))  # type: ignore[arg-type]
    rows = np.flatnonzero((data.edges.destination > 200) & (data.edges.source != data.edges.destination))
    with serving(Models([], lambda name: None), trace) as address:
        page = opened(browser, address)
        times = []
        for row in rows[: FIRST + moves].tolist():
            times.append(click(page, *attention_pick(trace, row)))
            page.wait_for_timeout(350)
        result["details"] = {
            "click to details, ms": statistics.median(times[FIRST:]), "stretch": page.evaluate(STRETCH),
        }  # fmt: skip
        page.close()
    return result | during_a_run(browser)


def during_a_run(browser: Browser) -> dict[str, dict[str, float]]:
    """Somebody's clicks while another's run goes on, and before it."""
    models = Models(["endless"], lambda name: Endless())  # type: ignore[arg-type,return-value]
    models.put("endless", Endless())  # type: ignore[arg-type]
    with serving(models, Trace(random_trace(4, tokens=14))) as address:
        busy, other = opened(browser, address), opened(browser, address)

        def clicks(first: int, count: int) -> list[float]:
            found = []
            for n in range(first, first + count):
                found.append(click(other, {"kind": "token", "position": n}, f"token ·t{n} [{n}]"))
                other.wait_for_timeout(150)
            return found

        alone = clicks(0, 12)[FIRST:]
        busy.get_by_label("Prompt").fill("a prompt")
        busy.get_by_role("button", name="Trace", exact=True).click()
        busy.get_by_text("of 30").first.wait_for()
        times = clicks(0, 10)
        busy.get_by_role("button", name="Cancel").click()
        busy.get_by_text("The run was cancelled.").wait_for()
    figures = {
        "another's click during a run, ms": statistics.median(times), "slowest, ms": max(times),
        "the same without a run, ms": statistics.median(alone),
    }  # fmt: skip
    return {"another": figures}


def missed(found: dict[str, dict[str, float]]) -> list[str]:
    """What is beyond its limit, or is no number."""
    return [
        f"{group}: {what} {value:,.2f} > {LIMITS[what]}"
        for group, figures in found.items()
        for what, value in figures.items()
        if what in LIMITS and not value <= LIMITS[what]
    ]


def show(name: str, groups: dict[str, dict[str, float]]) -> None:
    """One line for each group of figures."""
    for group, figures in groups.items():
        line = "  ".join(f"{what} {value:,.2f}" for what, value in figures.items())
        print(f"{name:10} {group:12} {line}", flush=True)


def table(report: dict[str, Any]) -> str:
    """The figures that have a limit and those that belong beside them, as Markdown."""
    lines = ["| run | view | figure | measured | limit |", "|---|---|---|---:|---:|"]
    for run, groups in report["figures"].items():
        for view, figures in groups.items():
            for what, value in figures.items():
                limit = report["limits"].get(what)
                if limit is not None or what in UNLIMITED:
                    late = "" if limit is None or value <= limit else " **missed**"
                    most = "" if limit is None else f"{limit:g}"
                    lines.append(f"| {run} | {view} | {what} | {value:,.4g}{late} | {most} |")
    stretch = [f["stretch"] for g in report["figures"].values() for f in g.values() if "stretch" in f]
    busy = f"; `stretch` was at most {max(stretch):.2f}" if stretch else ""
    return "\n".join(
        [
            *lines,
            "",
            f"Chromium {report['chromium']}, {report['processors']} processors ({report['machine']}), "
            f"software rasterisation; medians of {report['medians_of']}, of loads {report['loads']}{busy}. "
            "`python benchmarks/dashboard.py` measures and writes this.",
        ]
    )


def write_docs(report: dict[str, Any], path: Path) -> None:
    """The table in place of what is between the markers."""
    before, _, rest = path.read_text("utf-8").partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    path.write_text(f"{before}{MARKERS[0]}\n\n{table(report)}\n\n{MARKERS[1]}{after}", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=("file", "served"), default=["file", "served"])
    parser.add_argument("--out", type=Path, default=OUT, help="%(default)s")
    parser.add_argument("--docs", action="store_true", help="only write the stored report into the docs")
    options = parser.parse_args()
    if options.docs:
        if not options.out.is_file():
            print(f"{options.out} does not exist: measure first, without --docs", file=sys.stderr)
            return 2
        write_docs(json.loads(options.out.read_text()), DOCS)
        return 0
    chromium = shutil.which("chromium")
    if chromium is None:
        print("this needs Chromium", file=sys.stderr)
        return 2
    found: dict[str, dict[str, dict[str, float]]] = {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        version = browser.version
        if "file" in options.only:
            short = len(route_page(route(made_up(14, 30, 8), -1, 0.04)).encode()) / 1e6
            found["14 x 30"] = {"file": {"short page, MB": short}}
            for name, shape in (("141 x 30", (141, 30, 16)), ("1024 x 80", (1024, 80, 4))):
                found[name] = as_file(browser, made_up(*shape), options.moves)
        if "served" in options.only:
            found["served"] = served(browser, options.moves)
        browser.close()
    for name, groups in found.items():
        show(name, groups)
    late = [f"{name}, {line}" for name, groups in found.items() for line in missed(groups)]
    for line in late:
        print(f"missed: {line}")
    report = {
        "figures": found, "limits": LIMITS, "missed": late, "medians_of": options.moves, "loads": LOADS,
        "chromium": version, "processors": os.cpu_count(), "machine": platform.machine(),
    }  # fmt: skip
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.out == OUT and len(options.only) == 2:
        write_docs(report, DOCS)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
