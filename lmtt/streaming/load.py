"""Load a model within a memory limit: all of it where it fits, else what lies outside its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from lmtt.checkpoint.gguf_lend import fast_reader
from lmtt.checkpoint.load import (
    Loaded,
    Source,
    facts_of,
    quiet_transformers,
    read_config,
    read_tokenizer,
    stored_dtype,
)
from lmtt.checkpoint.load import load as load_all
from lmtt.checkpoint.open import open_source
from lmtt.streaming.assign import build
from lmtt.streaming.meter import Meter
from lmtt.streaming.plan import HEADER, NOMINAL_TOKENS, READING, TOKENIZER, TokenizerBytes
from lmtt.streaming.weights import LayerWeights, ResidentWeights, StreamedWeights
from lmtt.structure.replay import find_layers

LARGEST_GROWTH = 8  # from 4 bits to float32
LEFT_FREE = 0.1  # of the memory that is available, when nobody named a limit


def read_within(
    meter: Meter,
    source: Source,
    *,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    allow_nonfinite: bool = False,
    may_stay: bool = True,
) -> tuple[Loaded, LayerWeights]:
    """A model with the weights it needs now, and where the others are.

    meter : has the limit; without one only what the machine's memory does not hold is streamed.
    may_stay : False streams the layers even where the limit holds them with a prompt of usual length.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be read, or not streamed where it has to be.
    InputError
        The limit is below the smallest that works, which the error names.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype, "allow_nonfinite": allow_nonfinite}
    limit, named = meter.limit, meter.limit is not None
    if limit is None:
        free = available(device)
        if free is None or _stored_bytes(source) * LARGEST_GROWTH <= free:
            return load_all(source, **options), ResidentWeights(meter)
        limit = int((1 - LEFT_FREE) * free)
    with quiet_transformers(), fast_reader():
        config = read_config(source)
    kind = stored_dtype(config) if dtype == "auto" else dtype
    with quiet_transformers():
        model = build(config, kind)
        weights_at = open_source(source, config)
    try:
        streamed = StreamedWeights(
            weights_at, model, find_layers(model)[0], kind, device, limit, meter,
            tokenizer_bytes(source, int(config.get_text_config().vocab_size)),
        )  # fmt: skip
        if may_stay and streamed.would_stay(_nominal(config)):
            weights_at.close()
            known = (streamed.shapes, streamed.weights) if named else ()
            return load_all(source, **options), ResidentWeights(meter, *known)
        streamed.plan([1])  # below the smallest workable limit nothing is read
        streamed.open(check=not allow_nonfinite)
    except BaseException:
        weights_at.close()
        raise
    with quiet_transformers(), fast_reader():
        tokenizer = read_tokenizer(source)
    return Loaded(model, tokenizer, source.name, facts_of(source, config)), streamed


def tokenizer_bytes(source: Source, vocabulary: int) -> TokenizerBytes:
    """What the tokenizer that comes with a model takes; of a hub id one is assumed."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if source.kind == "directory" and not any((Path(source.folder) / name).is_file() for name in names):
        return TokenizerBytes()
    kind = "json" if source.gguf is None else "gguf"
    return TokenizerBytes(TOKENIZER * vocabulary, READING[kind] * vocabulary, HEADER[kind] * vocabulary)


def _nominal(config: Any) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(NOMINAL_TOKENS, positions or NOMINAL_TOKENS)


def _stored_bytes(source: Source) -> int:
    """Of a checkpoint's files, 0 where they are not known to be here."""
    if source.kind == "hub":
        return 0
    folder = Path(source.folder)
    files = [folder / source.gguf] if source.gguf is not None else folder.glob("*.safetensors")
    return sum(path.stat().st_size for path in files)


def available(device: torch.device) -> int | None:
    """Bytes that could be taken now, None where nobody can say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free.append(int(limit) - used)
    except (OSError, ValueError):
        pass  # another system, or no cgroup
    return min(free, default=None)
