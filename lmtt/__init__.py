"""lmtt: which tokens, heads, neurons and layers made a language model's prediction, and by which route.

    import lmtt

    engine = lmtt.load()                                  # or a hub id, a directory, a .gguf file, a model
    trace = engine.trace("The capital of France is")
    route = trace.route(threshold=0.04)

Importing the package imports nothing heavy; torch and transformers come with the first `load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "LmttError", "Route", "Trace", "__version__", "load", "open", "ops"]

if TYPE_CHECKING:
    from lmtt import ops
    from lmtt.engine import Engine, load, open
    from lmtt.errors import LmttError
    from lmtt.graph.routes import Route
    from lmtt.trace import Trace

_HOMES = {
    "Engine": "lmtt.engine",
    "LmttError": "lmtt.errors",
    "Route": "lmtt.graph.routes",
    "Trace": "lmtt.trace",
    "load": "lmtt.engine",
    "open": "lmtt.engine",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "ops":
        return import_module("lmtt.ops")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lmtt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
