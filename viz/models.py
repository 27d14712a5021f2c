"""The models that a server may run: named when it starts, loaded when first asked for, kept while in use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lmtt.errors import CheckpointError, InputError, LmttError

if TYPE_CHECKING:
    from lmtt.engine import Engine
    from lmtt.trace import Trace

DEMO = "the demo model"
KEPT = 2  # loaded models held at a time


class Models:
    """An allow-list. Only the worker's thread may call `get`."""

    def __init__(self, names: Sequence[str], load: Callable[[str | None], Engine]) -> None:
        """names: hub ids, folders or files as the command line takes them; DEMO for the demo model."""
        self.names = tuple(dict.fromkeys(names))
        self._load = load
        self._engines: OrderedDict[str, Engine] = OrderedDict()

    def put(self, name: str, engine: Engine) -> None:
        """A model that was loaded already."""
        self._engines[name] = engine

    def attach(self, trace: Trace) -> Trace:
        """The trace with the loaded model that made it; as it is if none of them did."""
        for engine in list(self._engines.values()):
            try:
                return trace.attach(engine)
            except CheckpointError:
                continue
        return trace

    def get(self, name: str) -> Engine:
        """The model, loaded if need be. InputError for one that is not on the list."""
        if name not in self.names:
            raise InputError("this model is not on this server's list", expected=" or ".join(self.names))
        if name not in self._engines:
            while len(self._engines) >= KEPT:
                self._engines.popitem(last=False)
            try:
                self._engines[name] = self._load(None if name == DEMO else name)
            except LmttError:
                raise
            except Exception as error:
                # A loader may fail in ways that nobody foresaw; the server has other models, and goes on.
                raise InputError(f"{name} could not be loaded: {type(error).__name__}: {error}") from error
        self._engines.move_to_end(name)
        return self._engines[name]
