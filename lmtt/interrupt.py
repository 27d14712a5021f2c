"""SIGINT and SIGTERM: the layer in hand is finished and committed first; a second signal ends at once.

Python runs a handler only between two of its own instructions, and a native kernel may take seconds. So the
second signal is not left to a handler: the system's own writes a byte for each signal into a pipe, and a
thread that reads it ends the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Progress = Callable[[int, int], None]


class TerminatedError(BaseException):
    """SIGTERM, as `KeyboardInterrupt` is SIGINT: nothing but the command line itself catches it."""


class Interrupts:
    """Within it, a signal ends what is being done: at once, or in `held` after the layer in hand.

    Only a main thread is told of signals; in another one this does nothing.
    """

    def __init__(self, message: str) -> None:
        self._message = message  # said when a signal is noted but not followed yet
        self._held = False
        self._noted: int | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=_end_at_second, args=(self._reader,), daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._signalled) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # the thread reads the end of it, and closes the other one

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if not self._held:
            raise _error(number)
        if self._noted is None:
            self._noted = number
            os.write(2, f"lmtt: {self._message}\n".encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait for `between_layers`, or for the end of this."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self._follow()

    def between_layers(self, report: Progress | None) -> Progress:
        """To be called when a layer is committed; `report` is told so first."""

        def called(done: int, total: int) -> None:
            if report is not None:
                report(done, total)
            if done == total:
                self._held = False  # what is left is written whole or not at all
            self._follow()

        return called

    def _follow(self) -> None:
        if self._noted is not None:
            raise _error(self._noted)


def _error(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else TerminatedError()


def _end_at_second(reader: int) -> None:
    """Wait for the second signal, and let nothing in the process delay it."""
    seen = 0
    while arrived := os.read(reader, 64):
        for number in arrived:
            seen += number in SIGNALS
            if seen == 2:
                os._exit(128 + number)
    os.close(reader)
