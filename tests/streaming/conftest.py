"""Tiny checkpoints in several shards, and a limit that streams what would otherwise stay in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lmtt.streaming.weights import StreamedWeights
from lmtt.testing_models import CONFIGS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model of a configuration's name, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            kind, options = CONFIGS[name]
            torch.manual_seed(0)
            config: Any = getattr(transformers, kind)(**options)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name], max_shard_size="20KB")
        return made[name]

    return make


@pytest.fixture
def always_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 100 KB fits any limit that a process can live in; here none of them stays in memory."""
    monkeypatch.setattr(StreamedWeights, "would_stay", lambda _self, _tokens: False)
