"""What one person's session holds; nothing of it is shared with another's. No widget is known here."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import param

from lmtt.errors import InputError, LmttError, RunError
from lmtt.graph.text import clipped, visible
from lmtt.spans import prompt_text
from lmtt.trace import Trace
from lmtt.viz.jobs import Report, Worker
from lmtt.viz.models import Models
from lmtt.viz.store import pack

if TYPE_CHECKING:
    from lmtt.engine import Engine
    from lmtt.generate import Generation

RECENT = 8  # runs that a session remembers
MAX_CHARACTERS = 200_000  # of a prompt, before it is tokenised
MAX_OUTPUT = 256  # generated tokens
MAX_UPLOAD = 15 << 20  # bytes; the connection itself takes 20 MB
UNSAID = "The server could not do this; its log says why."
_LOG = logging.getLogger("lmtt.viz")
_PATH = re.compile(r"(?:^|[^\w./])(?:~?/|[A-Za-z]:\\)[^\s/]")  # where an absolute path begins


@dataclass(frozen=True)
class Policy:
    """What this server lets a browser do."""

    loopback: bool = True  # only this machine can reach it: files of this machine may be named
    max_tokens: int = 4096  # of prompt and output
    max_waiting: int = 8

    def told(self, error: BaseException) -> str:
        """What a browser is told of an error: our own sentence, to other machines only without a path in it.

        Of what is kept back the log has everything.
        """
        own = isinstance(error, LmttError)
        if self.loopback:
            return str(error) if own else f"{type(error).__name__}: {error}"
        if own and not _PATH.search(str(error)):
            return str(error)
        _LOG.error("kept from a browser: %s", error, exc_info=error)
        return UNSAID


@dataclass(frozen=True, eq=False)
class Server:
    """What all sessions share: the models, the one worker, the policy; and what is shown at first."""

    models: Models
    worker: Worker
    policy: Policy
    first: Trace | None = None

    @cached_property
    def opened(self) -> Shown | None:
        """The run that is shown at first, packed once for everybody."""
        return None if self.first is None else Shown(self.first)


@dataclass(frozen=True, eq=False)
class Shown:
    """A run that a session can look at."""

    trace: Trace
    generation: Generation | None = None

    @cached_property
    def store(self) -> bytes:
        """What the browser draws it from; half a second's work for the largest."""
        return pack(self.trace.data)

    @property
    def prompt(self) -> str:
        """What was asked, to be asked again; empty where a run does not say, or for a conversation."""
        if "prompt" not in self.trace.meta:
            return ""
        try:
            noted = prompt_text(self.trace.data)
        except RunError:  # a note that does not fit; what needs it will say so
            return ""
        return "" if noted.turns else noted.text

    @property
    def label(self) -> str:
        """One line for a list, safe."""
        trace = self.trace
        text = visible("".join(trace.tokens[:60]))
        made = "" if self.generation is None else f" +{len(self.generation.ids)}"
        return f"{clipped(text, 44)} · {len(trace.tokens)}{made} tokens"


@dataclass(frozen=True)
class Asked:
    """A run as it was asked for in the form."""

    model: str
    prompt: str
    generate: int = 0
    floor: float = 1e-3
    measure: str = "l1"
    special: bool = True  # the tokenizer's own special tokens

    def check(self, policy: Policy) -> None:
        """InputError for what can be refused before a model is asked."""
        if not self.prompt.strip("\x00"):
            raise InputError("the prompt is empty", expected="at least one token")
        if len(self.prompt) > MAX_CHARACTERS:
            raise InputError(
                "the prompt is too long for this page",
                expected=f"at most {MAX_CHARACTERS:,} characters",
                got=f"{len(self.prompt):,}",
            )
        if not 0 <= self.generate <= MAX_OUTPUT:
            raise InputError(
                "output tokens are out of range", expected=f"0 to {MAX_OUTPUT}", got=self.generate
            )
        if not 1e-4 <= self.floor < 1:
            raise InputError("the floor is out of range", expected="0.0001 to 1", got=self.floor)

    def run(self, models: Models, policy: Policy, report: Report) -> Shown:
        """Trace it; in the worker's thread."""
        engine = models.get(self.model)
        self._fits(engine, policy)
        options: dict[str, Any] = {
            "floor": self.floor,
            "measure": self.measure,
            "add_special_tokens": None if self.special else False,
            "progress": report,
        }
        if not self.generate:
            return Shown(engine.trace(self.prompt, **options))
        report(0, engine.info.n_layers)
        generation = engine.generate(self.prompt, max_new_tokens=self.generate, **options)
        return Shown(generation.trace, generation)

    def _fits(self, engine: Engine, policy: Policy) -> None:
        if engine.tokenizer is None:
            return
        tokens = len(engine.tokenizer(self.prompt, add_special_tokens=self.special).input_ids) + self.generate
        if tokens > policy.max_tokens:
            raise InputError(
                "prompt and output are too long for this server",
                expected=f"at most {policy.max_tokens:,} tokens",
                got=f"{tokens:,}",
            )


