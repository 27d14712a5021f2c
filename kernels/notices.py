"""What a kernel has to tell whoever runs it, beside its result: a warning, and a line in the run's cost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_LISTENER: ContextVar[list[str] | None] = ContextVar("lmtt_notices", default=None)


@contextmanager
def gathered() -> Iterator[list[str]]:
    """What kernels that run within have to say, in order."""
    said: list[str] = []
    token = _LISTENER.set(said)
    try:
        yield said
    finally:
        _LISTENER.reset(token)


def say(text: str) -> None:
    """Warn, and leave it with whoever gathers."""
    listener = _LISTENER.get()
    if listener is not None:
        listener.append(text)
    warnings.warn(f"lmtt: {text}", RuntimeWarning, stacklevel=3)
