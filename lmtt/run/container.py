"""One safetensors file: a deterministic writer, and a reader that trusts nothing.

The header is checked here in full before any byte of data is touched, and arrays are filled by pread; the
safetensors library can read what is written, but is not needed. Every file carries, in its metadata, the
blake2b of its own content, so a torn or rotten file is known without any other file.

numpy has no bfloat16: arrays of that type are held as their uint16 words, here and in a `TraceData`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtt.errors import RunError
from lmtt.run.files import Buffer, canonical_json, digest, parse_json, read_exactly

Array = NDArray[Any]

MAX_HEADER_BYTES = 16 << 20
MAX_ENTRIES = 100_000
HASH_CHUNK_BYTES = 1 << 20

# safetensors' names of the types that occur in a run, and how numpy holds them.
NUMPY_TYPE: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
STORED_TYPE = {dtype: name for name, dtype in NUMPY_TYPE.items()}


@dataclass(frozen=True)
class Entry:
    """One array of a file: `dtype` is safetensors' name, `start:end` are bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A header that was checked: its entries cover the data exactly, in `order` and without overlap."""

    entries: dict[str, Entry]  # in order of their offsets
    metadata: dict[str, str]
    data_start: int
    size: int  # of the whole file
    blake2b: str  # what the file says of itself; `read_arrays` checks it


