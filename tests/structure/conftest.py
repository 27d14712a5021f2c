"""What every test of this folder does with a model: run it layer by layer with capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtt.structure.attention_hook import watching
from lmtt.structure.capture import capture_layer
from lmtt.structure.discover import discover_layer
from lmtt.structure.opaque import admit
from lmtt.structure.replay import dry_run, find_layers, finish
from lmtt.structure.spec import CapturedLayer, LayerStructure
from lmtt.testing_models import tiny_prompt


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Pass:
    """One model's run, layer by layer."""

    structures: list[LayerStructure]
    captured: list[CapturedLayer]
    logits: Tensor  # by finish() after the captured layers
    own_logits: Tensor  # by model(input_ids)


@pytest.fixture
def run_captured() -> Callable[..., Pass]:
    def run(model: Any, input_ids: Tensor | None = None, opaque: bool = False) -> Pass:
        ids = tiny_prompt() if input_ids is None else input_ids
        with torch.no_grad():
            own = model(ids, use_cache=False).logits
        calls = dry_run(model, ids)
        _, layers = find_layers(model)
        hidden = calls.hidden
        structures, captured = [], []
        with watching(model):
            for i, (layer, call) in enumerate(zip(layers, calls.calls, strict=True)):
                given = (hidden, call.args, call.kwargs)
                structure = discover_layer(layer, *given, index=i, opaque=opaque)
                structures.append(admit(layer, structure, i, *given) if opaque else structure)
                hidden, seen = capture_layer(layer, structures[-1], i, hidden, call.args, call.kwargs)
                captured.append(seen)
        return Pass(structures, captured, finish(model, ids, hidden, calls), own)

    return run
