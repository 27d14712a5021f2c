"""Checkpoints of tied models that store the shared matrix under either of its names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lmtt
from lmtt.errors import CheckpointError
from lmtt.run.layout import pack
from lmtt.streaming.weights import StreamedWeights
from lmtt.testing_models import CONFIGS

IDS = np.arange(9) * 7 % 97
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def tied(tmp_path: Path) -> Callable[[str], Path]:
    """The folder of a tied llama whose shared matrix is stored by one name."""

    def make(stored: str) -> Path:
        folder = tmp_path / stored
        config = transformers.LlamaConfig(**CONFIGS["llama"][1], tie_word_embeddings=True)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        assert HEAD not in weights
        if stored != EMBEDDING:
            weights[stored] = weights.pop(EMBEDDING)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.usefixtures("always_streamed")
def test_either_name_will_do(tied: Callable[[str], Path]) -> None:
    want = lmtt.load(str(tied(EMBEDDING))).trace(input_ids=IDS)
    folder = tied(HEAD)
    for options in ({}, {"memory": "101MiB"}):
        engine = lmtt.load(str(folder), **options)
        assert isinstance(engine._weights, StreamedWeights) == ("memory" in options)
        got = engine.trace(input_ids=IDS)
        for name, values in pack(want.data).items():
            np.testing.assert_array_equal(pack(got.data)[name], values, err_msg=f"{options} {name}")
        assert np.isfinite(got.data.resid_pre).all()
        np.testing.assert_array_equal(got.data.resid_pre, want.data.resid_pre)


@pytest.mark.usefixtures("always_streamed")
def test_neither_is_refused(tied: Callable[[str], Path]) -> None:
    folder = tied("model.another.weight")
    for options in ({}, {"memory": "101MiB"}):
        with pytest.raises(CheckpointError, match=r"lacks [12] weights, (model\.embed|lm_head)"):
            lmtt.load(str(folder), **options)


def test_device_maps_need_the_first(tied: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers looks on disk for the embedding's name only."""
    placed = {"model": "disk", "lm_head": "disk"}
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight") as error:
        lmtt.load(str(tied(HEAD)), device_map=placed, offload_folder=tmp_path).trace(input_ids=IDS)
    assert "\n" not in str(error.value)
    engine = lmtt.load(str(tied(EMBEDDING)), device_map=placed, offload_folder=tmp_path)
    assert np.isfinite(engine.trace(input_ids=IDS).data.resid_pre).all()
