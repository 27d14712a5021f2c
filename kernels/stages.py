"""Seconds of a kernel's own steps, for whoever listens while it runs; results hold nothing that was measured.

A backend that can tell its steps apart says so with `spent`, in disjoint intervals of the calling thread:
`screening`, `exact evaluation`, `reduction`. Of one that cannot, all is `contributions`.
"""

from __future__ import annotations

import time
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


@contextmanager
def whole() -> Iterator[None]:
    """One kernel runs within. What its steps leave is the preparation of operands, for screening; of one that
    says nothing of steps, all is `contributions`.
    """
    listener = _LISTENER.get()
    if listener is None:
        yield
        return
    known, start = sum(listener.values()), time.perf_counter()
    yield
    told, took = sum(listener.values()) - known, time.perf_counter() - start
    spent({"screening": max(0.0, took - told)} if told else {"contributions": took})
