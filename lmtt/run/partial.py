"""What can be said of a run that is not finished: how far it got, in words and without the model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmtt.errors import RunError
from lmtt.run.files import is_sealed, lock, open_directory, read_json
from lmtt.run.layout import MAX_LAYERS, RUN_JSON, layer_file, layer_problem, resid_file
from lmtt.run.reader import check_version, read_part


@dataclass(frozen=True)
class Partial:
    """A run whose last layer, or whose tail, is missing."""

    path: Path
    model: str
    tokens: int
    layers: int
    done: int  # layers whose results and leaving stream are intact, from the first on
    busy: bool  # a process is writing it
    edges: tuple[int, ...]  # stored contributions of attention, by committed layer

    def lines(self) -> list[str]:
        """What `lmtt show` prints of it."""
        state = "is being written" if self.busy else "is not finished"
        result = [
            f"{self.path} {state}: {self.done} of {self.layers} layers are stored",
            f"model {self.model}, {self.tokens} tokens",
        ]
        result += [f"  layer {layer}: {count} edges" for layer, count in enumerate(self.edges)]
        if not self.busy:
            result.append("the command that wrote it goes on with --resume")
        return result


def read_partial(path: str | os.PathLike[str]) -> Partial | None:
    """How far a run directory got; None if it is finished, or no run directory.

    RunError if its run.json is damaged.
    """
    path = Path(path)
    try:
        directory = open_directory(path)
    except OSError:
        return None
    try:
        try:
            run = read_json(directory, RUN_JSON, str(path / RUN_JSON))
        except FileNotFoundError:
            return None
        if run.get("complete") is not False:
            return None
        check_version(run, path / RUN_JSON)
        manifest = run.get("manifest")
        if not is_sealed(run) or not isinstance(manifest, dict):
            raise RunError(f"{path / RUN_JSON} is damaged: its checksum does not match")
        return _partial(directory, path, manifest)
    finally:
        os.close(directory)


def _partial(directory: int, path: Path, manifest: dict[str, Any]) -> Partial:
    layers, ids, model = (manifest.get(key) for key in ("layers", "input_ids", "model"))
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise RunError(f"{path / RUN_JSON} is damaged", expected=f"1 to {MAX_LAYERS} layers", got=layers)
    edges: list[int] = []
    axes: dict[str, int] = {}
    names = os.listdir(directory)
    for layer in range(layers):
        arrays = _intact(directory, path, layer_file(layer))
        if arrays is None or layer_problem(arrays, axes) is not None:
            break
        # A later layer's file tells that this one was committed; the last one's is told by its stream.
        told = layer < layers - 1 and layer_file(layer + 1) in names
        if not told and _intact(directory, path, resid_file(layer + 1)) is None:
            break
        edges.append(len(arrays["edge_weight"]))
    return Partial(
        path=path,
        model=str(model.get("name", "unknown")) if isinstance(model, dict) else "unknown",
        tokens=len(ids) if isinstance(ids, list) else axes.get("T", 0),
        layers=layers,
        done=len(edges),
        busy=_busy(directory, path),
        edges=tuple(edges),
    )


def _intact(directory: int, path: Path, name: str) -> dict[str, Any] | None:
    try:
        arrays, header = read_part(directory, name, str(path / name))
    except (OSError, RunError):
        return None
    return arrays if header.metadata.get("part") == name else None


def _busy(directory: int, path: Path) -> bool:
    """Whether somebody holds the lock; ours, if we get it, goes with the descriptor."""
    try:
        lock(directory, path)
    except RunError:
        return True
    return False
