"""How much memory a process holds while something runs, sampled beside it, and where phases stood then."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

import torch

from lmtt.profile.clock import Span
from lmtt.streaming.meter import forgotten_peak

INTERVAL = 0.02  # seconds between two samples; each costs a tenth of a millisecond, mostly waking up
_STATM = "/proc/self/statm"
_PAGE = resource.getpagesize()


def anonymous_bytes() -> int | None:
    """Resident memory that no file backs, None where the system does not say.

    Shared memory without a file counts as a file's here; the streaming arena is private and is included.
    """
    try:
        with open(_STATM, "rb", buffering=0) as file:
            return _difference(file.read(128))
    except OSError:
        return None


def _difference(statm: bytes) -> int:
    _, resident, file_backed = statm.split(None, 3)[:3]
    return (int(resident) - int(file_backed)) * _PAGE


class Sampler:
    """Samples `anonymous_bytes`, on CUDA what torch has allocated there, from a thread of its own.

    The system's own peak (VmHWM) covers the life of a process and cannot be told by phases.
    """

    def __init__(self, started: float, device: str = "cpu") -> None:
        self._started = started
        self._device = device if device.startswith("cuda") else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lmtt-memory", daemon=True)
        self.samples: list[tuple[float, int]] = []  # seconds from `started`, bytes
        self.before = (anonymous_bytes() or 0) if self._device is None else self._allocated()
        self.own_seconds = 0.0  # processor time that sampling took

    def __enter__(self) -> Sampler:
        if self._device is not None or anonymous_bytes() is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def _run(self) -> None:
        # Kept open: opening it costs ten times what reading does.
        number = None if self._device is not None else os.open(_STATM, os.O_RDONLY)
        try:
            while True:
                now = self._allocated() if number is None else _difference(os.pread(number, 128, 0))
                self.samples.append((time.perf_counter() - self._started, now))
                if self._stop.wait(INTERVAL):
                    break
        finally:
            if number is not None:
                os.close(number)
        self.own_seconds = time.thread_time()

    def peaks(self, spans: Sequence[Span]) -> dict[str, int]:
        """The largest sample within each phase's intervals; 0 for one too short for any."""
        found = {span.phase: 0 for span in spans}
        order = sorted(spans, key=lambda span: span.begin)
        at = 0
        for moment, size in self.samples:
            while at + 1 < len(order) and order[at + 1].begin <= moment:
                at += 1
            if order and order[at].begin <= moment:
                phase = order[at].phase
                found[phase] = max(found[phase], size)
        return found

    @property
    def peak(self) -> int:
        """The largest sample of all, 0 without any."""
        return max((size for _, size in self.samples), default=0)


def process_peak() -> int:
    """Largest resident set since the process began, in bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(forgotten_peak(), largest if sys.platform == "darwin" else largest * 1024)
