"""Layer by layer is the same as all at once, and the model is left as it was found."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmtt.errors import StructureError
from lmtt.structure.attention_hook import watching
from lmtt.structure.capture import capture_layer
from lmtt.structure.discover import discover_layer
from lmtt.structure.replay import LayerCalls, dry_run, final, find_layers, finish
from lmtt.testing_models import CONFIGS, tiny_model, tiny_prompt


@torch.no_grad()
def replay(model: Any, ids: Tensor) -> tuple[Tensor, LayerCalls]:
    calls = dry_run(model, ids)
    hidden = calls.hidden
    for i, layer in enumerate(find_layers(model)[1]):
        output = layer(hidden, *calls.calls[i].args, **calls.calls[i].kwargs)
        assert isinstance(output, (tuple, list)) == calls.returns_tuple
        hidden = output[0] if calls.returns_tuple else output
    return hidden, calls


def state_of(model: nn.Module) -> Any:
    """Everything of the modules that a patch could have touched."""
    return {
        name: MappingProxyType({k: v for k, v in vars(m).items() if callable(v) or "hooks" in k}).copy()
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_major_is_bit_identical(name: str) -> None:
    model, ids = tiny_model(name), tiny_prompt()
    with torch.no_grad():
        own = model(ids, use_cache=False).logits
    before = state_of(model)
    hidden, calls = replay(model, ids)
    assert torch.equal(finish(model, ids, hidden, calls), own)
    assert state_of(model) == before
    assert torch.equal(replay(model, ids)[0], hidden)  # and again


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom"])
def test_a_model_of_one_layer(name: str) -> None:
    model, ids = tiny_model(name, layers=1), tiny_prompt()
    with torch.no_grad():
        own = model(ids, use_cache=False).logits
    hidden, calls = replay(model, ids)
    assert torch.equal(finish(model, ids, hidden, calls), own)


def test_dry_run_touches_no_layer_and_no_head() -> None:
    model = tiny_model("llama")
    for module in (*model.model.layers, model.lm_head):
        module.to("meta")
    calls = dry_run(model, tiny_prompt())
    assert len(calls.calls) == 3
    assert torch.equal(calls.hidden, model.model.embed_tokens(tiny_prompt()))


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_rows_and_final_state_go_through_the_models_own_head(name: str) -> None:
    model, ids = tiny_model(name), tiny_prompt()
    hidden, calls = replay(model, ids)
    logits = finish(model, ids, hidden, calls)
    rows = torch.tensor([10, 0, 4])
    assert torch.allclose(finish(model, ids, hidden, calls, rows=rows), logits[:, rows], atol=1e-5)
    normed = final(model, ids, hidden, calls)
    with torch.no_grad():
        assert torch.equal(normed, model.model.norm(hidden))


def test_a_model_that_changes_the_stream_between_layers_is_refused() -> None:
    model = tiny_model("llama")
    layer, forward = model.model.layers[1], type(model.model.layers[1]).__call__

    class Meddled(type(layer)):  # type: ignore[misc]
        def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(self, hidden * 2, *args, **kwargs)

    layer.__class__ = Meddled
    before = state_of(model)
    with pytest.raises(StructureError, match="chain"):
        dry_run(model, tiny_prompt())
    assert state_of(model) == before


def test_a_wrong_shape_is_refused_and_the_model_is_restored() -> None:
    model, ids = tiny_model("gpt2"), tiny_prompt()
    hidden, calls = replay(model, ids)
    before = state_of(model)
    with pytest.raises(StructureError, match="another shape"):
        finish(model, ids, hidden[:, :4], calls)
    with pytest.raises(StructureError, match="another shape"):
        final(model, ids, hidden[:, :4], calls)
    assert state_of(model) == before


def test_no_stack_is_refused() -> None:
    with pytest.raises(StructureError, match="no decoder stack found in Linear"):
        find_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("first", [2, 1])
def test_a_layer_by_itself_finds_the_keys_and_values_that_earlier_ones_leave(
    first: int, run_captured: Callable[..., Any]
) -> None:
    """Gemma 4's last layer attends with the keys and values of the one before, which did not run here."""
    model, ids = tiny_model("gemma4"), tiny_prompt()
    done = run_captured(model)
    _, layers = find_layers(model)
    call = dry_run(model, ids).calls[first]
    given = (done.captured[first - 1].resid_post[None], call.args, call.kwargs)
    with watching(model):
        structure = discover_layer(layers[first], *given)
        _, again = capture_layer(layers[first], structure, first, *given)
    assert structure == done.structures[first]
    assert torch.equal(again.resid_post, done.captured[first].resid_post)
    ours, theirs = again.stages[0].writes[0].attention, done.captured[first].stages[0].writes[0].attention
    assert torch.equal(ours.k, theirs.k)
    assert torch.equal(ours.v, theirs.v)
