"""Large buffers on the host, in pages of 2 MiB where the system has them.

A fresh buffer costs one page fault per page: in pages of 4 KiB, those of a gigabyte take longer than what is
to be done with it, and on a virtual machine the host may have to find the memory again, too. Linux gives huge
pages to who asks; elsewhere nothing changes. What is needed again and again is kept within `reusing`;
memory of a result that nobody holds may be the next one's (`Spare`).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

LARGE = 32 << 20  # bytes: from here on, what a partly used huge page wastes is next to nothing
PAGE = mmap.PAGESIZE
_local = threading.local()  # .kept: what `scratch` hands out within `reusing`


def anonymous(nbytes: int) -> Tensor:
    """uint8 [nbytes], page-aligned, private, zero; pages take memory when first written."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, max(nbytes, PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """As torch.empty on the CPU."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE:
        return torch.empty(shape, dtype=dtype)
    return anonymous(nbytes).view(dtype).view(shape)


class Spare:
    """The buffer of a result that nobody holds any more, for the next one.

    Fresh pages may take longer than what is written to them, most of all where a host has taken them back.
    """

    MOST = 256 << 20  # bytes; larger ones are given back

    def __init__(self) -> None:
        self._kept: list[Tensor] = []  # uint8; appended and popped only, which no thread sees half done

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """As `empty`, and what `back_after` takes; None for buffers that are not worth keeping."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not LARGE <= nbytes <= self.MOST:
            return empty(shape, dtype), None
        try:
            memory = self._kept.pop()
        except IndexError:
            memory = anonymous(nbytes)
        if len(memory) < nbytes:
            memory = anonymous(nbytes)
        return memory[:nbytes].view(dtype).view(shape), memory

    def back_after(self, holder: object, memory: Tensor) -> None:
        """Keep `memory` once `holder`, and hence every view of it, is gone."""
        weakref.finalize(holder, self._back, memory).atexit = False

    def _back(self, memory: Tensor) -> None:
        if not self._kept:
            self._kept.append(memory)


@contextlib.contextmanager
def reusing() -> Iterator[None]:
    """Within, this thread's `scratch` is the same memory every time; it is given back at the end."""
    outer = getattr(_local, "kept", None)
    _local.kept = [] if outer is None else outer  # a pass within a pass shares
    try:
        yield
    finally:
        _local.kept = outer


def scratch(shape: tuple[int, ...]) -> Tensor:
    """float32, uninitialised, for use until the next call, which within `reusing` returns the same memory."""
    kept: list[Tensor] | None = getattr(_local, "kept", None)
    nbytes = 4 * math.prod(shape)
    if kept is None or nbytes < LARGE:
        return empty(shape)
    if not kept or len(kept[0]) < nbytes:
        kept.clear()  # before its successor is there
        kept.append(anonymous(nbytes))
    return kept[0][:nbytes].view(torch.float32).view(shape)
