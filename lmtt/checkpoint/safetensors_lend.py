"""Our reading of safetensors files, lent to transformers' own loader for the duration of a load.

transformers decides everything else (config, names, dtypes, ties, devices). It would map the files, and a
mapped file that is cut short kills the process by a signal, at any time while the model is used. Here bytes
are read to their end when a weight is taken, through the page cache, and what fails is an error.

A weight lies at the same address, modulo `ALIGNMENT`, as in its file: products of matrices may be summed in
another order at another alignment, and mapped and streamed weights keep the file's.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtt.checkpoint.disk import WeightFile
from lmtt.checkpoint.safetensors_source import DTYPES, SafetensorsSource, read_header
from lmtt.errors import CheckpointError

ALIGNMENT = 64  # bytes; the widest vector registers and cache lines
OWN_PAGES = 4 << 20  # bytes; from here on a weight has pages of its own
_one_at_a_time = threading.RLock()  # what is lent is lent to the whole process
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextlib.contextmanager
def own_reader() -> Iterator[None]:
    """While open, transformers reads safetensors files by position. The first CheckpointError of a read is
    raised at the end, whatever transformers made of it."""
    from transformers import modeling_utils

    failed: list[CheckpointError] = []
    with _one_at_a_time, contextlib.ExitStack() as files:

        def opened(filename: Any, *_: Any, **__: Any) -> _File:
            return files.enter_context(_File(Path(filename), failed))

        files.callback(setattr, modeling_utils, "safe_open", modeling_utils.safe_open)
        modeling_utils.safe_open = opened
        try:
            yield
        except Exception:
            if failed:
                raise failed[0] from None
            raise
        if failed:
            raise failed[0]


def _room(nbytes: int, offset: int) -> Tensor:
    """uint8 [nbytes] whose address is congruent to `offset`."""
    if nbytes >= OWN_PAGES and hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, nbytes + ALIGNMENT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)  # a page fault for 2 MiB, not for each 4 KiB of them
        room = torch.frombuffer(memory, dtype=torch.uint8)
    else:
        room = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
    start = (offset - room.data_ptr()) % ALIGNMENT
    return room[start : start + nbytes]


class _File:
    """One file, with as much of safetensors' `safe_open` as transformers uses."""

    def __init__(self, path: Path, failed: list[CheckpointError]) -> None:
        self._failed = failed
        file = WeightFile(path)
        try:
            self._source = SafetensorsSource(path.name, [file], read_header(file, 0))
        except CheckpointError as error:
            file.close()
            failed.append(error)
            raise

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def keys(self) -> list[str]:
        return list(self._source.tensors)

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}

    def get_slice(self, name: str) -> _Weight:
        return _Weight(self._source, name, self._failed)

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)[...]


class _Weight:
    """One tensor, read whole when it is indexed."""

    def __init__(self, source: SafetensorsSource, name: str, failed: list[CheckpointError]) -> None:
        self._source, self._name, self._failed = source, name, failed
        self._info = source.tensors[name]

    def __getitem__(self, index: Any) -> Tensor:
        info = self._info
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)[index]
        raw = _room(info.nbytes, info.position[1])
        try:
            self._source.read_into(self._name, raw.numpy().data)
        except CheckpointError as error:
            self._failed.append(error)
            raise
        if raw.data_ptr() % info.dtype.itemsize:
            raw = raw.clone()  # a header of odd length; elements must lie on their own boundaries
        return raw.view(info.dtype).view(info.shape)[index]

    def get_dtype(self) -> str:
        return _NAMES[self._info.dtype]

    def get_shape(self) -> list[int]:
        return list(self._info.shape)
