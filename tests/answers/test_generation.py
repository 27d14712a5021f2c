"""Generated text: chosen by the model's generate, attributed as in one full pass, led back to the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import lmtt
from lmtt.errors import InputError
from lmtt.testing_models import tiny_model

if TYPE_CHECKING:
    from lmtt.engine import Engine

TINY = ("llama", "gpt_neox")  # sequential and parallel blocks


def silent(name: str) -> Any:
    model = tiny_model(name)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", TINY)
def test_attributions_are_those_of_one_full_pass(name: str) -> None:
    """And of a pass over only what was there when the token was chosen: later tokens change nothing."""
    engine = lmtt.load(silent(name))
    found = engine.generate(input_ids=[5, 6, 7, 8], max_new_tokens=6)
    assert len(found.ids) == 6
    assert found.shares.shape == (6, 10)
    whole = engine.trace(input_ids=[5, 6, 7, 8, *found.ids])
    for n in range(6):
        want = whole.rollout(3 + n)
        assert np.abs(found.shares[n] - want.shares).max() <= 1e-5
        assert abs(found.bias[n] - want.bias) <= 1e-5
        then = engine.trace(input_ids=[5, 6, 7, 8, *found.ids[:n]]).rollout()
        assert np.abs(found.shares[n, : 4 + n] - then.shares).max() <= 1e-4
        assert not found.shares[n, 4 + n :].any()
    total = found.shares.sum(-1) + found.bias + found.unattributed
    assert np.abs(total - 1).max() <= 1e-12


@pytest.mark.parametrize("name", TINY)
def test_greedy_is_the_most_probable_token(name: str) -> None:
    """Each token is the first prediction at the position that its shares belong to."""
    found = lmtt.load(silent(name)).generate(input_ids=[5, 6, 7, 8], max_new_tokens=6)
    assert [found.trace.next_tokens(3 + n, 1)[0].id for n in range(6)] == found.ids.tolist()


def test_shares_through_the_output() -> None:
    """The recursion is the sum over all ways back through earlier output."""
    found = lmtt.load(silent("llama")).generate(input_ids=[5, 6, 7], max_new_tokens=7)
    direct, inherited = found.shares[:, :3], found.shares[:, 3:]
    ways, reach = direct.copy(), direct.copy()
    for _ in range(7):
        reach = inherited @ reach
        ways += reach
    through = found.through
    assert np.abs(through.tokens - ways).max() <= 1e-12
    assert (through.tokens >= direct - 1e-15).all()
    assert through.tokens[1:].sum() > direct[1:].sum(), "no share goes through the output: nothing is tested"
    total = through.tokens.sum(-1) + through.bias + through.unattributed
    assert np.abs(total - 1).max() <= 1e-12


def test_sampling_repeats_itself_and_leaves_the_generator_alone() -> None:
    engine = lmtt.load(silent("llama"))
    ask = {
        "input_ids": [5, 6, 7],
        "max_new_tokens": 12,
        "do_sample": True,
        "temperature": 2.0,
        "trace": False,
    }
    torch.manual_seed(4)
    before = torch.get_rng_state()
    first = engine.generate(**ask, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert engine.generate(**ask, seed=1).ids.tolist() == first.ids.tolist()
    others = {tuple(engine.generate(**ask, seed=seed).ids.tolist()) for seed in range(2, 5)}
    assert others - {tuple(first.ids.tolist())}, "the seed changes nothing"
    assert engine.generate(**{**ask, "top_k": 1}).ids.tolist() == (
        engine.generate(input_ids=[5, 6, 7], max_new_tokens=12, trace=False).ids.tolist()
    )


def test_the_end_of_a_text_ends_it() -> None:
    model = silent("llama")
    engine = lmtt.load(model)
    free = engine.generate(input_ids=[5, 6, 7], max_new_tokens=8, trace=False).ids.tolist()
    stop = free[2]
    model.generation_config.eos_token_id = stop
    ended = engine.generate(input_ids=[5, 6, 7], max_new_tokens=8).ids.tolist()
    assert ended == free[: free.index(stop) + 1]


def test_chat_and_summary(tiny_engine: Engine) -> None:
    found = tiny_engine.generate(chat=[{"role": "user", "content": "\x1b[2JHi. You?"}], max_new_tokens=5)
    assert found.trace.tokens_by("turn")[-1].last == found.prompt + 5
    for by in ("token", "word", "sentence", "turn"):
        spans = found.prompt_spans(by)
        assert spans[0].first == 0
        assert spans[-1].last == found.prompt
        lines = found.summary(by)
        assert all(line.isprintable() for line in lines)
        assert any("%" in line for line in lines)
    assert [s.role for s in found.prompt_spans("turn")] == ["system", "user", "assistant"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": 1.5}, "max_new_tokens"),
    ({"max_new_tokens": 62}, "too long"),
    ({"temperature": 0.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_k": 0}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"input_ids": []}, "empty"),
    ({"prompt": "text"}, "more than one"),
    ({"keep": "all"}, "keep"),
    ({"floor": 1.0}, "floor"),
]


@pytest.mark.parametrize(("options", "word"), BAD)
def test_bad_input(options: dict[str, Any], word: str) -> None:
    engine = lmtt.load(silent("llama"))
    with pytest.raises(InputError, match=word) as caught:
        engine.generate(**{"input_ids": [5, 6, 7], **options})
    assert len(str(caught.value).splitlines()) == 1


def test_without_trace() -> None:
    found = lmtt.load(silent("llama")).generate(input_ids=[5, 6], max_new_tokens=2, trace=False)
    with pytest.raises(InputError, match="trace=True"):
        _ = found.shares


@pytest.mark.model
def test_real_model(demo_engine: Engine) -> None:
    found = demo_engine.generate("The capital of France is", max_new_tokens=4)
    assert "Paris" in found.text
    assert found.tokens[0] == " Paris"
    assert found.through.tokens.shape == (4, 5)
