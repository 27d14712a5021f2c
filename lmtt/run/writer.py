"""Write a run so that it survives being killed at any moment, and so that equal content is equal bytes.

A layer is committed in two steps, each durable before the next: its results (`layer-NNN`), then the
residual stream that leaves it (`resid-NNN+1`). The second file's presence is the commit: whatever a killed
process left, the newest residual stream whose checksum holds, with all layers before it, is where to go on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from lmtt.errors import InputError, RunError
from lmtt.run.container import Array, encode
from lmtt.run.data import TraceData
from lmtt.run.files import (
    canonical_json,
    intended_name,
    is_sealed,
    lock,
    open_directory,
    parse_json,
    read_json,
    remove,
    seal,
    write_durably,
)
from lmtt.run.layout import (
    COST_JSON,
    MAX_LAYERS,
    OWN_FILES,
    RESID_TYPES,
    RUN_JSON,
    SCHEMA,
    TAIL_FILE,
    Arrays,
    Tail,
    content_files,
    layer_file,
    layer_problem,
    pack,
    resid_file,
    resid_problem,
    split,
    tail_of,
    tail_problem,
    trace_problem,
)
from lmtt.run.reader import check_version, read_part

GENERATIONS = 2  # residual streams that a light run holds: the newest may be torn by a power cut
NOTES = "notes"  # the name, in a layer file's metadata, of what its layer noted
NOTICES = "notices"  # the name, in cost.json, of what was said while a layer was computed
MOST_OF_FREE_SPACE = 0.9  # a run that is expected to need more than this is refused before it starts


class Resumed(NamedTuple):
    """Where a run goes on."""

    layer: int  # the first one to compute; L if only `finish` is left
    resid: Array | None  # [T, D], what enters it; None for layer 0, whose input is the embedding
    load: Callable[[int], dict[str, Array]]  # the results of a committed layer
    notes: Callable[[int], dict[str, Any]]  # what was noted with them
    stream: Callable[[int], Array]  # of a full run: what entered a committed layer, [T, D]
    notices: Callable[[int], list[str]]  # what was said while a committed layer was computed


class RunWriter:
    """One process's hold on a run directory, from the first layer to the last.

    `manifest` is everything that the results are a function of (model, input, settings, chunks), as JSON; a
    run is resumed only under an equal one. It must have `layers` (int), `keep` ("full" or "light") and
    `resid_dtype` (see `RESID_TYPES`). `expected_bytes` is compared with the free space of the disk.

    A directory that holds a run already is refused unless `resume` (go on, or start if there is nothing) or
    `force` (remove it and start). Everything that can fail before computing fails here. Raises RunError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Mapping[str, Any],
        *,
        resume: bool = False,
        force: bool = False,
        expected_bytes: int = 0,
    ) -> None:
        if resume and force:
            raise InputError("a run is either resumed or replaced", got="both resume and force")
        self.path = Path(path)
        self.manifest = dict(manifest)
        self.complete = False  # nothing is left to do: the run can be read
        self._layers, self._full, self._resid_dtype = _requirements(self.manifest)
        self._next: int | None = 0
        self._axes: dict[str, int] = {}  # T, K and D, met with the first layer
        self._files: dict[str, dict[str, Any]] = {}  # name -> bytes and blake2b of what is written
        self._notices: dict[int, list[str]] = {}  # layer -> lines
        created = not self.path.exists()
        with _explained(self.path, "nothing was computed"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._directory = open_directory(self.path)
        try:
            lock(self._directory, self.path)
            with _explained(self.path, "nothing was computed"):
                self._enter(resume, force, expected_bytes)
        except BaseException:
            os.close(self._directory)
            if created:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
            raise

    def _enter(self, resume: bool, force: bool, expected_bytes: int) -> None:
        """Decide by what lies in the directory, and write the manifest of a new run."""
        names = os.listdir(self._directory)
        for name in names:
            if OWN_FILES.fullmatch(intended_name(name) or ""):
                remove(self._directory, name)
        names = [name for name in names if not OWN_FILES.fullmatch(intended_name(name) or "")]
        own = [name for name in names if OWN_FILES.fullmatch(name)]
        if RUN_JSON in names and resume:
            self._check_manifest()
            if self.complete:
                self._drop_residuals()
            self._next = self._layers if self.complete else None
            return
        if RUN_JSON in names and not force:
            raise RunError(
                f"{self.path} holds a run already",
                remedy="continue it with --resume, or replace it with --force",
            )
        if RUN_JSON not in names and len(own) < len(names):
            stranger = min(set(names) - set(own))
            raise RunError(f"{self.path} is not a run: it holds {stranger!r}", remedy="choose another output")
        if own and not force:
            raise RunError(f"{self.path} is a run without {RUN_JSON}", remedy="start over with --force")
        # run.json first: what is left if this is interrupted must not pass for a run that can be resumed.
        for name in sorted(own, key=lambda name: name != RUN_JSON):
            os.unlink(name, dir_fd=self._directory)
            if name == RUN_JSON:
                os.fsync(self._directory)
        check_space(_free(self._directory), self.path, expected_bytes)
        self._write(RUN_JSON, [seal({"schema": SCHEMA, "complete": False, "manifest": self.manifest})])
        _sync_directory(self.path.parent)

    def _check_manifest(self) -> None:
        """RunError unless the stored run has this writer's manifest."""
        label = self.path / RUN_JSON
        run = read_json(self._directory, RUN_JSON, str(label))
        check_version(run, label)
        if not is_sealed(run):
            raise RunError(
                f"{label} is damaged: its checksum does not match", remedy="start over with --force"
            )
        self.complete = run.get("complete") is True
        holder = run.get("meta") if self.complete else run
        stored = holder.get("manifest") if isinstance(holder, dict) else None
        differing = _differences(stored if isinstance(stored, dict) else {}, self.manifest)
        if differing:
            raise RunError(
                f"{self.path} was started with other settings: {', '.join(differing[:5])}",
                remedy="repeat them to resume, or replace the run with --force",
            )

    def resume_state(self, limit: int | None = None) -> Resumed:
        """The newest point whose files are all intact; what lies beyond it is removed.

        `limit` asks for a point at or before that layer: prompts that share each layer's read go on together.
        """
        with _explained(self.path, "nothing was computed"):
            self._notices = self._stored_notices()
            if self.complete:
                return self._resumed(self._layers, None)
            self._files, self._axes = {}, {}
            most = self._layers if limit is None else min(limit, self._layers)
            layer = 0
            while layer < most and self._intact_layer(layer):
                layer += 1
            if self._full and layer > 0:
                # Every stream up to this point is part of the result, so all of them must be intact.
                streams = 0
                while streams <= layer and self._intact_residual(streams) is not None:
                    streams += 1
                layer = max(0, min(layer, streams - 1))
            else:
                while layer > 0 and self._intact_residual(layer) is None:
                    layer -= 1
            resid = self._intact_residual(layer) if layer > 0 else None
            self._discard(layer)
        self._next = layer
        return self._resumed(layer, resid)

    def _resumed(self, layer: int, resid: Array | None) -> Resumed:
        said = self._notices
        return Resumed(
            layer, resid, self._load, self._notes, self._stream, lambda layer: list(said.get(layer, ()))
        )

    def commit_layer(
        self,
        layer: int,
        arrays: Arrays,
        resid: Array,
        notes: Mapping[str, Any] | None = None,
        notices: Sequence[str] = (),
    ) -> None:
        """Make one layer's results durable, then the stream that leaves it; the second makes it count.

        `arrays` is what `LAYER` names; `resid` [T, D] is of the manifest's type, bfloat16 as uint16 words.
        A `resid_pre` among the arrays is stored for layer 0 of a full run, which must have it; that of a
        later layer is the `resid` of the one before. `notes` is JSON that comes back on resuming, and so
        do `notices`: lines about what happened, which need not repeat and therefore go to cost.json.
        RunError if the disk fails (what was committed before stays, and this call may be repeated),
        InputError if the arrays are not what they must be.
        """
        self._commit(layer, arrays, resid, notes, notices)

    def _commit(
        self,
        layer: int,
        arrays: Arrays,
        resid: Array | None,
        notes: Mapping[str, Any] | None = None,
        notices: Sequence[str] = (),
    ) -> None:
        if self._next is None:
            raise InputError("a resumed run goes on where resume_state says", got="no call of it")
        if self.complete or layer != self._next or layer >= self._layers:
            raise InputError("layers are committed in order", expected=f"layer {self._next}", got=layer)
        entering = arrays.get("resid_pre") if layer == 0 and self._full else None
        results = {name: array for name, array in arrays.items() if name != "resid_pre"}
        problem = layer_problem(results, self._axes)
        for stream in (entering, resid):
            problem = problem or self._residual_problem(stream)
        if problem is None and layer == 0 and self._full and entering is None:
            problem = "array resid_pre is missing, and the run keeps it"
        if problem is not None:
            raise InputError(f"layer {layer}: {problem}")
        with _explained(self.path, f"{layer} of {self._layers} layers are kept"):
            if entering is not None:
                self._write_arrays(resid_file(0), {"resid_pre": entering})
            if notes is not None:
                check_json(notes, "notes")
            if notices:  # before the commit: a layer that is there has said what it had to say
                self._notices[layer] = list(notices)
                self._write_cost({})
            self._write_arrays(
                layer_file(layer), results, {} if notes is None else {NOTES: canonical_json(notes)}
            )
            if resid is not None:
                self._write_arrays(resid_file(layer + 1), {"resid_pre": resid})
            self._next = layer + 1
            if not self._full and layer >= GENERATIONS:  # a light run has no stream of layer 0
                self._unlink(resid_file(layer + 1 - GENERATIONS))

    def finish(self, tail: Tail, meta: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
        """Write what a trace has once and mark the run complete; only now can it be read.

        `meta` is stored with the manifest and `resid_dtype` added; it must be a function of model, input and
        settings: whatever was measured belongs to `cost`. `tail.resid_final` came with the last layer.
        """
        added = {"manifest": self.manifest, "resid_dtype": self._resid_dtype}
        for key, value in added.items():
            if key in meta and meta[key] != value:
                raise InputError(f"the trace's meta and the run's manifest disagree on {key}")
        self._finish(tail, {**meta, **added}, cost)

    def _finish(self, tail: Tail, meta: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
        if self.complete or self._next != self._layers:
            raise InputError(
                "a run is finished once, after its last layer", expected=self._layers, got=self._next
            )
        problem = tail_problem(tail, {"T": self._axes["T"], "L": self._layers})
        if problem is not None:
            raise InputError(f"the tail: {problem}")
        check_json(meta, "meta")
        check_json(cost, "cost")
        with _explained(self.path, f"all {self._layers} layers are kept"):
            self._write_arrays(TAIL_FILE, tail.arrays())
            self._write_cost({"cost": cost})
            run = {
                "schema": SCHEMA,
                "complete": True,
                "dimensions": _dimensions(self._layers, tail, self._axes["D"] if self._full else None),
                "tokens": list(tail.tokens),
                "meta": meta,
                "files": {name: self._files[name] for name in content_files(self._layers, full=self._full)},
            }
            self._write(RUN_JSON, [seal(run)])
            self.complete = True
            self._drop_residuals()

    def close(self) -> None:
        """Let go of the directory; the run can then be resumed or read by anyone."""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _load(self, layer: int) -> dict[str, Array]:
        arrays, _ = read_part(self._directory, layer_file(layer), str(self.path / layer_file(layer)))
        return arrays

    def _notes(self, layer: int) -> dict[str, Any]:
        label = str(self.path / layer_file(layer))
        _, header = read_part(self._directory, layer_file(layer), label)
        return parse_json(header.metadata.get(NOTES, "{}").encode(), label)

    def _stream(self, layer: int) -> Array:
        arrays, _ = read_part(self._directory, resid_file(layer), str(self.path / resid_file(layer)))
        return arrays["resid_pre"]

    def _intact(self, name: str) -> dict[str, Array] | None:
        """The arrays of a file whose checksum holds; None if it is missing, torn or rotten."""
        try:
            arrays, header = read_part(self._directory, name, str(self.path / name))
        except (FileNotFoundError, RunError):
            return None
        if header.metadata.get("part") != name:
            return None
        self._files[name] = {"bytes": header.size, "blake2b": header.blake2b}
        return arrays

    def _intact_layer(self, layer: int) -> bool:
        arrays = self._intact(layer_file(layer))
        return arrays is not None and layer_problem(arrays, self._axes) is None

    def _intact_residual(self, layer: int) -> Array | None:
        arrays = self._intact(resid_file(layer))
        if arrays is None or arrays.keys() != {"resid_pre"} or self._residual_problem(arrays["resid_pre"]):
            return None
        return arrays["resid_pre"]

    def _residual_problem(self, resid: Array | None) -> str | None:
        """As `resid_problem`, for this run's T, D and type."""
        if resid is None:
            return None
        problem = resid_problem(resid, self._resid_dtype, (self._axes["T"],))
        if problem is None and resid.shape[-1] != self._axes.setdefault("D", resid.shape[-1]):
            return f"the residual stream is {resid.shape[-1]} wide, expected {self._axes['D']}"
        return problem

    def _discard(self, layer: int) -> None:
        """Remove what lies beyond the point where the run goes on, and streams too old to be held."""
        names = os.listdir(self._directory)
        # Newest stream first: at every moment the newest one left marks a point whose layers are all there.
        for kind in ("resid", "layer"):
            found = (re.fullmatch(rf"{kind}-(\d{{3,6}})\.safetensors", name) for name in names)
            for index, name in sorted(((int(match[1]), match[0]) for match in found if match), reverse=True):
                beyond = index > layer if kind == "resid" else index >= layer
                outdated = kind == "resid" and not self._full and index <= layer - GENERATIONS
                if beyond or outdated:
                    self._unlink(name)
                    self._files.pop(name, None)
        self._unlink(TAIL_FILE)
        # What a layer said that is computed again, it says again.
        self._notices = {index: lines for index, lines in self._notices.items() if index < layer}
        if self._notices:
            self._write_cost({})
        else:
            self._unlink(COST_JSON)

    def _drop_residuals(self) -> None:
        """A light run that is complete needs no stream to go on from."""
        if self._full:
            return
        names = os.listdir(self._directory)
        for name in sorted(name for name in names if name.startswith("resid-") and OWN_FILES.fullmatch(name)):
            self._unlink(name)

    def _write_cost(self, content: Mapping[str, Any]) -> None:
        lines = {str(layer): lines for layer, lines in sorted(self._notices.items())}
        self._write(COST_JSON, [seal({**content, **({NOTICES: lines} if lines else {})})])

    def _stored_notices(self) -> dict[int, list[str]]:
        """What earlier processes were told, by layer; that it is lost, if the file is damaged."""
        try:
            stored = read_json(self._directory, COST_JSON, str(self.path / COST_JSON))
        except FileNotFoundError:
            return {}
        except RunError:
            stored = {}
        lines = stored.get(NOTICES, {})
        if not is_sealed(stored) or not isinstance(lines, dict):
            return {0: [f"{COST_JSON} was damaged: what was noticed before the run was resumed is lost"]}
        return {int(layer): list(said) for layer, said in lines.items() if layer.isdecimal()}

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._directory)

    def _write(self, name: str, parts: list[bytes]) -> None:
        write_durably(self._directory, name, parts)

    def _write_arrays(self, name: str, arrays: Arrays, metadata: Mapping[str, str] = {}) -> None:
        parts, size, blake2b = encode(arrays, {"part": name, **metadata})
        write_durably(self._directory, name, parts)
        self._files[name] = {"bytes": size, "blake2b": blake2b}


def write_run(path: str | os.PathLike[str], data: TraceData, *, force: bool = False) -> None:
    """Store a whole trace as a run directory: the same files as if its layers had come one by one.

    InputError if the trace is not what `TraceData` promises; RunError if the directory is taken (`force`
    replaces a run) or cannot be written.
    """
    _check_trace(data)
    full = data.resid_pre is not None
    resid_dtype = _resid_dtype(data)
    manifest = data.meta.get("manifest")
    manifest = dict(manifest) if isinstance(manifest, dict) else {}
    manifest |= {
        "layers": len(data.parallel),
        "keep": "full" if full else "light",
        "resid_dtype": resid_dtype,
    }
    expected = sum(array.nbytes for array in pack(data).values())
    expected += 0 if data.resid_pre is None else data.resid_pre.nbytes
    with RunWriter(path, manifest, force=force, expected_bytes=expected) as writer:
        for layer in range(len(data.parallel)):
            writer._commit(
                layer, split(data, layer), None if data.resid_pre is None else data.resid_pre[layer + 1]
            )
        writer._finish(tail_of(data), data.meta, data.cost)


def write_packed(path: str | os.PathLike[str], data: TraceData, *, force: bool = False) -> None:
    """Store a whole trace as one safetensors file. Errors as `write_run`."""
    path = Path(path)
    _check_trace(data)
    if path.is_dir() or (path.exists() and not force):
        raise RunError(f"{path} exists already", remedy="choose another name, or replace it with --force")
    d_model = None if data.resid_pre is None else data.resid_pre.shape[-1]
    run = {
        "schema": SCHEMA,
        "dimensions": _dimensions(len(data.parallel), tail_of(data), d_model),
        "tokens": list(data.tokens),
        "meta": data.meta,
        "cost": data.cost,
    }
    arrays = pack(data)
    if data.resid_pre is not None:
        arrays["resid_pre"] = data.resid_pre
    parts, size, _ = encode(arrays, {"lmtt": canonical_json(run)})
    with _explained(path, "nothing was stored"):
        directory = open_directory(path.parent)
        try:
            check_space(_free(directory), path, size)
            # No lock on somebody else's directory, so the temporary name is this process's own.
            write_durably(directory, path.name, parts, temporary=f".{path.name}.{os.getpid()}.tmp")
        finally:
            os.close(directory)


def check_json(value: Mapping[str, Any], name: str) -> None:
    """InputError unless the value can be stored as JSON and read back."""
    try:
        parse_json(canonical_json(value).encode(), name)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the trace's {name} cannot be stored as JSON: {error}") from None


def _check_trace(data: TraceData) -> None:
    if problem := trace_problem(data):
        raise InputError(f"this trace cannot be stored: {problem}")
    check_json(data.meta, "meta")
    check_json(data.cost, "cost")


def _resid_dtype(data: TraceData) -> str:
    named = data.meta.get("resid_dtype")
    if named is None:
        # What a light trace's stream was is not known and not stored; the writer wants a name.
        named = "float32" if data.resid_pre is None else data.resid_pre.dtype.name
    return str(named)


def _dimensions(layers: int, tail: Tail, d_model: int | None) -> dict[str, int | None]:
    return {"layers": layers, "tokens": len(tail.tokens), "d_model": d_model}


def _requirements(manifest: Mapping[str, Any]) -> tuple[int, bool, str]:
    """(layers, whether the residual stream is kept, its type) of a manifest; InputError if it lacks them."""
    check_json(manifest, "manifest")
    layers, keep, resid_dtype = (manifest.get(key) for key in ("layers", "keep", "resid_dtype"))
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise InputError("the manifest's layers", expected=f"1 to {MAX_LAYERS}", got=repr(layers))
    if keep not in ("full", "light"):
        raise InputError("the manifest's keep", expected="'full' or 'light'", got=repr(keep))
    if resid_dtype not in RESID_TYPES:
        raise InputError(
            "the manifest's resid_dtype", expected=f"one of {', '.join(RESID_TYPES)}", got=repr(resid_dtype)
        )
    return layers, keep == "full", str(resid_dtype)


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two manifests differ, dotted, with both values."""
    result: list[str] = []
    for key in sorted(stored.keys() | asked.keys()):
        before, now = stored.get(key), asked.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            result += _differences(before, now, f"{prefix}{key}.")
        elif canonical_json(before) != canonical_json(now) or (key in stored) != (key in asked):
            result.append(f"{prefix}{key} (was {_brief(before)}, now {_brief(now)})")
    return result


def _brief(value: object) -> str:
    text = canonical_json(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def has_room(free: int, expected_bytes: int) -> bool:
    """Whether so many bytes may be written where so many are free."""
    return expected_bytes <= MOST_OF_FREE_SPACE * free


def check_space(free: int, path: Path, expected_bytes: int) -> None:
    """RunError, naming `path`, if a run of about so many bytes should not be started."""
    if not has_room(free, expected_bytes):
        raise RunError(
            f"the disk of {path} is too full",
            expected=f"room for {_in_units(expected_bytes)} with a tenth to spare",
            got=f"{_in_units(free)} free",
            remedy="free some space, or write the run elsewhere",
        )


def _in_units(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB" if nbytes >= 10 << 20 else f"{nbytes / 2**10:.0f} KiB"


def _free(directory: int) -> int:
    disk = os.fstatvfs(directory)
    return disk.f_bavail * disk.f_frsize


def _sync_directory(path: Path) -> None:
    directory = open_directory(path)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def _explained(path: Path, kept: str) -> Iterator[None]:
    """Turn an error of the disk into one line that says what became of the work."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, remedy = f"the disk of {path} is full", "free some space, then continue with --resume"
        elif error.errno == errno.EFBIG:
            what = f"a file of {path} is larger than the disk or this process may hold"
            remedy = "raise the limit (ulimit -f), then continue with --resume"
        elif isinstance(error, FileExistsError | NotADirectoryError):
            what, remedy = f"{path} is in the way of a run directory", "choose another output"
        else:
            what, remedy = f"{path} cannot be written: {error.strerror}", "choose another output"
        raise RunError(f"{what} ({kept})", remedy=remedy) from error
