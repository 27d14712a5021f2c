"""Reading parts of a large file into buffers that exist already, past the page cache where that is allowed.

A checkpoint larger than memory passes through once: caching it would only push everything else out, and on
the disks measured direct requests of some MiB are up to twice as fast as buffered ones. Direct reads need
memory and file offset to be congruent modulo a page; ragged ends go through the cache, and so does what
lies there already.

Asking whether it lies there must not bring it there. The kernel answers a page that is missing by reading it, and
as many after it as it thinks will be wanted, so that the next question would be answered by yes, and the whole
file pass through the cache: with memory to be found for it, while the model computes. So it is asked through a
descriptor that is declared to be read at random, which brings the one page, and for other pages each time.
"""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path

from lmtt.errors import CheckpointError

PAGE = 4096  # what direct reads are aligned to; covers disks with sectors of 512 and 4096 bytes
PAGES_ASKED = 3  # of a request's: the more, the less likely all are left from being asked for before
REQUEST = 8 << 20  # bytes a read asks for: large enough for full speed, small enough to be interrupted


class WeightFile:
    """A file open for positioned reads. Threads may share it.

    direct : ask for reads past the page cache; a file system that refuses them is read through it.
    """

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        self.path = path
        self._direct = self._single = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot read {path.name}: {error.strerror}") from error
        self.size = os.fstat(self._fd).st_size
        if direct and hasattr(os, "O_DIRECT"):
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                self._single = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                os.posix_fadvise(self._single, 0, 0, os.POSIX_FADV_RANDOM)
            except OSError:
                self._close_direct()  # tmpfs and some network file systems
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
            return self._single, min(left, ragged)
        whole = min(left, REQUEST) // PAGE * PAGE
        address = ctypes.addressof(ctypes.c_char.from_buffer(raw)) + done
        if whole == 0:
            return self._single, left
        if address % PAGE or self._is_cached(raw[done : done + whole], offset):
            return self._fd, min(left, REQUEST)
        return self._direct, whole

    def _is_cached(self, pages: memoryview, offset: int) -> bool:
        """Whether some of these pages, all that were drawn, can be had without the disk; they are then in place."""
        for _ in range(PAGES_ASKED):
            at = random.randrange(len(pages) // PAGE) * PAGE
            try:
                got = os.preadv(self._single, [pages[at : at + PAGE]], offset + at, os.RWF_NOWAIT)
            except OSError:  # EAGAIN: it is not there; others: the kernel or file system cannot say
                return False
            if got != PAGE:
                return False
        return True

    def close(self) -> None:
        """Close it; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._close_direct()
        self.is_direct = False

    def _close_direct(self) -> None:
        for fd in (self._direct, self._single):
            if fd >= 0:
                os.close(fd)
        self._direct = self._single = -1


def _of(what: str) -> str:
    return f" ({what})" if what else ""
