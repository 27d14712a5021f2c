"""The models that other tests rely on must have features that bite."""

from __future__ import annotations

import pytest
import torch

from lmtt.testing_models import CONFIGS, TOKENS, WINDOW, tiny_model


@pytest.mark.parametrize("name", CONFIGS)
def test_no_parameter_is_constant(name: str) -> None:
    for parameter_name, parameter in tiny_model(name).named_parameters():
        assert torch.isfinite(parameter).all(), parameter_name
        assert parameter.flatten().unique().numel() > parameter.numel() // 2, parameter_name


def test_same_seed_same_model() -> None:
    one, other = tiny_model("gpt2").state_dict(), tiny_model("gpt2").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(
        one["transformer.wte.weight"], tiny_model("gpt2", seed=1).state_dict()["transformer.wte.weight"]
    )


def test_prompt_is_longer_than_the_window_and_odd() -> None:
    assert TOKENS > WINDOW
    assert TOKENS % 2 == 1
