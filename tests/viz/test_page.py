"""The page holds the route it was given, asks nobody for anything, and lets no prompt out of its text."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lmtt.graph.export import predictions
from lmtt.graph.routes import route
from lmtt.graph.tables import edge_columns
from lmtt.graph.testing import random_trace
from lmtt.viz.page import route_page

VOID = {"meta", "input", "br", "img", "link", "base"}


class Page(HTMLParser):
    """Elements with their attributes and text, and proof that they are well nested."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), "an attribute was given twice"
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.content.setdefault(self._open[-1] if self._open else "", []).append(data)

    def handle_comment(self, data):
        raise AssertionError("the page has no comments")

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("position", [0, 5, 10])
def test_no_prompt_gets_out_of_its_text(hostile_trace, position, renormalize):
    found = route(hostile_trace, position, 0.07, renormalize)
    text = route_page(found)
    text.encode("utf-8")  # no lone surrogate is left
    page = Page(text)
    names = {name for name, _ in page.elements}
    assert names <= {
        *("html", "head", "meta", "title", "style", "script", "body", "header", "main", "section", "aside"),
        *("footer", "h1", "h2", "p", "div", "span", "svg", "rect", "button", "noscript"),
        *("table", "thead", "tbody", "tr", "td", "th"),
    }
    assert [a.get("type") for a in page.named("script")] == ["text/plain", "module"]
    assert len(page.named("style")) == 1
    attributes = {attribute for _, given in page.elements for attribute in given}
    assert not {a for a in attributes if a.startswith("on")} | attributes & {
        "src",
        "href",
        "style",
        "xlink:href",
    }
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert text.count("default-src") == 1, "a token was taken for a place in the template"


