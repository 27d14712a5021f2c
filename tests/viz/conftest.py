"""Fixtures of the dashboard's tests: a hostile trace, a browser, and a guard against any request outside."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import threading
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


@pytest.fixture
def serving() -> Iterator[Any]:
    """Starts a dashboard in a thread of its own: serving(models, first=None, **settings) -> address."""
    pytest.importorskip("panel", reason="panel is not installed")
    from lmtt.viz.jobs import Worker
    from lmtt.viz.serve import Settings, listen
    from lmtt.viz.state import Policy, Server

    running: list[tuple[Any, threading.Thread, Worker]] = []

    def start(models: Any, first: Any = None, policy: Policy | None = None, **settings: Any) -> str:
        worker, ready = Worker(4), threading.Event()
        found: list[Any] = []

        def loop() -> None:
            asyncio.set_event_loop(asyncio.new_event_loop())
            shared = Server(models, worker, policy or Policy(), first)
            found.append(listen(Settings(port=0, **settings), shared))
            ready.set()
            found[0].io_loop.start()

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        assert ready.wait(60)
        running.append((found[0], thread, worker))
        return f"http://127.0.0.1:{found[0].port}/"

    yield start
    for server, thread, worker in running:
        server.io_loop.add_callback(server.stop)
        server.io_loop.add_callback(server.io_loop.stop)
        thread.join(20)
        worker.close()
