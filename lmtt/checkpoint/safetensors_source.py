"""A safetensors checkpoint, single or sharded, as a `WeightSource`: headers read strictly, bytes by position.

What is refused, by the name of the file: a header that is too long, not JSON, or names a tensor twice; sizes
that contradict shapes; overlaps and holes; a file shorter or longer than its header promises; a shard that
is missing, or that lies outside the checkpoint's own folder; an index and shards that disagree.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lmtt.checkpoint.disk import WeightFile
from lmtt.checkpoint.source import TensorInfo
from lmtt.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_TENSORS = 100_000
MAX_DIMS = 8
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LFS = b"version https://git-lfs"
_DAMAGED = "download it again"


class SafetensorsSource:
    """An open checkpoint. `WeightSource` says what the methods do."""

    def __init__(self, name: str, files: list[WeightFile], tensors: dict[str, TensorInfo]) -> None:
        self._name = name
        self._files = files
        self._tensors = MappingProxyType(tensors)

    @property
    def name(self) -> str:
        return self._name

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_into(self, tensor: str, raw: memoryview, start: int = 0) -> None:
        info = self._tensors[tensor]
        if start < 0 or start + raw.nbytes > info.nbytes:
            raise ValueError(f"{tensor} has {info.nbytes} bytes, asked for {start} to {start + raw.nbytes}")
        file, offset = info.position
        self._files[file].read_into(raw, offset + start, tensor)

    def decode(self, tensor: str, raw: Tensor, out: Tensor, rows: range | None = None) -> None:
        info = self._tensors[tensor]
        if raw.data_ptr() % info.dtype.itemsize:
            raw = raw.clone()  # a header of odd length; elements must lie on their own boundaries
        out.copy_(raw.view(info.dtype).view(out.shape))

    def close(self) -> None:
        for file in self._files:
            file.close()


def open_safetensors(folder: Path) -> SafetensorsSource:
    """Open a folder's checkpoint: `model.safetensors.index.json` with its shards, or `model.safetensors`.

    Raises
    ------
    CheckpointError
        There is none, or it is damaged; one line naming the file and what is wrong with it.
    """
    if (folder / INDEX).is_file():
        weight_map = _read_index(folder / INDEX)
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        weight_map, names = None, [SINGLE]
    else:
        raise CheckpointError(f"{folder.name} holds neither {INDEX} nor {SINGLE}")
    files: list[WeightFile] = []
    tensors: dict[str, TensorInfo] = {}
    try:
        for number, name in enumerate(names):
            files.append(_open(folder, name))
            for tensor, info in read_header(files[-1], number).items():
                if tensor in tensors:
                    other = names[tensors[tensor].position[0]]
                    raise CheckpointError(f"tensor {tensor} is in {other} and again in {name}")
                tensors[tensor] = info
        if weight_map is not None:
            _compare(weight_map, tensors, names)
    except BaseException:
        for file in files:
            file.close()
        raise
    return SafetensorsSource(folder.name, files, tensors)


def _open(folder: Path, name: str) -> WeightFile:
    path = folder / name
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"shard {name} is missing", expected="every shard that the index names")
    if not path.is_file():
        raise CheckpointError(f"shard {name} is not a regular file")
    if not _inside(folder, path):
        raise CheckpointError(
            f"shard {name} is a link that leads out of its folder",
            expected="a file in the model's folder, or in the hub's cache that the folder is part of",
            remedy="name the folder that the file lies in",
        )
    return WeightFile(path, direct=True)


def _inside(folder: Path, path: Path) -> bool:
    """Whether a file is where its name says, links followed: a link may lead anywhere on the machine.

    The hub's cache keeps files in `blobs/` and links to them from `snapshots/REVISION/`.
    """
    try:
        home, real = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    blobs = home.parent.parent / "blobs"
    return real.is_relative_to(home) or (home.parent.name == "snapshots" and real.is_relative_to(blobs))


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> shard, all of them plain file names."""
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path.name} is too long", expected=f"at most {MAX_INDEX_BYTES} bytes")
    try:
        weight_map = json.loads(path.read_bytes(), object_pairs_hook=_no_twins)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not a checkpoint's index: {error}", remedy=_DAMAGED) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name} names no tensors", remedy=_DAMAGED)
    for shard in weight_map.values():
        plain = isinstance(shard, str) and shard not in ("", ".", "..")
        if not plain or any(c in shard for c in "/\\\0") or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path.name} names a shard outside its folder",
                expected="a plain .safetensors name",
                got=repr(shard)[:80],
            )
    return weight_map


