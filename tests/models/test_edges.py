"""Shapes and prompts at the edges, on models that matter: nothing here may be silently wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import lmtt
from lmtt.errors import ClosureError
from lmtt.testing_sweep import computing_in_float64, hold_to_oracle
from lmtt.testing_types import prompt, tiny_of_type

TYPES = ("llama", "gemma2", "deepseek_v3", "qwen3_moe", "cohere2", "gpt_oss")
# Three heads share one key/value head; latent attention has one for each.
ODD: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24}
ODD_HEADS = {t: {**ODD, "head_dim": 8} for t in TYPES if t != "deepseek_v3"}
ODD_HEADS["deepseek_v3"] = {**ODD, "num_key_value_heads": 3}
PADDING = 0


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wide(model_type: str, **options: Any) -> Any:
    with computing_in_float64():
        return tiny_of_type(model_type, dtype=torch.float64, **options).double()


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("model_type", TYPES)
def test_prompts_of_one_and_two_tokens_are_the_oracles(model_type: str, tokens: int) -> None:
    assert hold_to_oracle(model_type, wide(model_type), prompt(tokens)) == ""


@pytest.mark.parametrize("model_type", TYPES)
def test_odd_numbers_of_heads_are_the_oracles(model_type: str) -> None:
    assert hold_to_oracle(model_type, wide(model_type, **ODD_HEADS[model_type]), prompt(5)) == ""


@pytest.mark.parametrize("model_type", TYPES)
def test_padding_on_either_side_and_neighbours_of_other_lengths_change_no_bit(model_type: str) -> None:
    engine = lmtt.load(tiny_of_type(model_type))
    rows = [prompt(tokens, seed=tokens)[0] for tokens in (6, 3, 1)]
    alone = [engine.trace(input_ids=row.numpy()) for row in rows]
    for left in (False, True):
        ids, mask = np.full((3, 6), PADDING), np.zeros((3, 6), dtype=int)
        for n, row in enumerate(rows):
            at = slice(6 - len(row), 6) if left else slice(0, len(row))
            ids[n, at], mask[n, at] = row.numpy(), 1
        for got, want in zip(engine.trace(input_ids=ids, attention_mask=mask), alone, strict=True):
            assert np.isfinite(got.data.resid_pre).all()
            np.testing.assert_array_equal(got.data.resid_pre, want.data.resid_pre)
            for layer in range(want.n_layers):
                np.testing.assert_array_equal(got.attention(layer), want.attention(layer))
                np.testing.assert_array_equal(got.mlp[layer], want.mlp[layer])


@pytest.mark.parametrize("model_type", TYPES)
def test_16_bits_are_near_32(model_type: str) -> None:
    """The same weights, rounded: shares move with the rounding of the states, and are no others.

    The first layer is compared: later ones are given other states, and other experts may be chosen.
    """
    width = {"intermediate_size": 24}  # torch's grouped product takes rows of 16 bytes only
    narrow = tiny_of_type(model_type, **width).to(torch.bfloat16)
    same = tiny_of_type(model_type, **width)
    same.load_state_dict({name: tensor.float() for name, tensor in narrow.state_dict().items()})
    ids = prompt()[0].numpy()
    got, want = (lmtt.load(m).trace(input_ids=ids, floor=0) for m in (narrow, same))
    for name in ("residual", "bias"):
        ours, theirs = getattr(got, name)[0], getattr(want, name)[0]
        assert np.abs(ours - theirs).max() <= 0.02, name
    assert np.abs(got.attention(0) - want.attention(0)).max() <= 0.02


def test_a_model_that_sums_in_float32_says_so_in_float64() -> None:
    """Mamba adds onto a float32 stream whatever its dtype: in float64 that is an error of float32's size."""
    engine = lmtt.load(tiny_of_type("mamba", dtype=torch.float64))
    with pytest.raises(ClosureError, match="float32 even as float64"):
        engine.trace(input_ids=prompt()[0].numpy())
