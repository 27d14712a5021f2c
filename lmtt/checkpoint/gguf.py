"""GGUF headers, read strictly.

`read_header` reads counts, names, types and offsets with every length bounded before it is used; a file that
lies about its size is refused in words and nothing of it reaches native code.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

from __future__ import annotations

import functools
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtt.errors import CheckpointError

MAX_HEADER_BYTES = 256 << 20  # the largest vocabularies in use take about 10 MiB
MAX_ENTRIES = 1 << 20  # metadata keys, and tensors
MAX_DIMS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Field:
    """One metadata entry, shaped as transformers' loader reads it: values are parts[i] for i in data."""

    types: list[int]
    parts: list[Any]
    data: range


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file. `shape` is innermost first, as stored; `offset` is absolute."""

    path: Path
    name: str
    shape: tuple[int, ...]
    tensor_type: Any  # gguf.GGMLQuantizationType
    offset: int
    n_bytes: int

    @property
    def data(self) -> NDArray[Any]:
        """The raw blocks, read now: uint8 [..., row bytes], or the plain floating type [...]."""
        import gguf

        buffer = bytearray(self.n_bytes)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            view = memoryview(buffer)
            while view:
                got = file.readinto(view)
                if not got:
                    raise CheckpointError(
                        f"{self.path.name} ended while {self.name} was being read",
                        remedy="was the file replaced?",
                    )
                view = view[got:]
        shape = tuple(reversed(self.shape))
        plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
        if self.tensor_type in plain:
            return np.frombuffer(buffer, plain[self.tensor_type]).reshape(shape)
        return np.frombuffer(buffer, np.uint8).reshape(*shape[:-1], -1)


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself; drop-in for the parts of `gguf.GGUFReader` that loading uses."""

    path: Path
    version: int
    fields: dict[str, Field]
    tensors: tuple[TensorInfo, ...]

    def get_field(self, name: str) -> Field | None:
        return self.fields.get(name)


class _Cursor:
    """Bounded reading of the header's bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        with path.open("rb") as file:
            self.bytes = file.read(min(self.size, MAX_HEADER_BYTES))
        self.at = 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path.name}: {what} at byte {self.at}",
            expected="a complete GGUF file",
            got=f"{self.size} bytes",
            remedy="download it again",
        )

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.bytes) - self.at:
            raise self.fail(f"{what} runs past the end")
        self.at += count
        return self.bytes[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, code: str, what: str, limit: int) -> int:
        value = int(self.number(code, what))
        if value > limit:
            raise self.fail(f"{what} is {value}, more than {limit}")
        return value

    def string(self, what: str) -> bytes:
        return self.take(self.count("Q", f"the length of {what}", len(self.bytes)), what)

    def strings(self, count: int, what: str) -> list[bytes]:
        """`count` of them; vocabularies are most of a header, so this loop calls nothing of ours."""
        data, at, end, length_at, found = self.bytes, self.at, len(self.bytes), _LENGTH.unpack_from, []
        for _ in range(count):
            start = at + 8
            if start > end or (at := start + length_at(data, at)[0]) > end:
                self.at = min(start, end)
                raise self.fail(f"{what} runs past the end")
            found.append(data[start:at])
        self.at = at
        return found

    def name(self, what: str) -> str:
        try:
            return self.string(what).decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def field(self, key: str) -> Field:
        kind = int(self.number("I", f"the type of {key}"))
        if kind != _ARRAY:
            return Field([kind], [self.value(kind, key)], range(1))
        item = int(self.number("I", f"the item type of {key}"))
        length = self.count("Q", f"the length of {key}", len(self.bytes))
        if item == _STRING:
            parts: list[Any] = self.strings(length, key)
        elif item in _SCALARS:
            code = np.dtype({"?": "?"}.get(_SCALARS[item], _SCALARS[item])).newbyteorder("<")
            raw = np.frombuffer(self.take(length * code.itemsize, key), code)
            parts = list(raw.reshape(-1, 1))
        else:
            raise self.fail(f"{key} holds items of type {item}, which is not one of GGUF's")
        return Field([_ARRAY, item], parts, range(length))

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind not in _SCALARS:
            raise self.fail(f"{key} has type {kind}, which is not one of GGUF's")
        return (self.number(_SCALARS[kind], key),)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a GGUF file; no tensor is read.

    Raises
    ------
    CheckpointError
        Not GGUF, an unsupported version, truncated, or a header that contradicts the file.
    """
    return _read_header(Path(path).resolve(), Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read_header(path: Path, _changed: int) -> Header:
    import gguf

    cursor = _Cursor(path)
    magic = cursor.bytes[:4]
    if magic != b"GGUF":
        hint = (
            "a git-lfs pointer: run `git lfs pull`"
            if cursor.bytes.startswith(b"version https://git-lfs")
            else None
        )
        raise CheckpointError(
            f"{path.name} is not a GGUF file", expected="magic GGUF", got=repr(magic), remedy=hint
        )
    cursor.at = 4
    version = int(cursor.number("I", "the version"))
    if version not in (2, 3):
        raise CheckpointError(f"{path.name}: unsupported GGUF version", expected="2 or 3", got=version)
    n_tensors = cursor.count("Q", "the number of tensors", MAX_ENTRIES)
    n_fields = cursor.count("Q", "the number of metadata entries", MAX_ENTRIES)

    fields: dict[str, Field] = {}
    for _ in range(n_fields):
        key = cursor.name("a metadata key")
        if key in fields:
            raise cursor.fail(f"metadata key {key} appears twice")
        fields[key] = cursor.field(key)

    infos: list[tuple[str, tuple[int, ...], Any, int, int]] = []
    seen: set[str] = set()
    for _ in range(n_tensors):
        name = cursor.name("a tensor name")
        if name in seen:
            raise cursor.fail(f"tensor {name} appears twice")
        seen.add(name)
        dims = cursor.count("I", f"the rank of {name}", MAX_DIMS)
        shape = tuple(cursor.count("Q", f"a dimension of {name}", 1 << 40) for _ in range(dims))
        code = int(cursor.number("I", f"the type of {name}"))
        offset = cursor.count("Q", f"the offset of {name}", cursor.size)
        try:
            kind = gguf.GGMLQuantizationType(code)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise cursor.fail(f"{name} has quantisation type {code}, which is unknown") from None
        if not shape or shape[0] % block:
            raise cursor.fail(f"{name} of shape {shape} is not made of blocks of {block}")
        infos.append((name, shape, kind, offset, math.prod(shape) // block * block_bytes))

    alignment = int(fields["general.alignment"].parts[0][0]) if "general.alignment" in fields else 32
    if alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment}, not a power of two")
    start = (cursor.at + alignment - 1) // alignment * alignment
    tensors = []
    for name, shape, kind, offset, n_bytes in infos:
        if offset % alignment or start + offset + n_bytes > cursor.size:
            raise CheckpointError(
                f"{path.name}: tensor {name} lies outside the file or is misaligned",
                expected=f"at least {start + offset + n_bytes} bytes",
                got=cursor.size,
                remedy="the file is truncated: download it again",
            )
        tensors.append(TensorInfo(path, name, shape, kind, start + offset, n_bytes))
    return Header(path, version, fields, tuple(tensors))
