"""Whether a run will have room on its disk, told before any weight is read: from prompt and config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from lmtt.checkpoint.gguf import read_header
from lmtt.checkpoint.load import (
    Source,
    parse_device,
    parse_dtype,
    quiet_transformers,
    read_config,
    read_tokenizer,
    resolve,
    stored_dtype,
)
from lmtt.run.writer import check_space, has_room

KEPT_OF_A_ROW = 512  # bytes: contributions, predictions, and the edges that a row keeps
BYTES_OF_A_NEURON = 12
ADDED_TOKENS = 64  # what a tokenizer or a chat template may add to a turn


def expected_bytes(
    layers: int, tokens: int, d_model: int, itemsize: int, *, full: bool, neurons: int = 20
) -> int:
    """About what a run takes on disk. `itemsize` is of the residual stream's elements."""
    states = layers + 1 if full else 2
    rows = layers * tokens * (neurons * BYTES_OF_A_NEURON + KEPT_OF_A_ROW)
    return states * tokens * d_model * itemsize + rows


def check_room(
    path: str | os.PathLike[str],
    model: str | None,
    texts: Sequence[str],
    *,
    device: str,
    dtype: str,
    full: bool,
) -> None:
    """RunError if the disk of `path` cannot hold the run of these texts (of one prompt, by turn).

    Only where there might be too little room is the tokenizer read to count them: no text has more tokens
    than bytes. CheckpointError if there is no such model.
    """
    source = resolve(model)
    layers, d_model, itemsize = _dimensions(source, device, dtype)
    place = Path(path)
    used = sum(p.stat().st_size for p in place.iterdir() if p.is_file()) if place.is_dir() else 0
    while not place.exists():
        place = place.parent
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize + used  # a run that is there is going to be replaced
    most = sum(len(text.encode(errors="surrogatepass")) + ADDED_TOKENS for text in texts)
    if has_room(free, expected_bytes(layers, most, d_model, itemsize, full=full)):
        return
    tokens = _count(source, texts)
    check_space(free, Path(path), expected_bytes(layers, tokens, d_model, itemsize, full=full))


def _count(source: Source, texts: Sequence[str]) -> int:
    """Tokens of the texts alone."""
    with quiet_transformers():
        tokenizer = read_tokenizer(source)
    if tokenizer is None:
        return 0  # the model's loading says so
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def _dimensions(source: Source, device: str, dtype: str) -> tuple[int, int, int]:
    """Layers, d_model, and bytes of an element of the residual stream."""
    kind = parse_dtype(dtype, parse_device(device))
    if source.gguf is not None:
        fields = read_header(Path(source.folder) / source.gguf).fields
        name = fields.get("general.architecture")
        numbers = (fields.get(f"{name}.{key}") for key in ("block_count", "embedding_length"))
        layers, d_model = (n if isinstance(n, int) else 0 for n in numbers)  # loading names what is missing
        return layers, d_model, 4 if kind == "auto" else kind.itemsize
    with quiet_transformers():
        config = read_config(source).get_text_config()
    element: torch.dtype = stored_dtype(config) if kind == "auto" else kind
    return config.num_hidden_layers, config.hidden_size, element.itemsize
