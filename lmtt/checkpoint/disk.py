"""Reading parts of a large file into buffers that exist already, past the page cache where that is allowed.

A checkpoint larger than memory passes through once: caching it would only push everything else out, and on
the disks measured direct requests of some MiB are up to twice as fast as buffered ones. Direct reads need
memory and file offset to be congruent modulo a page; ragged ends go through the cache, and so does what
lies there already.

Asking whether it lies there must not bring it there, as reading without waiting does: the kernel answers a
page that is missing by reading ahead, the next question is answered by yes, and the whole file passes through
the cache, which has to find memory for it while the model computes. mincore only looks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from lmtt.errors import CheckpointError

PAGE = 4096  # what direct reads are aligned to; covers disks with sectors of 512 and 4096 bytes
REQUEST = 8 << 20  # bytes a read asks for: large enough for full speed, small enough to be interrupted


class WeightFile:
    """A file open for positioned reads. Threads may share it.

    direct : ask for reads past the page cache; a file system that refuses them is read through it.
    """

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        self.path = path
        self._direct = -1
        self._pages: _CachedPages | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot read {path.name}: {error.strerror}") from error
        self.size = os.fstat(self._fd).st_size
        if direct and hasattr(os, "O_DIRECT"):
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                self._pages = _CachedPages(self._fd) if self.size and _may_look(self._fd, path) else None
            except OSError:
                pass  # tmpfs and some network file systems
        self.is_direct = self._direct >= 0

    def read_into(self, raw: memoryview, offset: int, what: str = "") -> None:
        """Fill `raw` from `offset` on. CheckpointError, naming `what`, if the file ends early or fails."""
        raw = raw.cast("B")
        done, length = 0, len(raw)
        while done < length:
            fd, size = self._next(raw, done, offset + done)
            try:
                got = os.preadv(fd, [raw[done : done + size]], offset + done)
            except OSError as error:
                if fd == self._direct != self._fd:
                    self.is_direct = False  # refused for this file after all
                    continue
                raise CheckpointError(f"cannot read {self.path.name}{_of(what)}: {error.strerror}") from error
            if got == 0:
                raise CheckpointError(
                    f"{self.path.name} ended while it was read{_of(what)}",
                    expected=f"{self.size} bytes, as when it was opened",
                    got=f"{os.fstat(self._fd).st_size}",
                    remedy="download it again, and let nothing write to it during a run",
                )
            done += got

    def _next(self, raw: memoryview, done: int, offset: int) -> tuple[int, int]:
        """The descriptor and the number of bytes of the next request."""
        left = len(raw) - done
        if not self.is_direct:
            return self._fd, min(left, REQUEST)
        ragged = -offset % PAGE
        if ragged:
            return self._fd, min(left, ragged)
        whole = min(left, REQUEST) // PAGE * PAGE
        address = ctypes.addressof(ctypes.c_char.from_buffer(raw)) + done
        cached = self._pages is not None and self._pages.hold(offset, whole)
        if whole == 0 or address % PAGE or cached:
            return self._fd, min(left, REQUEST)
        return self._direct, whole

    def close(self) -> None:
        """Close it; may be called twice."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        if self._pages is not None:
            self._pages.close()
        self._fd = self._direct = -1
        self._pages = None
        self.is_direct = False


class _CachedPages:
    """Which pages of a file lie in the page cache. It is mapped for that, and never touched through it."""

    def __init__(self, fd: int) -> None:
        self._mincore = ctypes.CDLL(None, use_errno=True).mincore
        self._mapped = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self._bytes: np.ndarray[Any, Any] | None = np.frombuffer(self._mapped, np.uint8)

    def hold(self, offset: int, size: int) -> bool:
        """Whether all pages of a part are there. False also where it begins within a page or is empty."""
        if self._bytes is None or offset % PAGE or not 0 < size <= len(self._bytes) - offset:
            return False
        found = np.zeros(-(-size // PAGE), np.uint8)
        start, length = ctypes.c_void_p(self._bytes.ctypes.data + offset), ctypes.c_size_t(size)
        failed = self._mincore(start, length, ctypes.c_void_p(found.ctypes.data))
        return not failed and bool((found & 1).all())

    def close(self) -> None:
        self._bytes = None
        self._mapped.close()


def _may_look(fd: int, path: Path) -> bool:
    """Whether the kernel says what of the file is cached: of files of others it calls every page cached."""
    return os.fstat(fd).st_uid == os.geteuid() or os.geteuid() == 0 or os.access(path, os.W_OK)


def _of(what: str) -> str:
    return f" ({what})" if what else ""
