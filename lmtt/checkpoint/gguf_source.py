"""Opens a GGUF file as a `WeightSource`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmtt.checkpoint.gguf import read_header
from lmtt.checkpoint.gguf_lend import fast_reader
from lmtt.checkpoint.gguf_weights import GgufWeights
from lmtt.errors import CheckpointError


def open_gguf(path: Path, config: Any) -> GgufWeights:
    """The weights of a GGUF file for the model of a transformers config. Only the header is read.

    Raises
    ------
    CheckpointError
        The file contradicts itself, or is of an architecture whose weights come in another way.
    """
    import transformers
    from transformers import modeling_gguf_pytorch_utils as legacy

    header = read_header(path)
    with fast_reader():
        facts = legacy.load_gguf_checkpoint(path)["config"]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with fast_reader():  # or transformers makes its table of names once for every module of the model
        weights = GgufWeights(header, model, facts)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(dict(model.named_parameters(remove_duplicate=False))) - set(weights.weights) - tied)
    if missing:
        weights.close()
        raise CheckpointError(
            f"{path.name} lacks {len(missing)} weights, {missing[0]} for one",
            expected="every parameter of the model in the file",
            remedy="load it without a memory limit if transformers reads this architecture",
        )
    return weights
