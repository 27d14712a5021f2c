"""The streamer's way to a checkpoint: which format it is, and the `WeightSource` that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmtt.checkpoint.gguf_source import open_gguf
from lmtt.checkpoint.load import Source
from lmtt.checkpoint.quant_source import open_quantised
from lmtt.checkpoint.safetensors_source import open_safetensors
from lmtt.checkpoint.source import WeightSource
from lmtt.errors import CheckpointError


def open_source(source: Source, config: Any) -> WeightSource:
    """Open the weights of `source` for a model of `config`. CheckpointError if they cannot be streamed."""
    if source.gguf is not None:
        return open_gguf(Path(source.folder) / source.gguf, config)
    stored = open_safetensors(_folder(source))
    if getattr(config, "quantization_config", None) is None:
        return stored
    try:
        return open_quantised(stored, config)
    except BaseException:
        stored.close()
        raise


def _folder(source: Source) -> Path:
    """Where the files lie; a hub model's are downloaded if they are not there."""
    if source.kind != "hub":
        return Path(source.folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source.folder, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot get {source.folder}: {' '.join(str(error).split())[:200]}") from error
