"""Open a stored run. Every byte of it is untrusted: it is a `TraceData` or one line of `RunError`.

1. run.json (or the packed file's header) is parsed strictly, its version and its own hash are checked.
2. The files it must list follow from its number of layers; no name is taken from it.
3. Each file: length, header, content hash, then names, types and shapes, then the ranges of all indices.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmtt.errors import RunError
from lmtt.run.container import NUMPY_TYPE, Array, Header, read_arrays, read_header
from lmtt.run.data import TraceData
from lmtt.run.files import is_sealed, open_directory, open_regular, parse_json, read_json
from lmtt.run.layout import (
    COST_JSON,
    MAX_LAYERS,
    MAX_TOKENS,
    PACKED,
    RUN_JSON,
    SCHEMA,
    TAIL,
    TAIL_FILE,
    Tail,
    assemble,
    content_files,
    layer_file,
    layer_problem,
    resid_file,
    resid_problem,
    shape_problem,
    tail_problem,
    trace_problem,
    unpack,
)


def read_run(path: str | os.PathLike[str], *, residual: bool = True) -> TraceData:
    """The trace in a run directory or a packed file, checked in full.

    `residual=False` leaves the residual stream on the disk (`resid_pre` is None): enough to show a run,
    and it saves reading most of its bytes. Raises RunError.
    """
    path = Path(path)
    if "\0" in str(path):
        raise RunError(f"{str(path)!r} is not a path")
    try:
        if path.is_dir():
            directory = open_directory(path)
            try:
                return _read_directory(directory, path, residual)
            finally:
                os.close(directory)
        return _read_packed(path, residual)
    except FileNotFoundError as error:
        missing = path / str(error.filename) if path.is_dir() else path
        raise RunError(f"{missing} does not exist", remedy="give a run directory or a .lmtt file") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except MemoryError:
        raise RunError(
            f"{path} does not fit in memory", remedy="open it without its residual stream"
        ) from None


@dataclass(frozen=True)
class _Description:
    """What run.json says of a finished run, its types checked."""

    layers: int
    tokens: tuple[str, ...]
    d_model: int | None  # None if the residual stream is not kept
    meta: dict[str, Any]
    files: Mapping[str, tuple[int, str]]  # name -> bytes, blake2b


def _read_directory(directory: int, path: Path, residual: bool) -> TraceData:
    run = read_json(directory, RUN_JSON, str(path / RUN_JSON))
    check_version(run, path / RUN_JSON)
    if not is_sealed(run):
        raise RunError(f"{path / RUN_JSON} is damaged: its checksum does not match")
    if run.get("complete") is not True:
        raise _unfinished(directory, run, path)
    described = _describe(run, path / RUN_JSON)
    for name, (size, _) in described.files.items():
        found = os.stat(name, dir_fd=directory, follow_symlinks=False).st_size
        if found != size:
            raise RunError(f"{path / name} is truncated or changed", expected=f"{size} bytes", got=found)

    axes = {"T": len(described.tokens), "L": described.layers}
    layers = []
    for layer in range(described.layers):
        arrays = _listed(directory, path, layer_file(layer), described)
        if problem := layer_problem(arrays, axes):
            raise RunError(f"{path / layer_file(layer)}: {problem}")
        layers.append(arrays)
    arrays = _listed(directory, path, TAIL_FILE, described)
    if problem := shape_problem(TAIL, arrays, axes):
        raise RunError(f"{path / TAIL_FILE}: {problem}")
    tail = Tail.of(arrays, described.tokens, None)
    if problem := tail_problem(tail, axes):
        raise RunError(f"{path / TAIL_FILE}: {problem}")
    resid_pre = _read_residual(directory, path, described) if residual else None
    return assemble(layers, tail, described.meta, _read_cost(directory, path), resid_pre=resid_pre)


def _read_residual(directory: int, path: Path, described: _Description) -> Array | None:
    """[L + 1, T, D], filled in place: it is the largest part of a run by far."""
    if described.d_model is None:
        return None
    shape = (len(described.tokens), described.d_model)
    resid_pre: Array | None = None
    for layer in range(described.layers + 1):
        label = str(path / resid_file(layer))
        file = open_regular(directory, resid_file(layer), label)
        try:
            header = read_header(file, label)
            _check_part(header, resid_file(layer), label, described)
            entry = header.entries.get("resid_pre")
            if entry is None or len(header.entries) != 1 or entry.shape != shape:
                raise RunError(f"{label} is damaged: it does not hold one array resid_pre {list(shape)}")
            dtype = NUMPY_TYPE[entry.dtype]
            if resid_pre is None:
                resid_pre = np.empty((described.layers + 1, *shape), dtype)
            if dtype != resid_pre.dtype:
                raise RunError(f"{label} is {dtype}, expected {resid_pre.dtype} as in the first layer")
            read_arrays(file, header, label, into={"resid_pre": resid_pre[layer]})
        finally:
            os.close(file)
    problem = resid_problem(
        resid_pre, described.meta.get("resid_dtype"), (described.layers + 1, len(described.tokens))
    )
    if problem:
        raise RunError(f"{path}: {problem}")
    return resid_pre


def _listed(directory: int, path: Path, name: str, described: _Description) -> dict[str, Array]:
    """The arrays of a file that run.json lists, with the content that it lists."""
    arrays, header = read_part(directory, name, str(path / name))
    _check_part(header, name, str(path / name), described)
    return arrays


def _check_part(header: Header, name: str, label: str, described: _Description) -> None:
    if header.metadata.get("part") != name or header.blake2b != described.files[name][1]:
        raise RunError(f"{label} is not the file that run.json lists: its checksum differs")


def read_part(directory: int, name: str, label: str) -> tuple[dict[str, Array], Header]:
    """All arrays of one file of a run, its own checksum verified. RunError, or OSError on opening it."""
    file = open_regular(directory, name, label)
    try:
        header = read_header(file, label)
        return read_arrays(file, header, label), header
    finally:
        os.close(file)


def _read_cost(directory: int, path: Path) -> dict[str, Any]:
    sealed = read_json(directory, COST_JSON, str(path / COST_JSON))
    cost = sealed.get("cost")
    if not isinstance(cost, dict) or not is_sealed(sealed):
        raise RunError(f"{path / COST_JSON} is damaged: its checksum does not match")
    return cost


def check_version(run: Mapping[str, Any], label: Path) -> None:
    """RunError unless this is a run of the format that this module reads."""
    schema = run.get("schema")
    match = re.fullmatch(r"lmtt\.run/([1-9]\d{0,5})", schema) if isinstance(schema, str) else None
    if match is None:
        raise RunError(
            f"{label} does not describe a run", expected=f"schema {SCHEMA!r}", got=repr(schema)[:60]
        )
    if schema != SCHEMA:
        raise RunError(
            f"{label} is of a newer format", expected=SCHEMA, got=schema, remedy="upgrade lmtt to open it"
        )


def _unfinished(directory: int, run: Mapping[str, Any], path: Path) -> RunError:
    manifest = run.get("manifest")
    total = manifest.get("layers") if isinstance(manifest, dict) else None
    if type(total) is not int:
        return RunError(f"{path / RUN_JSON} is damaged: it does not say how many layers the run has")
    return RunError(
        f"{path} is unfinished: {committed(directory)} of {total} layers", remedy="continue with --resume"
    )


def committed(directory: int) -> int:
    """Layers whose residual stream is there: those that a resumed run will not compute again."""
    found = (re.fullmatch(r"resid-(\d{3,6})\.safetensors", name) for name in os.listdir(directory))
    return max((int(match[1]) for match in found if match), default=0)


def _describe(run: Mapping[str, Any], label: Path) -> _Description:
    """The fields of a finished run.json; RunError naming the first that is not what it must be."""
    dimensions = _field(run, "dimensions", dict, label)
    layers = _count(dimensions, "layers", MAX_LAYERS, label)
    count = _count(dimensions, "tokens", MAX_TOKENS, label)
    d_model = (
        None if dimensions.get("d_model", 0) is None else _count(dimensions, "d_model", MAX_TOKENS, label)
    )
    listed = _field(run, "files", dict, label)
    if len(listed) != layers * (1 if d_model is None else 2) + (1 if d_model is None else 2):
        raise RunError(f"{label} is damaged: it lists {len(listed)} files for {layers} layers")
    files: dict[str, tuple[int, str]] = {}
    for name in content_files(layers, full=d_model is not None):
        entry = listed.get(name)
        if not isinstance(entry, dict):
            raise RunError(f"{label} is damaged: it does not list {name}")
        files[name] = (_count(entry, "bytes", 1 << 62, label), _field(entry, "blake2b", str, label))
    return _Description(layers, _tokens(run, count, label), d_model, _field(run, "meta", dict, label), files)


def _tokens(run: Mapping[str, Any], count: int, label: Path) -> tuple[str, ...]:
    tokens = _field(run, "tokens", list, label)
    if len(tokens) != count or not all(isinstance(token, str) for token in tokens):
        raise RunError(f"{label} is damaged: its tokens are not {count} strings")
    return tuple(tokens)


def _field(value: Mapping[str, Any], key: str, kind: type, label: Path) -> Any:
    if not isinstance(value.get(key), kind):
        raise RunError(f"{label} is damaged: {key} is missing or no {kind.__name__}")
    return value[key]


def _count(value: Mapping[str, Any], key: str, most: int, label: Path) -> int:
    number = value.get(key)
    if type(number) is not int or not 1 <= number <= most:
        raise RunError(f"{label} is damaged: {key} is {repr(number)[:40]}, expected 1 to {most}")
    return number


def _read_packed(path: Path, residual: bool) -> TraceData:
    file = open_regular(None, path, str(path), follow=True)
    try:
        header = read_header(file, str(path))
        if "lmtt" not in header.metadata:
            raise RunError(f"{path} is not a run: safetensors without lmtt's metadata")
        run = parse_json(header.metadata["lmtt"].encode(errors="replace"), f"the metadata of {path}")
        check_version(run, path)
        skip = frozenset() if residual else frozenset({"resid_pre"})
        arrays = read_arrays(file, header, str(path), skip=skip)
    finally:
        os.close(file)
    resid_pre = arrays.pop("resid_pre", None)
    dimensions = _field(run, "dimensions", dict, path)
    axes = {
        "L": _count(dimensions, "layers", MAX_LAYERS, path),
        "T": _count(dimensions, "tokens", MAX_TOKENS, path),
    }
    tokens = _tokens(run, axes["T"], path)
    if problem := shape_problem(PACKED, arrays, axes):
        raise RunError(f"{path}: {problem}")
    data = unpack(arrays, tokens, resid_pre, _field(run, "meta", dict, path), _field(run, "cost", dict, path))
    if problem := trace_problem(data):
        raise RunError(f"{path}: {problem}")
    return data
