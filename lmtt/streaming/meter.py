"""The memory limit as it is kept: what was really taken, and an error as soon as it is more than allowed.

What is limited is memory beyond what the process had when the model was loaded: on the CPU resident memory
that no file backs (RssAnon + RssShmem of /proc/self/status), on CUDA what torch's allocator reserves, which
it is told not to exceed. Peaks come from the system's own high-water mark where it can be set back
(/proc/self/clear_refs), so that no thread has to look; elsewhere a thread looks every `INTERVAL`.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from lmtt.errors import InputError
from lmtt.streaming.plan import in_words

INTERVAL = 0.005  # seconds between two looks of the thread
OWN_PAGES = 4 << 20  # bytes; from here on a buffer goes back to the system when it is freed
ROOMY = 0.8  # of the limit: while no more is in use, the allocator may keep what was freed for what follows
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # sets VmHWM back to VmRSS
_forgotten: list[int] = [0]  # bytes, the highest mark that was set back


class Gauge(Protocol):
    """Bytes in use, and the most since `restart`. `way` says where the numbers come from."""

    way: str

    def now(self) -> int: ...
    def restart(self) -> None: ...
    def peak(self) -> int: ...
    def stop(self) -> None: ...


def forgotten_peak() -> int:
    """Largest resident set, in bytes, of which VmHWM and getrusage know nothing any more."""
    return _forgotten[0]


def _status() -> dict[str, int]:
    """Fields of /proc/self/status that are sizes, in bytes."""
    return {k: 1024 * int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", _STATUS.read_text(), re.M)}


def _held(status: dict[str, int]) -> int:
    return status["RssAnon"] + status["RssShmem"]


class HighWater:
    """VmHWM less what files back.

    That changes while a process runs: the most of both ends is subtracted, so that no peak is claimed which
    there was not. Not for spans in which files are mapped and unmapped.

    resetting : set the mark back on `restart`, which other tools that read it will notice. Without, peaks
        below the mark that was there are not seen.
    """

    def __init__(self, *, resetting: bool) -> None:
        self.way = "VmHWM, set back at every layer" if resetting else "VmHWM where it rose"
        self._resetting = resetting
        self._mark = _status()["VmHWM"]
        self.restart()

    def now(self) -> int:
        return _held(_status())

    def restart(self) -> None:
        if self._resetting:
            _forgotten[0] = max(_forgotten[0], _status()["VmHWM"])
            _CLEAR_REFS.write_text(_FORGET_PEAK)
            self._mark = 0
        status = _status()
        self._most, self._files = _held(status), status["RssFile"]

    def peak(self) -> int:
        status = _status()
        self._most = max(self._most, _held(status))
        if status["VmHWM"] > self._mark:
            self._most = max(self._most, status["VmHWM"] - max(self._files, status["RssFile"]))
        return self._most

    def stop(self) -> None:
        pass


class Sampled:
    """What a thread saw, looking every `INTERVAL`."""

    way = f"RssAnon + RssShmem every {INTERVAL * 1e3:g} ms"

    def __init__(self) -> None:
        self._over = threading.Event()
        self._most = self.now()
        self._thread = threading.Thread(target=self._look, name="lmtt-memory", daemon=True)
        self._thread.start()

    def now(self) -> int:
        return _held(_status())

    def restart(self) -> None:
        self._most = self.now()

    def peak(self) -> int:
        self._most = max(self._most, self.now())
        return self._most

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(INTERVAL):
            self._most = max(self._most, self.now())


class Allocator:
    """What torch's allocator has reserved on a CUDA device."""

    way = "reserved by torch's CUDA allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def now(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def stop(self) -> None:
        pass


def gauge(device: torch.device, *, limited: bool, mapping: bool = False) -> Gauge | None:
    """The best that this system has, None if it has none.

    limited : there is a limit to be kept, for which a thread or a mark set back are not too much.
    mapping : files are mapped while it measures.
    """
    if device.type == "cuda":
        return Allocator(device)
    try:
        if not {"RssAnon", "RssShmem", "RssFile", "VmHWM"} <= _status().keys():
            return None
        return Sampled() if mapping and limited else HighWater(resetting=limited)
    except PermissionError:
        return Sampled()
    except OSError:
        return None


