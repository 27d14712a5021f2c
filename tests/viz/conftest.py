"""Fixtures of the dashboard's tests: a hostile trace, a browser, and a guard against any request outside."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from lmtt.graph.testing import random_trace

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "</style></title></svg><img src=x onerror=alert(1)>",
    "\"' onmouseover=alert(1) x='",
    "<!--",
    "]]>$policy ${style} {{7*7}}",
    "\x00\x1b[2J\u202e\u2066\ud800",
    "&lt;b&gt; @x{safe} $index",
    "\U0001f9d1\u200d\U0001f680",
    "=cmd|'/c calc'!A1",
    "x" * 10_000,
    "",
]


@pytest.fixture(scope="session")
def hostile_tokens() -> list[str]:
    return HOSTILE


@pytest.fixture(scope="session")
def hostile_trace(hostile_tokens: list[str]) -> Any:
    """A trace whose tokens, predictions, model and versions are all hostile."""
    data = random_trace(6, tokens=len(hostile_tokens), parallel=(False, True, False))
    meta = {
        **data.meta,
        "model": {**data.meta["model"], "name": "<script>alert(2)</script>"},
        "versions": {"<script>": "<b>"},
        "prediction_tokens": {str(i): hostile_tokens[i] for i in range(10)},
    }
    return dataclasses.replace(data, tokens=tuple(hostile_tokens), meta=meta)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


class Watched:
    """A page, what its console complained of, and what it asked for outside this machine."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.outside: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("request", self._request)
        page.on("dialog", lambda dialog: self.errors.append(f"dialog {dialog.message}") or dialog.dismiss())

    def _request(self, request: Any) -> None:
        allowed = ("file://", "data:", "blob:", "http://127.0.0.1:", "ws://127.0.0.1:", "http://localhost:")
        if not request.url.startswith(allowed):
            self.outside.append(request.url)

    def check(self) -> None:
        """Nothing complained, and nothing was asked of anybody else."""
        assert not self.outside, self.outside
        assert not self.errors, self.errors


@pytest.fixture
def watched(chromium: Any) -> Iterator[Any]:
    """Opens watched pages, each in a browser session of its own; all are checked at the end."""
    opened: list[Watched] = []
    contexts: list[Any] = []

    def new(**options: Any) -> Watched:
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, **options)
        context.set_default_timeout(float(os.environ.get("LMTT_BROWSER_TIMEOUT", "20000")))
        contexts.append(context)
        opened.append(Watched(context.new_page()))
        return opened[-1]

    yield new
    for one in opened:
        one.check()
    for context in contexts:
        context.close()
