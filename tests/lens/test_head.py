"""The head found by watching gives the model's own logits, and a head of another form is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmtt.errors import StructureError
from lmtt.lens.head import Head, find_head
from lmtt.structure.replay import dry_run, finish
from lmtt.testing_models import tiny_model, tiny_prompt
from lmtt.testing_types import tiny_of_type


def head_of(model: Any) -> Head:
    def replay(ids: Tensor, states: Tensor) -> Tensor:
        return finish(model, ids, states, dry_run(model, ids))

    return find_head(model, replay)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "cohere", "granite", "phi", "opt", "gptj"])
def test_logits_are_the_models_own(name: str) -> None:
    model, ids = tiny_model(name), tiny_prompt()
    head = head_of(model)
    states = torch.randn(
        1, ids.shape[1], model.config.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    own = finish(model, ids, states, dry_run(model, ids))[0]
    got = head.logits(states[0].flip(0)).flip(0)
    assert torch.isfinite(got).all()
    assert (got - own).abs().max() <= 1e-5 * own.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite"])
def test_frozen_scores_are_linear_and_exact_at_their_own_state(name: str) -> None:
    model = tiny_model(name, dtype=torch.float64)
    head = head_of(model)
    state = torch.randn(
        model.config.hidden_size, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    scores = head.frozen(state).scores(torch.stack([state, 0.25 * state, 0.75 * state]))
    assert (scores[1] + scores[2] - scores[0]).abs().max() <= 1e-12 * scores[0].abs().max()
    # What the state itself adds is its logits but for the norm's shift and the head's bias.
    constant = head.logits(state[None])[0] - scores[0]
    other = head.logits(2 * state[None])[0] - head.frozen(2 * state).scores(2 * state[None])[0]
    assert (constant - other).abs().max() <= 1e-6 * scores[0].abs().max()


def test_a_head_that_looks_at_positions_is_refused() -> None:
    model = tiny_model("llama")
    slope = torch.arange(1.0, 12.0)[None, :, None]
    hook = model.model.norm.register_forward_hook(lambda _m, _a, out: out * slope[:, : out.shape[1]])
    with pytest.raises(StructureError):
        head_of(model)
    hook.remove()


def test_no_output_embedding_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(StructureError, match="no output embedding"):
        find_head(model.model, lambda ids, states: states)


def test_a_head_that_is_not_linear_gives_logits_but_attributes_none() -> None:
    """Megatron's BERT computes gelu(W x) of the final state: parts of x are no parts of its logits."""
    head = head_of(tiny_of_type("megatron-bert"))
    state = torch.randn(32, generator=torch.Generator().manual_seed(2))
    assert torch.isfinite(head.logits(state[None])).all()
    with pytest.raises(StructureError, match="cannot be attributed"):
        head.frozen(state)
