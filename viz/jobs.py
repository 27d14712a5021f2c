"""One thread through which all use of a model goes, with a queue that people can see.

A *run* reports progress layer by layer and can be cancelled at any of them. A *question* (a detail that
somebody clicked) is short: it goes before all waiting runs, and is answered between two layers of the one
that is going. So nobody waits for another's run to see a head, and no two forwards fight for one device.

The thread has a lower priority than the server's: a run keeps every processor busy for as long as it goes,
and a click that needs no model would wait for its turn among the run's threads again and again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lmtt.errors import LmttError

T = TypeVar("T")
Report = Callable[[int, int], None]  # layers done, layers in all
NICER = 10  # steps of priority between the server and a run; a tenth of a processor where both want it


class CancelledError(Exception):
    """Somebody cancelled the run that was asked for."""


class BusyError(LmttError):
    """The queue is full, or this person's own run is still going."""


@dataclass(eq=False)
class Run(Generic[T]):
    """A run that was asked for. `progress` changes as it goes; `result` is its future."""

    work: Callable[[Report], T]
    owner: str
    result: Future[T] = field(default_factory=Future)
    progress: tuple[int, int] = (0, 0)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop before the next layer; one that still waits does not begin."""
        self._cancelled.set()


class Worker:
    """One thread. `most` runs may wait; each owner may have one run at a time."""

    def __init__(self, most: int = 8) -> None:
        self.most = most
        self._runs: deque[Run[Any]] = deque()
        self._questions: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._going: Run[Any] | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="lmtt worker", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[Report], T], owner: str) -> Run[T]:
        """Queue a run. BusyError if the queue is full or the owner has one already."""
        with self._changed:
            everyone = [*self._runs, *([self._going] if self._going else [])]
            if any(run.owner == owner for run in everyone):
                raise BusyError("your last run is still going", remedy="wait for it, or cancel it")
            if len(self._runs) >= self.most:
                raise BusyError(f"{len(self._runs)} runs are waiting already", remedy="try again in a while")
            run = Run(work, owner)
            self._runs.append(run)
            self._changed.notify()
        return run

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """Queue a question; its future has the answer."""
        future: Future[T] = Future()
        with self._changed:
            self._questions.append((question, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closed = True
            for run in (*self._runs, *([self._going] if self._going else [])):
                run.cancel()
            self._changed.notify()
        self._thread.join(timeout=30)

    def ahead(self, run: Run[Any]) -> int:
        """How many runs come before this one."""
        with self._changed:
            before = list(self._runs)
            return before.index(run) + int(self._going is not None) if run in before else 0

    # --- the thread ---

    def _loop(self) -> None:
        _step_back()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._questions or self._runs)
                if self._closed:
                    return
                run = self._runs.popleft() if not self._questions else None
                self._going = run
            if run is None:
                self._answer()
                continue
            self._do(run)
            with self._changed:
                self._going = None

    def _do(self, run: Run[Any]) -> None:
        def report(done: int, total: int) -> None:
            self._answer()
            if run._cancelled.is_set():
                raise CancelledError
            run.progress = (done, total)

        try:
            if run._cancelled.is_set():
                raise CancelledError
            result = run.work(report)
        except BaseException as error:  # whatever went wrong is the asker's to hear; the thread lives on
            run.result.set_exception(error)
        else:
            run.result.set_result(result)

    def _answer(self) -> None:
        """Every question that waits."""
        while True:
            with self._changed:
                if not self._questions:
                    return
                question, future = self._questions.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                answer = question()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(answer)


def _step_back() -> None:
    """Lower the calling thread's priority, and with it that of the threads it starts, OpenMP's among them.

    For good: to raise it again takes a privilege.
    """
    if sys.platform == "linux":  # elsewhere a priority is a whole process's
        thread = threading.get_native_id()
        lower = min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICER)
        os.setpriority(os.PRIO_PROCESS, thread, lower)
