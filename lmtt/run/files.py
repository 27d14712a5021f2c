"""The few operations on files that a run is made of: durable writes, bounded reads, one lock.

All of them work on an open directory and a bare name, so nothing that a run contains can lead out of it.
Writes: temporary name, write, fsync, rename, fsync of the directory. Reads: regular files only, never
through a symbolic link, by pread (a mapping of a file that shrinks kills the process).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmtt.errors import RunError

MAX_JSON_BYTES = 16 << 20
MAX_JSON_CONTAINERS = 1_000_000  # opening brackets: bounds the time and memory of parsing hostile JSON
MAX_JSON_DEPTH = 64
TEMPORARY_SUFFIX = ".tmp"

Buffer = bytes | memoryview


def open_directory(path: Path) -> int:
    """A descriptor of the directory; OSError if there is none."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def lock(directory: int, path: Path) -> None:
    """Take the exclusive lock of a run directory, held until the descriptor is closed."""
    try:
        # On the directory itself: no lock file to leave behind, or to remove under another's feet.
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(
            f"{path} is being written by another process", remedy="wait for it, or choose another output"
        ) from None
    except OSError as error:
        raise RunError(
            f"{path} cannot be locked: {error.strerror}", remedy="write the run to a local disk"
        ) from None


def temporary_name(name: str) -> str:
    return f".{name}{TEMPORARY_SUFFIX}"


def intended_name(temporary: str) -> str | None:
    """The inverse of `temporary_name`; None for names of other files."""
    if not (temporary.startswith(".") and temporary.endswith(TEMPORARY_SUFFIX)):
        return None
    return temporary[1 : -len(TEMPORARY_SUFFIX)]


def write_durably(
    directory: int, name: str, parts: Iterable[Buffer], *, temporary: str | None = None
) -> None:
    """Replace `name` in the directory by the concatenated parts, completely or not at all.

    On OSError the temporary file is removed and what was there before stays.
    """
    temporary = temporary_name(name) if temporary is None else temporary
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        file = os.open(temporary, flags, 0o666, dir_fd=directory)
        try:
            for part in parts:
                _write_all(file, part)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    except OSError:
        # After a failed fsync the pages may be gone although a second one would succeed: it takes a new file.
        remove(directory, temporary)
        raise


def _write_all(file: int, part: Buffer) -> None:
    rest = memoryview(part).cast("B")
    while rest:
        rest = rest[os.write(file, rest) :]


def remove(directory: int, name: str) -> None:
    """Remove a file if it is there and can be removed; a leftover is removed by the next writer."""
    try:
        os.unlink(name, dir_fd=directory)
    except OSError:
        return


def open_regular(directory: int | None, name: str | Path, label: str, *, follow: bool = False) -> int:
    """A read descriptor of a regular file. OSError if it is missing or a link, RunError if it is no file.

    `follow` is for the path that the user typed; names inside a run are never followed.
    """
    # O_NONBLOCK: opening a FIFO without it waits for a writer that never comes.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        file = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RunError(f"{label} is a symbolic link", expected="a regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise RunError(f"{label} is not a regular file")
    return file


def read_exactly(file: int, buffer: memoryview, offset: int, label: str) -> None:
    """Fill the buffer from the offset; RunError if the file ends before."""
    while buffer:
        count = os.preadv(file, [buffer], offset)
        if count == 0:
            raise RunError(f"{label} is truncated", expected=f"{len(buffer)} more bytes at offset {offset}")
        buffer = buffer[count:]
        offset += count


def digest(parts: Iterable[Buffer]) -> str:
    """blake2b with 32 bytes, in hexadecimal."""
    state = hashlib.blake2b(digest_size=32)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def canonical_json(value: object) -> str:
    """The one spelling of a JSON value that hashes and comparisons use: ASCII, sorted keys, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def seal(value: Mapping[str, Any]) -> bytes:
    """A JSON object, readable by people, that carries the hash of its own canonical spelling."""
    sealed = {**value, "blake2b": digest([canonical_json(value).encode()])}
    text = (json.dumps(sealed, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
    if len(text) > MAX_JSON_BYTES:
        raise RunError(
            "the run's JSON is too large", expected=f"at most {MAX_JSON_BYTES} bytes", got=len(text)
        )
    return text


def is_sealed(value: Mapping[str, Any]) -> bool:
    """Whether the object still has the hash that it carries."""
    content = {key: item for key, item in value.items() if key != "blake2b"}
    return value.get("blake2b") == digest([canonical_json(content).encode()])


def parse_json(text: bytes, label: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes; RunError for anything that is not one, strictly."""
    if len(text) > MAX_JSON_BYTES or text.count(b"{") + text.count(b"[") > MAX_JSON_CONTAINERS:
        raise RunError(f"{label} is too large", expected=f"at most {MAX_JSON_BYTES} bytes of JSON")
    try:
        value = json.loads(
            text.decode(),
            object_pairs_hook=_without_duplicates,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise RunError(f"{label} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise RunError(f"{label} is not a JSON object")
    _check_depth(value, label)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _finite(text: str) -> float:
    # Python reads 1e999 as infinity, which it cannot write again.
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _check_depth(value: dict[str, Any], label: str) -> None:
    """Bounded nesting, so that nobody who walks the value later runs out of stack."""
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        children = (item for node in level for item in (node.values() if isinstance(node, dict) else node))
        level = [item for item in children if isinstance(item, dict | list)]
        if not level:
            return
    raise RunError(f"{label} is nested too deeply", expected=f"at most {MAX_JSON_DEPTH} levels")


def read_json(directory: int, name: str, label: str) -> dict[str, Any]:
    """The JSON object in a file of the directory; OSError if it cannot be opened."""
    file = open_regular(directory, name, label)
    try:
        size = os.fstat(file).st_size
        if size > MAX_JSON_BYTES:
            raise RunError(f"{label} is too large", expected=f"at most {MAX_JSON_BYTES} bytes", got=size)
        text = bytearray(size)
        read_exactly(file, memoryview(text), 0, label)
    finally:
        os.close(file)
    return parse_json(bytes(text), label)
