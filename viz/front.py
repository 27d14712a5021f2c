"""The page's first part: the graph of the run that a server was started on, before there is a session.

To make a session and to load Panel's scripts takes seconds; to draw a graph does not. So the answer to a
visit is sent in two parts. The first holds that run's store and the view (`front.js`): a browser draws it,
and it can be used, while the second, Panel's page, is still being made. Then the view moves into its place
there (`panel.js`), with all that was done to it.

Whoever is not let in gets no first part: it is sent after the login was asked for, and where OAuth decides
about each person, which takes a session to know, not at all.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from string import Template
from typing import TYPE_CHECKING, Any

from bokeh.server import urls
from panel.config import config
from panel.io import server as panel_server
from tornado.web import authenticated

from lmtt.viz import theme
from lmtt.viz.script import bundle, source

if TYPE_CHECKING:
    from lmtt.viz.state import Server

HELD = "Lmtt-Front"  # header by which the session's own code hears which store its page holds already
_SHARED = "lmtt_shared"  # in the settings of a server of ours
_HOSTS = "lmtt_hosts"


class Front(panel_server.DocHandler):  # type: ignore[misc] # panel ships no types
    """Panel's page, after a first part if there is a run to draw. Of other servers' pages nothing changes."""

    _digest = ""

    def set_default_headers(self) -> None:
        """Our own pages talk to their own server alone."""
        super().set_default_headers()
        if _SHARED in self.application.settings:
            self.set_header("Content-Security-Policy", policy(self.request.host))
            self.set_header("X-Content-Type-Options", "nosniff")
            self.set_header("Referrer-Policy", "no-referrer")

    @authenticated  # type: ignore[untyped-decorator]
    async def get(self, *args: Any, **kwargs: Any) -> None:
        """The page."""
        shared: Server | None = self.application.settings.get(_SHARED)
        # A page of somebody else's whose name was made to mean this machine could read what it is answered;
        # what follows comes by a websocket, which such a page is refused.
        ours = re.sub(r":\d+$", "", self.request.host).lower() in self.application.settings.get(_HOSTS, ())
        if ours and shared is not None and shared.opened is not None and not config.authorize_callback:
            store = shared.opened.store
            self.set_header("Content-Type", "text/html; charset=UTF-8")
            self.set_header("Cache-Control", "no-store")
            self.write(first_part(store))
            self._digest = digest(store)
            await self.flush()
        self.request.headers[HELD] = self._digest  # whatever a browser said there
        await super().get(*args, **kwargs)

    def write(self, chunk: Any) -> None:
        """A page that follows the first part has no head of its own any more."""
        super().write(_second_part(chunk) if self._digest and isinstance(chunk, str) else chunk)


def policy(host: str) -> str:
    """The Content-Security-Policy of a page asked of `host`: nothing comes from elsewhere or goes there.

    Panel writes scripts and styles into its page and compiles templates and modules in the browser, so those
    are allowed inline, by eval and from blobs; where they may connect to is not widened by that.
    """
    own = "'self'"
    if re.fullmatch(r"[\w.\-]+(:\d+)?|\[[\da-fA-F:]+\](:\d+)?", host):
        own += f" ws://{host} wss://{host}"  # some browsers do not count a websocket as 'self'
    return (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        f"connect-src {own} data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
        "form-action 'self'; frame-ancestors 'self'"
    )


def install() -> None:
    """Have servers that are made from now on answer visits by `Front`."""
    urls.per_app_patterns[:] = [
        (path, Front if handler is panel_server.DocHandler else handler)
        for path, handler in urls.per_app_patterns
    ]


def share(server: Any, shared: Server, hosts: frozenset[str]) -> None:
    """Tell a server which run its pages begin with, if it is called by one of these names."""
    server._tornado.settings[_SHARED] = shared
    server._tornado.settings[_HOSTS] = hosts


@cache
def digest(store: bytes) -> str:
    """What tells one store from another."""
    return hashlib.sha256(store).hexdigest()[:16]


@cache
def first_part(store: bytes) -> str:
    """From the doctype to where Panel's page goes on. No text of a prompt is in it outside the store."""
    return Template(source("front.html")).substitute(
        style=theme.css(":root", system=False) + source("view.css") + source("front.css"),
        script=bundle("front.js"),
        store=base64.b64encode(store).decode(),
        digest=digest(store),
    )


def _second_part(page: str) -> str:
    """What Panel's page has between its tags; a document has one head and one body."""
    head, _, body = page.partition("</head>")
    return head.partition("<head>")[2] + re.sub(r"<body[^>]*>", "", body, count=1)
