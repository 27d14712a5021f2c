"""`lmtt serve`: who may connect, to what, and the server itself.

1. Without `--host` only this machine can connect. Any other address needs a password or OAuth (`login.py`)
   and the origins that pages may come from; files of this machine can then not be named from a browser, and
   nothing that a browser says is ever a model to load: models are those that the command line lists.
2. Every session has a `Dashboard` of its own; all share one `Worker`, hence one queue for the device.
3. Scripts and styles come from this server alone.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtt.errors import InputError, LmttError
from lmtt.viz.login import OAuth, server_options

if TYPE_CHECKING:
    from lmtt.viz.jobs import Worker
    from lmtt.viz.state import Server

LOOPBACK = "127.0.0.1"
SHORTEST_PASSWORD = 8
SWITCH = 0.001  # seconds until a run lets others at the interpreter; Python's own 0.005 add up in a click
LOST = "The server does not answer. The graph still follows your hand; clicks are answered when it is back."


@dataclass(frozen=True)
class Settings:
    """What the command line asked for, checked by `check`."""

    target: str | None = None  # a run or a model; None is the demo model
    models: tuple[str, ...] = ()  # further ones
    host: str = LOOPBACK
    port: int = 5006
    origins: tuple[str, ...] = ()
    password: str | None = None
    max_tokens: int = 4096
    max_waiting: int = 8
    device: str = "auto"
    dtype: str = "auto"
    oauth: OAuth | None = None

    @property
    def loopback(self) -> bool:
        """Only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> frozenset[str]:
        """Names by which browsers may call this server, without ports."""
        own = {"localhost", LOOPBACK, "[::1]"} if self.loopback else set()
        return frozenset(own | {host_name(origin) for origin in self.origins})

    @property
    def private(self) -> bool:
        """Nobody but this machine's own people can come in, by no proxy either."""
        return self.loopback and self.hosts <= {"localhost", LOOPBACK, "[::1]"}

    def check(self) -> None:
        """InputError for anything that would serve more than was meant."""
        if not 0 <= self.port < 65536:
            raise InputError("the port is out of range", expected="0 to 65535", got=self.port)
        if self.max_tokens < 1 or self.max_waiting < 0:
            raise InputError(
                "a limit is out of range", expected="--max-tokens 1 or more, --max-queue 0 or more"
            )
        if self.password is not None and len(self.password) < SHORTEST_PASSWORD:
            raise InputError("the password is too short", expected=f"at least {SHORTEST_PASSWORD} characters")
        if self.password is not None and self.oauth is not None:
            raise InputError("both a password and OAuth are set", expected="one of them")
        if self.oauth is not None:
            self.oauth.check()
        if any("*" in origin or "/" in origin for origin in self.origins):
            raise InputError("an origin is HOST or HOST:PORT, without wildcards", got=" ".join(self.origins))
        if self.loopback:
            return
        if self.password is None and self.oauth is None:
            raise InputError(
                f"serving on {self.host} lets other machines in, and no password is set",
                remedy="set LMTT_PASSWORD or --oauth-provider, or leave --host out and use an ssh tunnel",
            )
        if not self.origins:
            raise InputError(
                f"serving on {self.host} needs the address that browsers will show",
                remedy="name it with --allow-origin HOST:PORT",
            )

    def allowed(self, port: int) -> list[str]:
        """Origins of websockets that are accepted."""
        own = [f"{name}:{port}" for name in ("localhost", LOOPBACK)] if self.loopback else []
        return [*own, *self.origins]


def serve(settings: Settings) -> None:
    """Serve until interrupted."""
    settings.check()
    try:
        import panel  # noqa: F401 - asked for by name before anything is loaded
    except ImportError:
        raise LmttError(
            "the dashboard needs panel and bokeh, which are not installed",
            remedy="pip install 'lmtt[dashboard]'",
        ) from None
    from lmtt.viz.jobs import Worker

    worker = Worker(settings.max_waiting)
    try:
        server = listen(settings, _shared(settings, worker))
        _announce(settings, f"http://{'localhost' if settings.loopback else settings.host}:{server.port}/")
        server.io_loop.start()
    finally:
        worker.close()