def encode(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[list[Buffer], int, str]:
    """(parts to write, their bytes, the content's hash); a function of the arguments' values alone."""
    # Wide types first, so that every array is aligned for readers that map the file.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    data: list[Buffer] = []
    offset = 0
    for name in names:
        array = np.ascontiguousarray(arrays[name])
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        header[name] = {
            "dtype": STORED_TYPE[little.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        if array.nbytes:
            data.append(little.reshape(-1).view(np.uint8).data)
        offset += array.nbytes
    blake2b = digest([_hashed_header(header, metadata), *data])
    text = canonical_json({"__metadata__": {**metadata, "blake2b": blake2b}, **header}).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise RunError(
            "the run's header is too large", expected=f"at most {MAX_HEADER_BYTES} bytes", got=len(text)
        )
    parts = [len(text).to_bytes(8, "little"), text, *data]
    return parts, 8 + len(text) + offset, blake2b


def _hashed_header(header: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """What the content's hash starts with: the header's canonical JSON without the hash itself."""
    return canonical_json({"__metadata__": dict(metadata), **header}).encode()


def read_header(file: int, label: str) -> Header:
    """Check everything that can be known without reading data; RunError naming what is wrong."""
    size = os.fstat(file).st_size
    start = bytearray(min(size, 64))
    read_exactly(file, memoryview(start), 0, label)
    foreign = _recognise(bytes(start))
    if foreign is not None:
        raise RunError(f"{label} is not a run: {foreign}")
    if size < 8:
        raise RunError(f"{label} is not a run, or is truncated", expected="at least 8 bytes", got=size)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise RunError(
            f"{label} is not a run: its header is too large",
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            got=length,
        )
    if 8 + length > size:
        raise RunError(f"{label} is truncated", expected=f"{8 + length} bytes of header", got=f"{size} bytes")
    text = bytearray(length)
    read_exactly(file, memoryview(text), 8, label)
    if not text.startswith(b"{"):
        raise RunError(f"{label} is not a run: no header at its start")
    return _check(parse_json(bytes(text), f"the header of {label}"), 8 + length, size, label)


def _recognise(start: bytes) -> str | None:
    """What a file is that people mistake for a run, by its first bytes."""
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer to a file that was not fetched; run `git lfs pull`"
    if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and start[8:9] != b"{":
        return "it is a pickle, which is never loaded"
    if start.startswith(b"PK\x03\x04"):
        return "it is a zip archive (torch.save or numpy), which is never loaded"
    if start.startswith(b"GGUF"):
        return "it is a model in GGUF format"
    return None


def _check(header: dict[str, Any], data_start: int, size: int, label: str) -> Header:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RunError(f"{label} is damaged: the header's metadata are not strings")
    if len(header) > MAX_ENTRIES:
        raise RunError(f"{label} has too many arrays", expected=f"at most {MAX_ENTRIES}", got=len(header))
    entries = {name: _entry(name, fields, label) for name, fields in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            raise RunError(f"{label} is damaged: {name!r} starts at {entry.start}", expected=end)
        end = entry.end
    if data_start + end != size:
        raise RunError(
            f"{label} is truncated or has bytes behind its data",
            expected=f"{data_start + end} bytes",
            got=size,
        )
    if "blake2b" not in metadata:
        raise RunError(f"{label} is not part of a run: it carries no checksum")
    return Header(entries, metadata, data_start, size, metadata["blake2b"])


def _entry(name: str, fields: object, label: str) -> Entry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise RunError(f"{label} is damaged: array {name[:80]!r} is not described by type, shape and offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_TYPE:
        raise RunError(
            f"{label}: array {name[:80]!r} has an unknown type",
            expected=", ".join(NUMPY_TYPE),
            got=repr(dtype)[:40],
        )
    if not _is_sizes(shape) or len(shape) > 8 or not _is_sizes(offsets) or len(offsets) != 2:
        raise RunError(f"{label} is damaged: array {name[:80]!r} has impossible sizes")
    start, end = offsets
    # Counting empty axes as 1: numpy refuses [0, 2**61] although it holds nothing.
    if math.prod(max(axis, 1) for axis in shape) >= 1 << 56:
        raise RunError(f"{label} is damaged: array {name[:80]!r} has impossible sizes")
    if end - start != math.prod(shape) * NUMPY_TYPE[dtype].itemsize:
        raise RunError(f"{label} is damaged: array {name[:80]!r} has a shape that its bytes do not fill")
    return Entry(dtype, tuple(shape), start, end)


def _is_sizes(value: object) -> bool:
    # `type`, not `isinstance`: true is an int to Python, but no size.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def read_arrays(
    file: int,
    header: Header,
    label: str,
    *,
    into: Mapping[str, Array] | None = None,
    skip: frozenset[str] = frozenset(),
) -> dict[str, Array]:
    """All arrays but those of `skip`, after the whole content's hash was found right.

    `into` gives arrays to be filled in place (of the entry's shape and type). RunError if the hash differs.
    """
    described = {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.end]}
        for name, entry in header.entries.items()
    }
    metadata = {key: value for key, value in header.metadata.items() if key != "blake2b"}
    state = hashlib.blake2b(_hashed_header(described, metadata), digest_size=32)
    result: dict[str, Array] = {}
    for name, entry in header.entries.items():  # in order of offsets, as the hash wants them
        if name in skip:
            _hash_skipped(file, header.data_start + entry.start, header.data_start + entry.end, label, state)
            continue
        array = (
            into[name]
            if into is not None and name in into
            else np.empty(entry.shape, NUMPY_TYPE[entry.dtype])
        )
        result[name] = array
        if not array.nbytes:
            continue
        content = array.reshape(-1).view(np.uint8)
        read_exactly(file, content.data, header.data_start + entry.start, label)
        state.update(content.data)
        if entry.dtype == "BOOL" and content.max() > 1:
            raise RunError(f"{label} is damaged: array {name[:80]!r} holds bytes that are no truth values")
    if state.hexdigest() != header.blake2b:
        raise RunError(
            f"{label} is damaged: its checksum does not match",
            expected=repr(header.blake2b[:16]),
            got=repr(state.hexdigest()[:16]),
        )
    return result


def _hash_skipped(file: int, start: int, end: int, label: str, state: hashlib.blake2b) -> None:
    """Add bytes to the hash without keeping them."""
    buffer = memoryview(bytearray(min(HASH_CHUNK_BYTES, end - start)))
    while start < end:
        chunk = buffer[: end - start]
        read_exactly(file, chunk, start, label)
        state.update(chunk)
        start += len(chunk)
