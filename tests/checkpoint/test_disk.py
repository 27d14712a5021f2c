"""Reading past the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from lmtt.checkpoint.disk import PAGE, REQUEST, WeightFile

REQUESTS = 6


def resident_pages(path: Path) -> int:
    """How many pages of a file lie in the page cache."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        found = np.zeros(-(-len(view) // PAGE), np.uint8)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), ctypes.c_void_p(found.ctypes.data)
        )
        assert not failed, os.strerror(ctypes.get_errno())
        del view
    return int((found & 1).sum())


def drop(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A file of several requests, out of the cache, and what is in it."""
    path = tmp_path / "weights"
    content = np.random.default_rng(0).integers(0, 256, REQUESTS * REQUEST + 100, np.uint8)
    path.write_bytes(content.tobytes())
    drop(path)
    file = WeightFile(path, direct=True)
    direct = file.is_direct
    file.close()
    if not direct:
        pytest.skip("the temporary folder's file system has no direct reads")
    if resident_pages(path):
        pytest.skip("the temporary folder's file system keeps what it was told to drop")
    return path, content


def read(path: Path, offset: int, size: int) -> np.ndarray:
    """Through `WeightFile`, into memory that direct reads may go to."""
    room = mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE)
    start = offset % PAGE
    file = WeightFile(path, direct=True)
    file.read_into(memoryview(room)[start : start + size], offset)
    assert file.is_direct, "not refused on the way"
    file.close()
    return np.frombuffer(room, np.uint8)[start : start + size]


@pytest.mark.parametrize("offset", [0, 17, PAGE - 1])
def test_what_is_read_again_and_again_does_not_fill_the_cache(
    stored: tuple[Path, np.ndarray], offset: int
) -> None:
    """Whether a page is cached is asked without bringing it there: no pass takes the next one for cached."""
    path, content = stored
    for number in range(1, 4):
        assert np.array_equal(read(path, offset, len(content) - offset), content[offset:])
        # the ragged ends, with what the system reads ahead of them
        assert resident_pages(path) <= 128, f"after {number} passes"


def test_what_lies_in_the_cache_is_taken_from_there(
    stored: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = stored
    path.read_bytes()
    file = WeightFile(path, direct=True)
    monkeypatch.setattr(file, "_direct", 1 << 20)  # no such descriptor: a direct read would fail
    room = mmap.mmap(-1, REQUESTS * REQUEST)
    file.read_into(memoryview(room), 0)
    assert file.is_direct
    assert np.array_equal(np.frombuffer(room, np.uint8), content[: len(room)])
    monkeypatch.undo()
    file.close()
