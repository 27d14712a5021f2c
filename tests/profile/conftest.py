"""A machine of known ceilings, so that no test measures one; tiny checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lmtt.profile import ceilings
from lmtt.profile.ceilings import Ceilings
from lmtt.streaming.weights import StreamedWeights
from lmtt.testing_models import CONFIGS

KNOWN = Ceilings(
    name="a machine",
    source="measured",
    device="cpu",
    flops={"float32": 1e11, "bfloat16": 1e10, "float16": 1e10, "float64": 5e10},
    lanes=5e10,
    memory=2e10,
    disk=1e9,
    store=5e8,
    bus=None,
    launch=1e-6,
    capacity=2**34,
)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ceilings:
    """Ceilings that are measured in no time, remembered in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ceilings, "measure", lambda *_args, **_options: KNOWN)
    return KNOWN


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a random model of a configuration's name in a dtype, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            kind, options = CONFIGS[name]
            torch.manual_seed(0)
            config: Any = getattr(transformers, kind)(**options)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
            made[name, dtype] = tmp_path_factory.mktemp(name)
            model.to(dtype).save_pretrained(made[name, dtype])
        return made[name, dtype]

    return make


@pytest.fixture
def always_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 100 KB fits any limit that a process can live in; here none of them stays in memory."""
    monkeypatch.setattr(StreamedWeights, "would_stay", lambda _self, _tokens: False)