def listen(settings: Settings, shared: Server) -> Any:
    """A server that has begun to listen, on the calling thread's event loop, which is not started.

    Raises InputError if the address is taken.
    """
    import panel as pn

    from lmtt.viz import front, styles, writes
    from lmtt.viz.app import Dashboard

    pn.extension(notifications=True, reconnect=True, disconnect_notification=LOST)
    front.install()
    writes.mend()
    styles.mend()

    def session() -> Any:
        dashboard = Dashboard(shared, uuid.uuid4().hex, pn.state.headers.get(front.HELD, ""))
        dashboard.join()
        return dashboard.page

    port = settings.port or _free_port(settings.host)  # origins name the port, so it is known first
    try:
        server = pn.io.server.get_server(
            {"/": session}, port=port, address=settings.host, title="lmtt",
            websocket_origin=settings.allowed(port), keep_alive_milliseconds=20_000,
            **server_options(settings.password, settings.oauth),
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"cannot serve on {settings.host}:{port}: {error.strerror}", remedy="choose another --port"
        ) from None
    sys.setswitchinterval(SWITCH)
    front.share(server, shared, settings.hosts)
    server.start()
    return server


def host_name(host: str) -> str:
    """HOST of HOST or HOST:PORT, in lower case; an IPv6 address keeps its brackets."""
    return re.sub(r":\d+$", "", host).lower()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as taken:
        return int(taken.getsockname()[1])


def _shared(settings: Settings, worker: Worker) -> Server:
    """Models, policy and the first run."""
    from lmtt.trace import Trace
    from lmtt.viz.models import DEMO, Models
    from lmtt.viz.state import Policy, Server

    real: dict[str, str] = {}  # of names that are shown

    def load(name: str | None) -> Any:
        import lmtt

        where = name if name is None else real.get(name, name)
        return lmtt.load(where, device=settings.device, dtype=settings.dtype)

    first = None
    names = [DEMO if name == "demo" else name for name in settings.models]
    if settings.target is not None and is_run(settings.target):
        from lmtt.run.reader import read_run

        first = Trace(read_run(settings.target))
    else:
        names.insert(0, DEMO if settings.target is None else settings.target)
    if not settings.private:
        real = shown_names(names)
    models = Models(list(real) or names, load)
    for name in models.names[:1]:
        # Loaded before anybody connects: a model that cannot be loaded ends the command with one line.
        worker.ask(partial(models.get, name)).result()
    if first is not None:
        first = models.attach(first)
        if models.names and not first.has_model:
            raise InputError(
                f"{models.names[0]} did not make this run, or the run was kept light",
                remedy="leave --model out to look at it without its model",
            )
    policy = Policy(settings.private, settings.max_tokens, settings.max_waiting)
    return Server(models, worker, policy, first)


def shown_names(names: Sequence[str]) -> dict[str, str]:
    """Models by names that tell other machines no path of this one: of files and folders the last part."""
    shown: dict[str, str] = {}
    for name in dict.fromkeys(names):
        path = Path(name)
        own = path.resolve().name if path.exists() else name
        taken = sum(other == own or other.startswith(f"{own} (") for other in shown)
        shown[f"{own} ({taken + 1})" if taken else own] = name
    return shown


def is_run(target: str) -> bool:
    """A run directory or a packed run, rather than a model."""
    path = Path(target)
    return target.endswith(".lmtt") or (path / "run.json").is_file()


def _announce(settings: Settings, address: str) -> None:
    print(f"lmtt serves {address} (Ctrl-C ends it)", file=sys.stderr)
    if settings.loopback and os.environ.get("SSH_CONNECTION"):
        port = address.rstrip("/").rsplit(":", 1)[1]
        print(f"from your own machine: ssh -L {port}:{LOOPBACK}:{port} THIS_MACHINE", file=sys.stderr)
    if not settings.loopback:
        print("what people type travels unencrypted unless a proxy with TLS is in front", file=sys.stderr)
