"""Watching attention: what is seen, and that nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from lmtt.errors import StructureError
from lmtt.structure.attention_hook import AttentionCall, plain_mask, recording, watching
from lmtt.testing_models import tiny_model, tiny_prompt

CPU = torch.device("cpu")


def test_every_layer_hands_over_q_k_v() -> None:
    model = tiny_model("llama")
    calls: list[AttentionCall] = []
    with watching(model), recording(calls.append), torch.no_grad():
        model(tiny_prompt(), use_cache=False)
    assert [call.module for call in calls] == [layer.self_attn for layer in model.model.layers]
    assert calls[0].query is not None
    assert calls[0].query.shape == (1, 4, 11, 8)
    assert calls[0].value.shape == (1, 2, 11, 8)


def test_nothing_stays_behind_even_after_an_error() -> None:
    model, before = tiny_model("llama"), AttentionInterface.get_interface
    name = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), watching(model), watching(model):
        raise ZeroDivisionError
    assert AttentionInterface.get_interface is before
    assert model.config._attn_implementation == name


def test_nothing_is_recorded_outside_recording() -> None:
    model = tiny_model("llama")
    calls: list[AttentionCall] = []
    with watching(model):
        with recording(calls.append):
            pass
        with torch.no_grad():
            model(tiny_prompt(), use_cache=False)
    assert calls == []


def test_training_mode_is_refused() -> None:
    with pytest.raises(StructureError, match=r"model\.eval\(\)"), watching(tiny_model("llama").train()):
        pass


def test_other_implementations_are_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(StructureError, match=r"'flex_attention'.*sdpa"), watching(model):
        pass


def _band(width: int, tokens: int = 6) -> torch.Tensor:
    below = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return (below & ~below.tril(-width))[None, None]


def test_plain_masks_are_reduced() -> None:
    lowest = torch.finfo(torch.float32).min
    additive = torch.zeros(1, 1, 6, 6).masked_fill(~_band(3), lowest)
    assert plain_mask(None, True, 6, CPU) == (None, None)
    assert plain_mask(_band(6), True, 6, CPU) == (None, None)
    assert plain_mask(_band(3), True, 6, CPU) == (None, 3)
    assert plain_mask(additive, True, 6, CPU) == (None, 3)


def test_other_masks_are_kept() -> None:
    holes = _band(6).clone()
    holes[..., 4, 1] = False
    mask, window = plain_mask(holes, True, 6, CPU)
    assert window is None
    assert mask is not None
    assert torch.equal(mask, holes[0])
    sloped = torch.where(_band(6), torch.randn(1, 1, 6, 6), -torch.inf)
    mask, _ = plain_mask(sloped, True, 6, CPU)
    assert mask is not None
    assert mask.is_floating_point()


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 6, 6, dtype=torch.bool), torch.zeros(1, 1, 6, 6)])
def test_attention_to_later_tokens_is_refused(mask: torch.Tensor | None) -> None:
    with pytest.raises(StructureError, match=r"not causal.*is_decoder=True"):
        plain_mask(mask, False, 6, CPU)