def give_back() -> None:
    """Let this process's allocator keep little of what is freed; left alone, glibc keeps up to 64 MiB.

    Does nothing where the allocator is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, OWN_PAGES)
        mallopt(_M_TRIM_THRESHOLD, OWN_PAGES)


def trim() -> None:
    """Give what was freed back to the system, between blocks that are still held as well.

    Where a small result lies above what a layer freed, glibc keeps all of that.
    """
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if release is not None:
        release(0)


class Meter:
    """Measures a model's loading and its passes, and keeps them within `limit` bytes if there is one.

    Made when `load` is entered. What the caller takes between two passes, traces that it holds on to among
    it, is not the next pass's.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self.limit = limit
        self._device = device
        self._gauge: Gauge | None = None
        self._base = 0
        self._overhead = 0  # what loading left beyond the weights, less what files back of those
        self._depth = 0
        self._peaks: dict[str, int] = {}
        self._way = ""

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around everything that loads; `loaded` comes last."""
        if self.limit is not None and self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            _, total = torch.cuda.mem_get_info(self._device)
            allowed = self.limit + torch.cuda.memory_reserved(self._device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), self._device)
        elif self.limit is not None:
            give_back()
            gc.collect()  # a model that nobody holds any more is not what the process has
            trim()
        with self._measuring(mapping=True):
            self._base = self._begun()
            yield

    def loaded(self, held: int) -> None:
        """The model is there, `held` bytes of weights with it. InputError if that took too much."""
        self.mark("load")
        if self._gauge is not None:
            self._overhead = self._gauge.now() - self._base - held

    @contextmanager
    def running(self, held: int) -> Iterator[None]:
        """Around a pass, which begins with `held` bytes of weights. Within itself it does nothing."""
        if self._depth:
            yield
            return
        if self.limit is not None and self._device.type == "cpu":
            trim()  # as every mark does: what others freed would go then, and be taken for ours
        with self._measuring(mapping=False):
            if self._gauge is not None:
                self._base = self._begun() - held - self._overhead
            self._peaks = {name: size for name, size in self._peaks.items() if name == "load"}
            yield

    def _begun(self) -> int:
        """In use at the start: the peak so far, for what goes between two looks is not then taken later."""
        return 0 if self._gauge is None else self._gauge.peak()

    @contextmanager
    def _measuring(self, *, mapping: bool) -> Iterator[None]:
        self._gauge = gauge(self._device, limited=self.limit is not None, mapping=mapping)
        self._way = "" if self._gauge is None else self._gauge.way
        self._depth += 1
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.limit is None:
                raise
            raise self._exceeded("was not enough: torch could not get what it needs") from error
        finally:
            self._depth -= 1
            if self._gauge is not None:
                self._gauge.stop()
            self._gauge = None

    def mark(self, part: str, *, again: bool = False) -> None:
        """The end of a stretch that is measured as `part`. InputError if more was taken than allowed.

        again : another such stretch may follow, and take up what this one freed.
        """
        if self._gauge is None:
            return
        most = self._gauge.peak() - self._base
        self._peaks[part] = max(self._peaks.get(part, 0), most)
        if self.limit is not None and most > self.limit:
            raise self._exceeded(f"was exceeded: {part} took {in_words(most)}")
        kept = again and self.limit is not None and most <= ROOMY * self.limit
        if self.limit is not None and self._device.type == "cpu" and not kept:
            trim()  # every page that the next stretch takes has to be found anew
        self._gauge.restart()

    def _exceeded(self, what: str) -> InputError:
        assert self.limit is not None
        return InputError(
            f"memory={in_words(self.limit)} {what}",
            remedy="allow more; a run with --out keeps its finished layers for --resume",
        )

    def to_json(self) -> dict[str, Any]:
        """`bytes`: the most that loading, the layers and so on held, and `total`, the most of this pass."""
        parts = {name: size for name, size in self._peaks.items() if name != "load"}
        return {
            "limit": self.limit,
            "way": self._way,
            "bytes": {**self._peaks, **({"total": max(parts.values())} if parts else {})},
        }
