"""The pictures that README and docs show: the exported page and the dashboard, in headless Chromium.

Run by docs/pictures.sh. One run is traced, the strongest late attention edge clicked, and each view is taken
in light at 1280 and in dark at 1920 pixels; the pages show some of them, all are there to be looked at.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

import lmtt
from lmtt.viz.jobs import Worker
from lmtt.viz.models import DEMO, Models
from lmtt.viz.serve import Settings, listen
from lmtt.viz.state import Policy, Server

PROMPT = "When Mary and John went to the store, John gave a drink to"
PATIENCE = 180_000  # ms
SIZES = {"light": (1280, 900), "dark": (1920, 1080)}
SHOWN = {  # text by which a tab is known to be filled
    "Lens": "Click a cell for its whole list.", "Contrast": "logit of", "Heads": "the route",
    "Output": "generated", "Cost": "kept edges", "Save": "The route as it is shown now",
}  # fmt: skip
STRONGEST = """(root) => {
  const v = root.view, s = v.store;
  const late = (e) => s.source[e] !== s.target[e] && s.layer[e] > s.layers / 2;
  const edges = v.scene.glyphs.attention.filter(late);
  v.selected = { edge: edges.sort((a, b) => s.weight[b] - s.weight[a])[0] };
  v.schedule();
  v.options.onPick(v.meaning(v.selected));
}"""


def serve(trace: Any, engine: Any) -> str:
    """The dashboard on a run, in a thread of its own."""
    models = Models([DEMO], lambda name: engine)
    models.put(DEMO, engine)
    ready, found = threading.Event(), []

    def loop() -> None:
        asyncio.set_event_loop(asyncio.new_event_loop())
        found.append(listen(Settings(port=0), Server(models, Worker(), Policy(), trace)))
        ready.set()
        found[0].io_loop.start()

    threading.Thread(target=loop, daemon=True).start()
    ready.wait()
    return f"http://127.0.0.1:{found[0].port}/"


def dashboard(page: Page, address: str, folder: Path, scheme: str, tabs: tuple[str, ...]) -> None:
    """The details of an edge, and each tab."""
    page.goto(address)
    page.wait_for_selector(f"html[data-theme={scheme}] [data-ready][data-session] .rv-canvas")
    page.locator(".rv").evaluate(STRONGEST)
    page.get_by_text("what head").first.wait_for(timeout=120_000)
    page.wait_for_timeout(1500)
    page.screenshot(path=folder / f"dashboard-{scheme}.png")
    for tab in tabs:
        page.get_by_role("tab", name=tab).click()
        page.get_by_text(SHOWN[tab]).first.wait_for()
        page.wait_for_timeout(1500)
        page.screenshot(path=folder / f"dashboard-{tab.lower().replace(' ', '-')}-{scheme}.png")


def shrink(picture: Path) -> None:
    """256 colours, which is a third of the bytes and looks the same."""
    with Image.open(picture) as full:
        small = full.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small.save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the pictures of README and docs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tabs", nargs="*", default=["Lens", "Heads"])
    options = parser.parse_args()
    engine = lmtt.load(device="cpu")
    trace = engine.trace(PROMPT)
    route_file = options.folder / "route.html"
    trace.route().to_html(route_file)
    address = serve(trace, engine)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.set_default_timeout(PATIENCE)
            dashboard(page, address, options.folder, scheme, tuple(options.tabs))
            page.close()
        page = browser.new_page(viewport={"width": 1500, "height": 1180})
        page.goto(route_file.resolve().as_uri())
        page.wait_for_selector("html[data-ready]")
        page.wait_for_timeout(300)
        page.screenshot(path=options.folder / "route.png")
        browser.close()
    route_file.unlink()
    for picture in options.folder.glob("*.png"):
        shrink(picture)


if __name__ == "__main__":
    main()