def test_the_policy_admits_this_script_and_this_style_and_nothing_else():
    page = Page(route_page(route(random_trace(5), -1, 0.07)))
    policies = [a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    assert rules["default-src"] == "'none'"
    written = {"script": page.content["script"][-1], "style": page.content["style"][0]}
    for element, text in written.items():
        digest = hashlib.sha256(text.encode()).digest()
        assert rules[f"{element}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
    everything = [str(value) for _, given in page.elements for value in given.values()]
    assert not any(re.search("https?:|//|url\\(", value) for value in everything)
    code = "".join(written.values()).replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search("https?:|@import|fetch\\(|XMLHttp|import\\(", code)


def test_what_the_page_says_is_what_the_route_holds():
    data = random_trace(6, tokens=7, parallel=(False, True, False))
    found = route(data, -1, 0.07)
    text = route_page(found)
    strongest = found.edges[found.edges["kind"] == "attention"]
    between = strongest[strongest["source_position"] != strongest["target_position"]]
    assert f"{between['weight'].max():.4f}" in text
    assert f"{found.token_shares.tokens.max():.1%}" in text
    assert f"{found.to_json()['predictions'][0]['probability']:.1%}" in text
    assert f"{len(found.edges):,} edges above 0.07" in text


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_smallest_prompts_have_a_page(tokens):
    for threshold in (0.0, 0.9):
        Page(route_page(route(random_trace(8, tokens=tokens, parallel=(False,)), -1, threshold)))


def test_the_file_and_the_notebook_hold_the_page(tmp_path):
    found = route(random_trace(5), -1, 0.07)
    found.to_html(tmp_path / "route.html")
    assert (tmp_path / "route.html").read_text("utf-8") == route_page(found)
    frame = Page(found._repr_html_()).named("iframe")[0]
    assert frame["srcdoc"] == route_page(found)
    assert frame["sandbox"] == "allow-scripts allow-downloads"


def test_a_short_prompts_page_is_small():
    assert len(route_page(route(random_trace(5, tokens=14, parallel=(False,) * 30), -1, 0.07))) < 300_000


# --- in a browser ---


def opened(watched, tmp_path, found, **options):
    found.to_html(tmp_path / "route.html")
    one = watched(offline=True, **options)
    one.page.goto((tmp_path / "route.html").as_uri())
    one.page.wait_for_selector("html[data-ready]")
    return one.page


def selected(page, position, threshold):
    """The page's own table of a route: what its script selects, before anything is culled for drawing."""
    script = "([p, t]) => { lmtt.view.set({position: p, threshold: t}); return lmtt.view.json() }"
    return json.loads(page.evaluate(script, [position, threshold]))["edges"]


def until(page, condition):
    """Wait for a condition; the page's policy lets Playwright's own waiting evaluate no text."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(30)
    raise AssertionError(f"never: {condition}")


def assert_same_edges(page, data, position, threshold):
    want = edge_columns(route(data, position, threshold))
    got = selected(page, position % len(data.tokens), threshold)
    for name in ("source", "target", "kind", "layer", "weight", "reveal"):
        assert [edge[name] for edge in got] == want[name], (name, position, threshold)


@pytest.mark.browser
@pytest.mark.parametrize("seed", [1, 4])
def test_the_page_selects_the_same_edges_as_python(watched, tmp_path, seed):
    """Order, weights and reveals, at 20 thresholds x 5 starts, ties, parallel and opaque layers included."""
    data = random_trace(seed, tokens=11, parallel=(False, True, False, True, False, False))
    page = opened(watched, tmp_path, route(data, -1, 0.07))
    thresholds = [0.0, 1e-4, 0.01, *(n / 16 for n in range(1, 12)), 0.04, 0.07, 0.1, 0.2, 0.3, 0.9]
    assert len(thresholds) == 20
    counts = set()
    for position in (0, 3, 6, 8, 10):
        for threshold in thresholds:
            assert_same_edges(page, data, position, threshold)
            counts.add(len(route(data, position, threshold).edges))
    assert len(counts) > 20


@pytest.mark.browser
@pytest.mark.model
def test_the_page_selects_the_same_edges_of_a_real_run(watched, tmp_path, demo_engine):
    data = demo_engine.trace("When Mary and John went to the store, John gave a drink to", keep="light").data
    page = opened(watched, tmp_path, route(data, -1, 0.04))
    for position in (1, 4, 7, 10, 13):
        for threshold in np.geomspace(1e-3, 0.5, 20).tolist():
            assert_same_edges(page, data, position, threshold)


@pytest.mark.browser
def test_a_renormalised_page_selects_its_route_and_has_no_slider(watched, tmp_path):
    data = random_trace(6, tokens=7)
    found = route(data, -1, 0.07, renormalize=True)
    page = opened(watched, tmp_path, found)
    assert page.locator(".rv-slider").is_disabled()
    assert [e["weight"] for e in selected(page, 6, 0.07)] == found.edges["weight"].tolist()


@pytest.mark.browser
def test_pointing_and_keys_work_without_a_network(watched, tmp_path):
    """Slider, start, fold, hover, click, arrows and the address, in a page opened from a file."""
    data = random_trace(11, tokens=60, parallel=(False,) * 4, heads=2)
    page = opened(watched, tmp_path, route(data, -1, 0.07))
    badge, live = page.locator(".rv-badge"), page.locator(".rv-live")
    assert badge.inner_text().startswith(f"{len(route(data, -1, 0.07).edges):,} edges above 0.07")
    slider = page.locator(".rv-slider")
    slider.fill("-0.8")
    expected = len(route(data, -1, float(f"{10**-0.8:.3g}")).edges)
    until(page, f"document.querySelector('.rv-badge').textContent.startsWith('{expected:,} edges')")
    until(page, "location.hash.includes('threshold=0.158')")
    slider.fill(str(np.log10(0.07)))
    until(page, "document.querySelector('.rv-tau').textContent === '0.07'")

    folded = page.evaluate("lmtt.view.columns.positions.length")
    assert folded == len(set(route(data, -1, 0.07).nodes["position"].tolist()))
    page.locator(".rv-canvas").focus()
    page.keyboard.press("f")
    assert page.evaluate("lmtt.view.columns.positions.length") == 60
    page.keyboard.press("f")

    page.keyboard.press("ArrowUp")
    assert "after layer 3" in live.inner_text()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.evaluate("lmtt.view.meaning(lmtt.view.selected).kind") == "node"
    page.keyboard.press("0")
    page.wait_for_timeout(50)

    box = page.locator(".rv-canvas").bounding_box()
    place = page.evaluate("(() => { const s = lmtt.view.scene; return s.place(s.glyphs.mlp.at(-1)) })()")
    x, y = place["x"], place["y"]
    page.mouse.move(box["x"] + x, box["y"] + y)
    assert "MLP" in page.locator(".rv-tip").inner_text()
    page.mouse.click(box["x"] + x, box["y"] + y)
    assert page.evaluate("lmtt.view.meaning(lmtt.view.selected).kind") == "mlp"

    start = page.evaluate(
        "[lmtt.view.scene.x(2), lmtt.view.scene.frame.top - 8, lmtt.view.columns.positions[2]]"
    )
    page.mouse.click(box["x"] + start[0], box["y"] + start[1])
    assert page.evaluate("lmtt.view.position") == start[2]
    until(page, f"location.hash.includes('position={start[2]}&')")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("lmtt.view.position") == start[2]


@pytest.mark.browser
def test_the_page_saves_pictures_and_tables(watched, tmp_path):
    data = random_trace(6, tokens=7, parallel=(False, True, False))
    share = np.stack([data.mlp * 0.5, data.mlp * 0.25], -1)
    index = np.arange(share.size, dtype=np.int32).reshape(share.shape)
    data = dataclasses.replace(
        data, neurons=dataclasses.replace(data.neurons, index=index, contribution=share)
    )
    found = route(data, -1, 0.07)
    page = opened(watched, tmp_path, found, accept_downloads=True)
    files = {}
    for name in ("PNG", "SVG", "CSV", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        files[name] = Path(download.value.path()).read_bytes()
    assert files["PNG"].startswith(b"\x89PNG")
    drawing = xml.etree.ElementTree.fromstring(files["SVG"])
    assert "t6" in "".join(drawing.itertext())
    assert len(files["CSV"].decode().splitlines()) == 1 + len(found.edges)
    saved = json.loads(files["JSON"])
    assert len(saved["edges"]) == len(found.edges)
    assert saved["predictions"][0]["probability"] == pytest.approx(
        predictions(found)[0].probability, abs=1e-5
    )
    seen = []
    for edge, row in zip(saved["edges"], found.edges, strict=True):
        if edge["kind"] == "attention":
            kept = found.heads[row["head_start"] : row["head_end"]]
            assert {head["head"]: head["weight"] for head in edge["heads"]} == dict(kept.tolist())
        if edge["kind"] == "mlp" and edge["target"].endswith(f"post.{edge['target_position']}"):
            at = edge["layer"], edge["target_position"]
            listed = {n["neuron"]: n["contribution"] for n in edge["neurons"]}
            assert listed == dict(zip(index[at].tolist(), share[at].tolist(), strict=True))
            seen.append(at)
    assert len(seen) > 3


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_tokens_do_nothing_in_a_browser(watched, tmp_path, hostile_trace, scheme):
    page = opened(watched, tmp_path, route(hostile_trace, -1, 0.07), color_scheme=scheme)
    title = page.title()
    for p in range(len(hostile_trace.tokens)):
        lines = page.evaluate("(p) => lmtt.view.describe({start: p})", p)
        page.evaluate("(p) => lmtt.view.trace(p)", p)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "".join(lines))
    box = page.locator(".rv-canvas").bounding_box()
    for dx in range(60, 700, 60):
        page.mouse.move(box["x"] + dx, box["y"] + 20)
    svg = page.evaluate("lmtt.view.svg()")
    xml.etree.ElementTree.fromstring(svg)
    cells = page.evaluate("lmtt.view.csv()").split(",")
    assert not [cell for cell in cells if cell.startswith('"=')], "a cell that a spreadsheet would run"
    assert page.title() == title
    assert page.locator("img").count() == 0


@pytest.mark.browser
def test_only_the_strongest_are_drawn_and_said_so(watched, tmp_path):
    data = random_trace(3, tokens=40, parallel=(False,) * 60)
    full = np.full_like(data.residual, 0.5)
    data = dataclasses.replace(data, residual=full, mlp=full, passthrough=full)
    page = opened(watched, tmp_path, route(data, -1, 0.0))
    page.evaluate("lmtt.view.set({threshold: 1e-4})")
    until(page, "lmtt.view.scene.threshold === 1e-4")
    counts = page.evaluate("lmtt.view.scene.counts")
    assert counts["route"] == len(route(data, -1, 1e-4).edges)
    assert 4000 <= counts["drawn"] < counts["inView"]
    assert "strongest of" in page.locator(".rv-badge").inner_text()
    # What is drawn hangs together: every edge ends where one before it began, or at the start.
    connected = """(() => {
      const v = lmtt.view, s = v.store, shown = new Set(Object.values(v.scene.glyphs).flat());
      const order = Array.from(v.selection.order), place = new Map(order.map((e, n) => [e, n]));
      const last = Math.max(...Array.from(shown, (e) => place.get(e)));
      const seen = new Set([s.nodes - s.tokens + v.position]);
      return order.slice(0, last + 1).every((e) => {
        const block = 1 + 4 * s.layer[e] + s.slot[e];
        const from = s.sourceBlock[s.sumBlock.indexOf(block)][s.kind[e]];
        seen.add(from * s.tokens + s.source[e]);
        return seen.has(block * s.tokens + s.target[e]);
      });
    })()"""
    assert page.evaluate(connected)


@pytest.mark.parametrize(("module", "tests"), [("route", 6), ("cells", 3)])
def test_the_modules_tests_pass_under_node(module, tests):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed; the same functions run in Chromium in other tests")
    done = subprocess.run(
        [node, "--test", str(Path(__file__).with_name(f"{module}.test.mjs"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"pass {tests}" in done.stdout
