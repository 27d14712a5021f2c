"""A comparison is worth something only if both sides compute the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lmtt import ops
from lmtt.engine import Engine, load
from lmtt.testing_models import tiny_model

TOKENS = 21
TOLERANCE = 2e-5  # peers subtract two norms, which cancels; any mistake is a hundred times larger


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(tiny_model("llama", attention_bias=False, mlp_bias=False))


@pytest.fixture
def case(engine: Engine) -> Any:
    import cases

    (result,) = cases.capture(engine, cases.token_ids(engine, TOKENS), (1,))
    return result


def expected(task: Any) -> Any:
    a = task.attention
    return ops.attention_contributions(
        a.q[None],
        a.k[None],
        a.v[None],
        a.w_o,
        task.resid_pre[None],
        task.whole[None],
        scale=a.scale,
        floor=0.0,
    )


def assert_equal(got: Any, want: Any) -> None:
    for name in ("edges", "per_head", "residual"):
        ours, theirs = getattr(want, name)[0], getattr(got, name)
        assert ours.shape == theirs.shape
        error = float((ours - theirs).abs().max())
        assert error <= TOLERANCE, (name, error)  # NaN fails too
    assert float(want.edges.sum()) > 1, "the case says nothing"


@pytest.mark.parametrize("name", ["plain_torch", "materialised"])
def test_equals_ours_at_floor_0(case: Any, name: str) -> None:
    import peers

    assert_equal(getattr(peers, name)(case.attention), expected(case.attention))


def test_plain_torch_does_not_depend_on_its_tiles(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import peers

    monkeypatch.setattr(peers, "TILE", (3, 5))
    assert_equal(peers.plain_torch(case.attention), expected(case.attention))


@pytest.mark.slow
def test_compiled_equals_ours_at_floor_0(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import peers

    monkeypatch.setattr(peers, "COMPILED_TILE", 8)
    assert_equal(peers.compiled_torch(case.attention), expected(case.attention))


@pytest.mark.parametrize("chunks", [(128, 32), (4, 3)])
def test_flashtrace_equals_ours_at_floor_0(case: Any, chunks: tuple[int, int]) -> None:
    import peers

    why = peers.flashtrace_missing()
    if why is not None:
        pytest.skip(why)
    assert_equal(peers.flashtrace(case, chunks)(), expected(case.attention))


def test_peers_refuse_what_they_do_not_know(case: Any) -> None:
    import peers

    attention = replace(case.attention.attention, window=3)
    with pytest.raises(ValueError, match="plain causal"):
        peers.plain_torch(replace(case.attention, attention=attention))


def test_patched_forward_changes_what_comes_after_and_leaves_the_model_alone(engine: Engine) -> None:
    import cases
    import peers

    ids = cases.token_ids(engine, TOKENS)
    layer = engine.model.model.layers[0]
    with torch.no_grad():
        plain = peers.plain_forward(engine.model, ids, all_logits=True)
        last = peers.plain_forward(engine.model, ids, all_logits=False)
        patched = peers.patched_forward(engine.model, layer, ids, 1, engine.info.d_head, 4)
        again = peers.plain_forward(engine.model, ids, all_logits=False)
    assert plain.shape[1] == TOKENS
    torch.testing.assert_close(last[0, 0], plain[0, -1])
    assert float((patched - last[0, 0]).abs().max()) > 1e-3
    assert torch.equal(last, again)
