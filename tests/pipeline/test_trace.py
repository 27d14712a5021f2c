"""What a user of `engine.trace` relies on: shares add up, details agree, the model is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import lmtt
from lmtt.errors import CheckpointError, InputError, ModelNeededError
from lmtt.testing_models import tiny_model

if TYPE_CHECKING:
    from lmtt.engine import Engine
    from lmtt.trace import Trace

TEXT = "When Mary and John went to the store, John gave a drink to"
TINY = ("llama", "gpt2", "qwen2", "gpt_neox")


def ids_of(model: torch.nn.Module, T: int = 9) -> list[int]:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (T,), generator=torch.Generator().manual_seed(3)).tolist()


def row_sums(trace: Trace) -> np.ndarray:
    edges = np.stack([trace.attention(layer) for layer in range(trace.n_layers)]).sum(-1, dtype=np.float64)
    parallel = trace.data.parallel[:, None]
    return edges + trace.rest + trace.residual + trace.bias + trace.opaque + np.where(parallel, trace.mlp, 0)


@pytest.mark.parametrize("name", TINY)
def test_rows_sum_to_one(name: str) -> None:
    model = tiny_model(name)
    trace = lmtt.load(model).trace(input_ids=ids_of(model), floor=1e-2)
    sums = row_sums(trace)
    assert np.isfinite(sums).all()
    assert np.abs(sums - 1).max() <= 1e-5
    assert trace.rest.max() > 0, "the floor drops nothing: this test would pass without it"


@pytest.mark.parametrize("name", TINY)
def test_complete_in_float64(name: str) -> None:
    """Parts formed from A, v, W_O, act and W_down add up to what the model recorded."""
    model = tiny_model(name, dtype=torch.float64)
    engine = lmtt.load(model)
    for layer in engine.structures():
        for closure in layer.closures:
            assert closure.error <= 1e-9, closure


@pytest.mark.model
def test_real_model_is_complete_in_float64(demo_engine: Engine) -> None:
    """To 1e-9, but for the softmax, which the model itself computes in its own dtype."""
    engine = lmtt.load(dtype="float64", device="cpu")
    errors = [c.error for layer in engine.structures() for c in layer.closures]
    assert len(errors) == 4 * 30
    assert max(errors) <= 1e-9


@pytest.mark.model
def test_logits_are_the_models_own(demo_engine: Engine) -> None:
    ids = demo_engine.tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        own = demo_engine.model(ids).logits[0]
    trace = demo_engine.trace(TEXT)
    got = trace.data.predictions
    for position in (0, 5, len(trace.tokens) - 1):
        want = own[position, torch.as_tensor(got.token_id[position]).long()].numpy()
        assert np.abs(want - got.logit[position]).max() <= 1e-4
        assert abs(float(own[position].logsumexp(0)) - got.logsumexp[position]) <= 1e-4
    lens = trace.lens(29, -1, k=49152)
    full = np.zeros(49152)
    full[[t.id for t in lens]] = [t.logit for t in lens]
    assert np.abs(full - own[-1].numpy()).max() <= 1e-4
    with torch.no_grad():
        assert torch.equal(demo_engine.model(ids).logits[0], own), "tracing changed the model"


@pytest.mark.model
def test_default_is_within_its_certificate_of_the_exact(demo_engine: Engine) -> None:
    default, exact = demo_engine.trace(TEXT), demo_engine.trace(TEXT, floor=0, screen=0)
    assert exact.certificate.max() == 0
    assert default.certificate.max() <= 0.05
    slack = default.certificate + 1e-5
    for layer in range(30):
        kept = default.attention(layer)
        error = np.abs(kept - exact.attention(layer))[kept > 0]
        allowed = np.broadcast_to(slack[layer][:, None], kept.shape)[kept > 0]
        assert (error <= allowed).all()
        assert (np.abs(default.residual[layer] - exact.residual[layer]) <= slack[layer]).all()
    assert (default.certificate > 0).any(), "nothing was screened: this test would pass without screening"


@pytest.mark.model
def test_details_agree_with_what_is_kept(demo_engine: Engine) -> None:
    trace = demo_engine.trace(TEXT)
    layer, last = 12, len(trace.tokens) - 1
    rows = trace.exact(layer, [last])
    assert abs(float(rows.pairs.sum() + rows.residual[0] + rows.bias[0] + rows.others[0]) - 1) <= 1e-6
    heads = trace.heads(layer, source=0, destination=last)
    assert abs(float(heads.sum()) - float(rows.pairs[0, :, 0].sum())) <= 1e-6
    assert np.abs(trace.contribution_map(layer, 3)[last] - rows.pairs[0, 3]).max() <= 1e-6
    pattern = trace.attention_map(layer, 3)
    assert np.abs(pattern.sum(-1) - 1).max() <= 1e-5
    assert np.abs(np.triu(pattern, 1)).max() == 0
    kept = trace.attention(layer)[last]
    assert np.abs(kept - rows.pairs[0].sum(0))[kept > 0].max() <= trace.certificate[layer, last] + 1e-6


def test_promoted_tokens_are_logit_contributions() -> None:
    """With the norm frozen scores are linear: heads add up to their block, sources to their head."""
    model = tiny_model("llama")  # a small vocabulary, so that every token's score can be listed
    engine = lmtt.load(model)
    trace = engine.trace(input_ids=ids_of(model))
    T, H, V = len(trace.tokens), engine.info.n_heads, engine.info.d_vocab

    def scores(part: object) -> np.ndarray:
        up, down = trace.promoted(1, -1, part, k=V)  # type: ignore[arg-type]
        assert [t.id for t in up] == [t.id for t in reversed(down)] or len({t.score for t in up}) < V
        return np.array([t.score for t in sorted(up, key=lambda t: t.id)])

    bias = model.model.layers[1].self_attn.o_proj.bias
    heads = [scores(("head", h)) for h in range(H)]
    whole = scores("attention")
    head = engine._find_head().frozen(engine._state(trace.data, engine.info.n_layers)[-1])
    constant = head.scores(bias[None])[0].numpy()
    assert np.abs(whole - constant - sum(heads)).max() <= 1e-5 * np.abs(whole).max()
    assert np.abs(constant).max() > 1e-2 * np.abs(whole).max(), "the bias is too small to be missed"
    sources = sum(scores(("head", 2, j)) for j in range(T))
    assert np.abs(sources - heads[2]).max() <= 1e-5 * np.abs(heads[2]).max()
    best = trace.neurons(1, -1, k=1)[0].neuron
    up, down = trace.promoted(1, -1, ("neuron", best), k=3)
    assert up[0].score >= up[1].score >= up[2].score > down[2].score >= down[1].score >= down[0].score


@pytest.mark.model
def test_a_list_gives_each_prompt_its_own_bits(demo_engine: Engine) -> None:
    prompts = ["The capital of France is", "Two plus two is"]
    together = demo_engine.trace(prompts)
    for prompt, trace in zip(prompts, together, strict=True):
        alone = demo_engine.trace(prompt)
        assert np.array_equal(alone.data.edges.weight, trace.data.edges.weight)
        assert np.array_equal(alone.data.resid_pre, trace.data.resid_pre)


def test_padding_changes_nothing() -> None:
    """Left- or right-padded, alone or in a batch: the bits of the unpadded prompt."""
    model = tiny_model("llama")
    engine = lmtt.load(model)
    short, long = ids_of(model, 5), ids_of(model, 8)
    alone = engine.trace(input_ids=short)
    batch = engine.trace(
        input_ids=[[*short, 0, 0, 0], [0, 0, 0, *short], long],
        attention_mask=[[1] * 5 + [0] * 3, [0] * 3 + [1] * 5, [1] * 8],
    )
    assert [len(t.tokens) for t in batch] == [5, 5, 8]
    for padded in batch[:2]:
        assert np.array_equal(padded.data.edges.weight, alone.data.edges.weight)
        assert np.array_equal(padded.data.resid_pre, alone.data.resid_pre)
    with pytest.raises(InputError, match="does not fit"):
        engine.trace(input_ids=short, attention_mask=[1])
    with pytest.raises(InputError, match="input_ids are of several lengths"):
        engine.trace(input_ids=[[3, 4], [5]])


@pytest.mark.model
def test_stored_trace_answers_and_says_what_it_cannot(demo_engine: Engine, tmp_path) -> None:
    trace = demo_engine.trace("The capital of France is")
    trace.save(tmp_path / "run")
    alone = lmtt.open(tmp_path / "run")
    assert alone.next_tokens(k=3) == trace.next_tokens(k=3)
    assert np.array_equal(alone.attention(3), trace.attention(3))
    assert alone.neurons(3, -1, k=5)[0].neuron == trace.neurons(3, -1, k=5)[0].neuron
    with pytest.raises(ModelNeededError, match="without the model"):
        alone.lens(3, -1)
    attached = lmtt.open(tmp_path / "run", engine=demo_engine)
    assert attached.lens(3, -1, k=3) == trace.lens(3, -1, k=3)
    other = tiny_model("llama")
    with pytest.raises(CheckpointError, match="another model"):
        lmtt.open(tmp_path / "run", engine=lmtt.load(other))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_ids": []}, "empty"),
        ({"input_ids": [10**6]}, "outside the vocabulary"),
        ({"input_ids": [-1]}, "outside the vocabulary"),
        ({"input_ids": [1.5]}, "not integers"),
        ({"input_ids": [1] * 5000}, "too long"),
        ({"input_ids": [1, 2], "floor": 1.0}, "floor"),
        ({"input_ids": [1, 2], "floor": float("nan")}, "floor"),
        ({"input_ids": [1, 2], "screen": -0.1}, "screen"),
        ({"input_ids": [1, 2], "measure": "l3"}, "measure"),
        ({"input_ids": [1, 2], "keep": "some"}, "keep"),
        ({"prompt": "text"}, "tokenizer"),
        ({}, "no prompt"),
    ],
)
def test_bad_input_is_one_line(options: dict, words: str) -> None:
    engine = lmtt.load(tiny_model("llama"))
    with pytest.raises(InputError, match=words) as raised:
        engine.trace(**options)
    assert "\n" not in str(raised.value)
