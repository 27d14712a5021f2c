"""Seconds of a kernel's own steps, for whoever listens while it runs; results hold nothing that was measured.

A backend that can tell its steps apart says so with `spent`, in disjoint intervals of the calling thread. Names:
`screening`, `exact evaluation`, `reduction`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_LISTENER: ContextVar[dict[str, float] | None] = ContextVar("lmtt_stages", default=None)


@contextmanager
def listening() -> Iterator[dict[str, float]]:
    """Seconds by step of all kernels that run within, filled as they finish."""
    seconds: dict[str, float] = {}
    token = _LISTENER.set(seconds)
    try:
        yield seconds
    finally:
        _LISTENER.reset(token)


def spent(seconds: Mapping[str, float]) -> None:
    """A kernel's steps took so long."""
    listener = _LISTENER.get()
    if listener is not None:
        for step, amount in seconds.items():
            listener[step] = listener.get(step, 0.0) + amount