class State(param.Parameterized):  # type: ignore[misc] # param ships no types
    """The state of one session."""

    shown = param.Parameter(default=None, doc="the Shown that is looked at, or None")
    recent = param.List(default=[], doc="of Shown, newest first")
    threshold = param.Number(default=0.04, bounds=(0, 1), doc="of the route")
    position = param.Integer(default=-1, bounds=(-1, None), doc="the route's start; -1 is the last token")
    picked = param.Dict(default={}, doc="what was clicked in the graph")
    dark = param.Boolean(default=False)

    @property
    def trace(self) -> Trace | None:
        """The trace that is looked at."""
        return None if self.shown is None else self.shown.trace

    @property
    def start(self) -> int:
        """The route's start, resolved; 0 without a trace."""
        if self.shown is None:
            return 0
        T = len(self.shown.trace.tokens)
        return self.position if 0 <= self.position < T else T - 1

    def show(self, shown: Shown, *, keep: bool = False) -> None:
        """Look at a run. `keep` leaves start, threshold and selection as a link gave them."""
        others = [old for old in self.recent if old is not shown]
        values: dict[str, Any] = {"shown": shown, "recent": [shown, *others][:RECENT]}
        floor = float(shown.trace.meta["floor"])
        if not keep:
            generation = shown.generation
            last = len(shown.trace.tokens) if generation is None else generation.prompt
            values |= {"position": last - 1, "picked": {}}
        if self.threshold < floor:
            values["threshold"] = max(floor, 0.04)
        self.param.update(**values)


def read_upload(
    name: str, content: bytes, attach: Callable[[Trace], Trace], max_tokens: int = Policy.max_tokens
) -> Shown:
    """A `.lmtt` file that a browser sent; untrusted, so it is read as any stored run is: checked in full.

    Nothing in it is compressed, so it cannot grow as it is read. What is computed from it can, by the square
    of its tokens: hence `max_tokens`. InputError, RunError.
    """
    from lmtt.run.reader import read_run

    if len(content) > MAX_UPLOAD:
        raise InputError(
            f"{clipped(visible(name), 60)} is too large to send",
            expected=f"at most {MAX_UPLOAD >> 20} MiB",
            got=f"{len(content) >> 20} MiB",
            remedy="start the server on it: lmtt serve RUN",
        )
    with tempfile.TemporaryDirectory(prefix="lmtt-") as folder:
        path = Path(folder) / "run.lmtt"
        path.write_bytes(content)
        try:
            data = read_run(path)
        except RunError as error:  # it knows the file by a name of ours
            raise RunError(str(error).replace(str(path), clipped(visible(name), 60))) from None
    if len(data.tokens) > max_tokens:
        raise InputError(
            f"{clipped(visible(name), 60)} is too long for this page",
            expected=f"at most {max_tokens:,} tokens",
            got=f"{len(data.tokens):,}",
            remedy="start the server on it: lmtt serve RUN",
        )
    return Shown(attach(Trace(data)))


def saved(trace: Trace) -> bytes:
    """The run as one `.lmtt` file."""
    with tempfile.TemporaryDirectory(prefix="lmtt-") as folder:
        path = Path(folder) / "run.lmtt"
        trace.save(path)
        return path.read_bytes()