def _compare(weight_map: dict[str, str], tensors: dict[str, TensorInfo], names: list[str]) -> None:
    for tensor, shard in weight_map.items():
        if tensor not in tensors:
            raise CheckpointError(
                f"the index names tensor {tensor[:80]}, which shard {shard} lacks", remedy=_DAMAGED
            )
        if names[tensors[tensor].position[0]] != shard:
            raise CheckpointError(f"tensor {tensor[:80]} is not in the shard {shard} that the index names")


def read_header(file: WeightFile, number: int) -> dict[str, TensorInfo]:
    """A file's tensors; `number` is the file's in their positions. CheckpointError if it is damaged."""
    name = file.path.name
    start = bytearray(min(file.size, len(_LFS)))
    file.read_into(memoryview(start), 0)
    if start == _LFS:
        raise CheckpointError(
            f"{name} is a git-lfs pointer, not the weights", remedy="fetch them with `git lfs pull`"
        )
    length = int.from_bytes(start[:8], "little") if file.size >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, file.size - 8):
        raise CheckpointError(
            f"{name} is not a safetensors file, or damaged: the length of its header is wrong",
            expected=f"2 to {max(2, min(MAX_HEADER_BYTES, file.size - 8))} bytes",
            got=length if length >= 0 else f"a file of {file.size} bytes",
            remedy=_DAMAGED,
        )
    raw = bytearray(length)
    file.read_into(memoryview(raw), 8)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {name} cannot be read: {error}", remedy=_DAMAGED) from None
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise CheckpointError(
            f"the header of {name} is not a table of tensors", expected=f"at most {MAX_TENSORS}"
        )
    header.pop("__metadata__", None)
    infos = {tensor: _info(name, tensor, entry, number, 8 + length) for tensor, entry in header.items()}
    end = 8 + length
    for tensor, info in sorted(infos.items(), key=lambda item: (item[1].position, item[1].nbytes)):
        if info.position[1] != end:
            what = "overlaps another" if info.position[1] < end else "leaves a hole before it"
            raise CheckpointError(
                f"the header of {name} is damaged: tensor {tensor[:80]} {what}", remedy=_DAMAGED
            )
        end += info.nbytes
    if end != file.size:
        raise CheckpointError(
            f"{name} is {'cut short' if file.size < end else 'too long'}",
            expected=f"{end} bytes",
            got=file.size,
            remedy=_DAMAGED,
        )
    return infos


def _info(name: str, tensor: str, entry: Any, number: int, base: int) -> TensorInfo:
    where = f"the header of {name} is damaged: tensor {tensor[:80]}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets", remedy=_DAMAGED)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} is of an unknown type", got=repr(dtype)[:40])
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        counts = isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**62 for n in numbers)
        if not counts:
            raise CheckpointError(f"{where} has a {what} that is no list of counts", remedy=_DAMAGED)
    if len(offsets) != 2 or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{where} has too many numbers", remedy=_DAMAGED)
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where} of shape {shape} and type {dtype}", expected=f"{nbytes} bytes",
            got=offsets[1] - offsets[0], remedy=_DAMAGED,
        )  # fmt: skip
    return TensorInfo(
        tuple(shape), DTYPES[dtype], nbytes, (number, base + offsets[0]), plain=True, rows=bool(shape)
    )


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
