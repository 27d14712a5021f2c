"""A mend for Panel: no stylesheet is asked of another server.

A pane that is changed while nobody sees it belongs to no document, and Panel 1.9 then lets its stylesheets
come from its makers' server: the browser asks there as soon as the pane is shown. Ours has all of them.
"""

from __future__ import annotations

from typing import Any

from panel import reactive
from panel.io import resources

_MENDED = "_lmtt_mended"


def mend() -> None:
    """For all servers of this process."""
    original = resources.patch_stylesheet
    if hasattr(original, _MENDED):
        return

    def patch(stylesheet: Any, dist_url: str) -> None:
        original(stylesheet, resources.LOCAL_DIST if dist_url == resources.CDN_DIST else dist_url)

    setattr(patch, _MENDED, True)
    resources.patch_stylesheet = reactive.patch_stylesheet = patch
