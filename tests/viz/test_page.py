"""The page holds the route it was given, asks nobody for anything, and lets no prompt out of its text."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lmtt.graph.routes import route
from lmtt.graph.testing import random_trace
from lmtt.viz.page import MAX_EDGES, route_page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "</style></title></svg><img src=x onerror=alert(1)>",
    "\"' onmouseover=alert(1) x='",
    "<!--",
    "]]>$policy ${style}",
    "\x00\x1b[2J\u202e\u2066\ud800",
    "&lt;b&gt;",
    "",
]
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

    def shown_edges(self, tau=None):
        """Edges that are on: by class as the page is served, or as the slider decides at `tau`."""
        moving = [a for _, a in self.elements if "data-n" in a]
        on = [
            a
            for a in moving
            if ("off" not in a["class"].split() if tau is None else np.float32(a["data-r"]) > np.float32(tau))
        ]
        return sum(int(a["data-n"]) for a in on)


def hostile_trace():
    data = random_trace(6, tokens=len(HOSTILE), parallel=(False, True, False))
    meta = {
        **data.meta,
        "model": {**data.meta["model"], "name": "<script>alert(2)</script>"},
        "versions": {"<script>": "<b>"},
        "prediction_tokens": {str(i): HOSTILE[i % len(HOSTILE)] for i in range(10)},
    }
    return dataclasses.replace(data, tokens=tuple(HOSTILE), meta=meta)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("position", range(len(HOSTILE)))
def test_no_prompt_gets_out_of_its_text(position, renormalize):
    found = route(hostile_trace(), position, 0.07, renormalize)
    text = route_page(found)
    text.encode("utf-8")  # no lone surrogate is left
    page = Page(text)
    names = {name for name, _ in page.elements}
    assert names <= {
        *("html", "head", "meta", "title", "style", "script", "body", "header", "main", "section", "aside"),
        *("footer", "h1", "h2", "p", "div", "span", "label", "input", "output", "svg", "g", "path", "rect"),
        *("line", "circle", "polygon", "text", "table", "thead", "tbody", "tr", "td", "th"),
    }
    assert len(page.named("script")) == len(page.named("style")) == 1
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
    for element in ("script", "style"):
        digest = hashlib.sha256("".join(page.content[element]).encode()).digest()
        assert rules[f"{element}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
    everything = [str(value) for _, given in page.elements for value in given.values()]
    assert not any(re.search("https?:|//|url\\(", value) for value in everything)
    assert not re.search(
        "https?:|url\\(|@import|fetch|XMLHttp|import\\(",
        "".join(page.content["style"] + page.content["script"]),
    )


def test_the_page_shows_the_route_as_it_is_served_and_as_the_slider_moves():
    data = random_trace(6, tokens=7, parallel=(False, True, False, False))
    for threshold in (1 / 16, 0.07, 0.12, 0.2, 0.249):
        page = Page(route_page(route(data, -1, threshold)))
        assert page.shown_edges() == len(route(data, -1, threshold).edges)
        slider = page.named("input")[0]
        lowest = 10 ** float(slider["min"])
        assert lowest <= 1e-4 + 1e-6  # this trace keeps everything
        assert float(slider["min"]) <= float(slider["value"]) <= float(slider["max"])
        for tau in (0.01, 1 / 16, 0.1, 0.25, 0.5):
            assert page.shown_edges(tau) == len(route(data, -1, tau).edges)


def test_a_renormalised_page_has_no_slider():
    found = route(random_trace(6, tokens=7), -1, 0.07, renormalize=True)
    page = Page(route_page(found))
    assert not page.named("input")
    assert page.shown_edges() == len(found.edges)


def test_a_long_prompt_is_folded_to_its_route():
    data = random_trace(11, tokens=90, parallel=(False,) * 4, heads=2)
    found = route(data, -1, 0.07)
    on_route = set(found.nodes["position"].tolist())
    assert 10 < len(on_route) < 60
    text = route_page(found)
    page = Page(text)
    assert len([a for a in page.named("text") if "said" in a.get("class", "")]) == len(on_route)
    assert page.shown_edges() == len(found.edges)
    assert f"{90 - len(on_route)} tokens that are not on the route are folded away" in text
    assert "⋯" in text


def test_more_edges_than_can_be_drawn_are_said_to_be_missing():
    data = random_trace(3, tokens=24, parallel=(False,) * 40)
    full = np.full_like(data.residual, 0.5)
    data = dataclasses.replace(data, residual=full, mlp=full, passthrough=full)
    found = route(data, -1, 0.0)
    assert len(found.edges) > MAX_EDGES
    page = Page(route_page(found))
    assert not page.named("input")
    assert f"the strongest {MAX_EDGES:,} of {len(found.edges):,} edges are drawn" in "".join(
        page.content["span"]
    )
    assert MAX_EDGES - 2 <= page.shown_edges() <= MAX_EDGES + 1  # an MLP's two edges are one glyph


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
    opaque = found.edges[found.edges["kind"] == "opaque"]
    assert len(opaque)
    assert "a sublayer not taken apart" in text


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
    assert frame["sandbox"] == "allow-scripts"


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_browser_runs_the_slider_under_the_pages_own_policy(tmp_path):
    """The page as served, with a line added to its script (and hash) that moves the slider."""
    data = random_trace(6, tokens=7, parallel=(False, True, False))
    text = route_page(route(data, -1, 0.07))
    script = (Path(route_page.__code__.co_filename).with_name("page.js")).read_text("utf-8")
    moved = script + (
        "const s = document.getElementById('tau'); s.value = '-0.8';"
        "s.dispatchEvent(new Event('input'));"
        "setTimeout(() => { document.title = document.getElementById('tau-badge').textContent; }, 200);"
    )

    def name(source: str) -> str:
        return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()

    (tmp_path / "page.html").write_text(
        text.replace(name(script), name(moved)).replace(script, moved), "utf-8"
    )
    done = subprocess.run(
        [
            "chromium",
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"),
            *("--enable-logging=stderr", "--dump-dom", (tmp_path / "page.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search("<title>([^<]*)", done.stdout)
    edges = len(route(data, -1, 10**-0.8).edges)
    assert title is not None
    assert title.group(1).endswith(f": {edges:,} edges")
    assert "Content Security Policy" not in done.stderr
