"""Captured parts add up to what the model wrote; leaving anything out shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lmtt.contributions import Settings, layer_shares
from lmtt.errors import ClosureError, StructureError
from lmtt.kernels.numerics import checksum_tolerance
from lmtt.structure.attention_hook import watching
from lmtt.structure.capture import capture_layer
from lmtt.structure.discover import discover_layer
from lmtt.structure.replay import dry_run, find_layers
from lmtt.structure.spec import AttentionWrite, CapturedLayer, MlpWrite, Norm, OpaqueWrite, Stage
from lmtt.structure.verify import PROOF_ROWS, attention_probabilities, check_closure, proof_rows
from lmtt.testing_models import CONFIGS, WINDOW, tiny_model, tiny_prompt

ADDITIVE = list(CONFIGS)
# Models whose post-norms or softmaxes compute in float32 even where the model is float64.
FLOAT32_INSIDE = {"gemma2", "gemma3", "gemma4", "olmo2", "glm4", "bloom", "bitnet", "afmoe"}


@pytest.mark.parametrize("name", ADDITIVE)
def test_closes_in_float64_and_changes_no_bit(name: str, run_captured: Callable[..., Any]) -> None:
    bound = 1e-6 if name in FLOAT32_INSIDE else 1e-10
    done = run_captured(tiny_model(name, dtype=torch.float64))
    assert torch.equal(done.logits, done.own_logits)
    for layer in done.captured:
        for closure in check_closure(layer, full=True, bound=bound):
            assert closure.error <= bound, closure


@pytest.mark.parametrize("name", ADDITIVE)
def test_closes_in_float32_and_changes_no_bit(name: str, run_captured: Callable[..., Any]) -> None:
    done = run_captured(tiny_model(name))
    assert torch.equal(done.logits, done.own_logits)
    for layer in done.captured:
        assert all(closure.error <= 1e-5 for closure in check_closure(layer, full=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_closes_to_the_rounding_of_16_bit_models(
    name: str, dtype: torch.dtype, run_captured: Callable[..., Any]
) -> None:
    done = run_captured(tiny_model(name, dtype=dtype))
    assert torch.equal(done.logits, done.own_logits)
    for layer in done.captured:
        for closure in check_closure(layer, full=True):
            assert closure.error <= 8 * torch.finfo(dtype).eps, closure


def test_eager_and_sdpa_are_captured_alike(run_captured: Callable[..., Any]) -> None:
    sdpa = run_captured(tiny_model("mistral", attn_implementation="sdpa")).captured[0]
    eager = run_captured(tiny_model("mistral", attn_implementation="eager")).captured[0]
    a, b = (layer.stages[0].writes[0].attention for layer in (sdpa, eager))
    assert a.window == b.window == WINDOW
    assert a.mask is None
    assert b.mask is None
    assert torch.equal(a.q, b.q)
    assert torch.equal(a.v, b.v)


def test_attention_probabilities_are_the_models_own(run_captured: Callable[..., Any]) -> None:
    model = tiny_model("gemma2", attn_implementation="eager")
    with torch.no_grad():
        own = model(tiny_prompt(), use_cache=False, output_attentions=True).attentions
    for layer, matrices in zip(run_captured(model).captured, own, strict=True):
        attention = layer.stages[0].writes[0].attention
        for head in range(attention.heads):
            A = attention_probabilities(attention, head)
            assert torch.allclose(A, matrices[0, head], atol=1e-6, rtol=0)


def test_resid_mid_is_the_models_own(run_captured: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    seen = []
    hook = model.transformer.h[1].ln_2.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(tiny_prompt(), use_cache=False)
    hook.remove()
    captured = run_captured(model).captured
    assert torch.equal(captured[1].stages[0].whole, seen[0])
    assert torch.equal(captured[0].resid_post, captured[1].resid_pre)


def test_dense_weights_are_views(run_captured: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    first = model.model.layers[0]
    attention, mlp = (stage.writes[0] for stage in run_captured(model).captured[0].stages)
    assert attention.attention.w_o.data_ptr() == first.self_attn.o_proj.weight.data_ptr()
    assert mlp.w_down.data_ptr() == first.mlp.down_proj.weight.data_ptr()


def test_single_token_prompt(run_captured: Callable[..., Any]) -> None:
    done = run_captured(tiny_model("qwen2"), tiny_prompt(1))
    for layer in done.captured:
        check_closure(layer, full=True)


def test_a_run_proves_rows_from_the_first_to_the_last(run_captured: Callable[..., Any]) -> None:
    assert proof_rows(1).tolist() == [0]
    assert proof_rows(PROOF_ROWS).tolist() == list(range(PROOF_ROWS))
    rows = proof_rows(40)
    assert len(set(rows.tolist())) == PROOF_ROWS
    assert [int(rows[0]), int(rows[-1])] == [0, 39]
    for name in ("bloom", "gemma2", "gpt_oss"):  # alibi; window and softcap; sinks
        layer = run_captured(tiny_model(name), tiny_prompt(40)).captured[0]
        for some, every in zip(
            check_closure(layer, full=True, rows=rows), check_closure(layer, full=True), strict=True
        ):
            assert some.error <= 1e-5
            assert every.error <= 1e-5


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_row_that_no_proof_looks_at_is_seen_by_the_kernels(
    backend: str, run_captured: Callable[..., Any]
) -> None:
    layer = run_captured(tiny_model("llama"), tiny_prompt(40)).captured[0]
    rows = proof_rows(40)
    row = next(i for i in range(40) if i not in rows.tolist())

    def changed(write: MlpWrite) -> MlpWrite:
        act = write.act.clone()
        act[row] *= 1.01
        return replace(write, act=act)

    broken = _changed(layer, MlpWrite, changed)
    check_closure(broken, full=True, rows=rows)
    with pytest.raises(ClosureError):
        check_closure(broken, full=True)
    settings = Settings(backend=backend)
    assert layer_shares(layer, settings).checksum <= checksum_tolerance(torch.float32)
    assert layer_shares(broken, settings).checksum > checksum_tolerance(torch.float32)


# --- every feature matters: without it the check fails ---


def _with_attention(layer: CapturedLayer, **changes: Any) -> CapturedLayer:
    return _changed(layer, AttentionWrite, lambda w: replace(w, attention=replace(w.attention, **changes)))


def _changed(layer: CapturedLayer, kind: type, change: Callable[[Any], Any]) -> CapturedLayer:
    stages = tuple(
        replace(stage, writes=tuple(change(w) if isinstance(w, kind) else w for w in stage.writes))
        for stage in layer.stages
    )
    return replace(layer, stages=stages)


def _v_bias_twice(model: Any, layer: CapturedLayer) -> CapturedLayer:
    attention = layer.stages[0].writes[0].attention
    bias = model.model.layers[0].self_attn.v_proj.bias.detach().view(attention.v.shape[0], 1, -1)
    return _with_attention(layer, v=attention.v + bias)


MUTATIONS: dict[str, tuple[str, Callable[[Any, CapturedLayer], CapturedLayer]]] = {
    "attention output bias left out": (
        "llama",
        lambda _m, layer: _changed(layer, AttentionWrite, lambda w: replace(w, bias=None)),
    ),
    "mlp output bias left out": (
        "gpt2",
        lambda _m, layer: _changed(layer, MlpWrite, lambda w: replace(w, bias=None)),
    ),
    "value bias counted twice": ("qwen2", _v_bias_twice),
    "window ignored": ("mistral", lambda _m, layer: _with_attention(layer, window=None)),
    "softcap ignored": ("gemma2", lambda _m, layer: _with_attention(layer, softcap=None)),
    "scale of 1/sqrt(E) assumed": ("granite", lambda _m, layer: _with_attention(layer, scale=8**-0.5)),
    "sinks ignored": ("gpt_oss", lambda _m, layer: _with_attention(layer, sinks=None)),
    "mask ignored": ("falcon_sequential", lambda _m, layer: _with_attention(layer, mask=None)),
    "residual multiplier ignored": ("granite", lambda _m, layer: _with_attention(layer, row_scale=None)),
    "post-norm statistics ignored": ("olmo2", lambda _m, layer: _with_attention(layer, row_scale=None)),
    "post-norm gain ignored": (
        "gemma2",
        lambda m, layer: _with_attention(
            layer, w_o=m.model.layers[0].self_attn.o_proj.weight.detach().T.unflatten(0, (4, 8))
        ),
    ),
    "experts' biases ignored": (
        "gpt_oss",
        lambda _m, layer: _changed(layer, MlpWrite, lambda w: replace(w, bias=None)),
    ),
    "attention's gate ignored": ("afmoe", lambda _m, layer: _with_attention(layer, gate=None)),
    "a norm between attention and W_O ignored": (
        "bitnet",
        lambda _m, layer: _with_attention(layer, gate=None),
    ),
    "the subtracted half of differential attention added": (
        "diffllama",
        lambda _m, layer: _with_attention(layer, w_o=layer.stages[0].writes[0].attention.w_o.abs()),
    ),
    "heads in another order": (
        "llama",
        lambda _m, layer: _with_attention(layer, w_o=layer.stages[0].writes[0].attention.w_o.flip(0)),
    ),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_leaving_a_feature_out_does_not_close(what: str, run_captured: Callable[..., Any]) -> None:
    name, mutate = MUTATIONS[what]
    model = tiny_model(name)
    layer = run_captured(model).captured[0]
    check_closure(layer, full=True)
    with pytest.raises(ClosureError, match=r"layer 0, (attention|mlp): .* at most 1.0e-05, got"):
        check_closure(mutate(model, layer), full=True)


def test_a_constant_added_beside_the_attention_is_its_bias(run_captured: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox_japanese")
    last = run_captured(model).captured[-1]
    bias = model.gpt_neox_japanese.layers[-1].attention.dense_bias
    (write,) = last.stages[0].writes
    assert torch.allclose(write.bias, bias.expand_as(write.written))
    with pytest.raises(ClosureError, match="attention"):
        check_closure(_changed(last, AttentionWrite, lambda w: replace(w, bias=None)), full=True)


@pytest.mark.parametrize("name", ["doge", "gemma4", "opt_post_norm"])
def test_a_rescaled_stream_is_carried_along(name: str, run_captured: Callable[..., Any]) -> None:
    layer = run_captured(tiny_model(name)).captured[0]
    number, stage = next((n, s) for n, s in enumerate(layer.stages) if s.carry is not None)
    before = layer.stages[number - 1].whole if number else None
    if before is not None:
        assert torch.allclose(stage.base, stage.carry.apply(before))
    unscaled = replace(stage, base=stage.base / stage.carry.apply(torch.ones_like(stage.base)))
    with pytest.raises(ClosureError, match="resid_"):
        check_closure(
            replace(layer, stages=(*layer.stages[:number], unscaled, *layer.stages[number + 1 :])), full=False
        )


def test_experts_in_one_batched_product_are_neurons(run_captured: Callable[..., Any]) -> None:
    model = tiny_model("llama4")
    moe = model.model.layers[0].feed_forward
    seen = []
    hook = moe.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    (write,) = run_captured(model).captured[0].stages[1].writes
    hook.remove()
    x = seen[-1].reshape(11, -1)
    with torch.no_grad():
        scores, _ = moe.router(x)
        gate, up = ((x[3] * scores[3, 2]) @ moe.experts.gate_up_proj[2]).chunk(2)
        expected = up * moe.experts.act_fn(gate)
    assert write.act.shape == (11, 4 * 48 + 48)  # the shared expert's neurons come last
    assert torch.allclose(write.act[3].view(5, 48)[2], expected, atol=1e-6)
    assert torch.equal(write.w_down[:48], moe.experts.down_proj[0])


class _Attends(nn.Module):
    """hidden + out(between(attention)) * scale, four heads of two."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.qkv, self.out, self.between, self.scale = nn.Linear(8, 24), nn.Linear(8, 8), between, scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(hidden).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4)
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return hidden + self.out(self.between(z.transpose(1, 2).flatten(2))) * self.scale


def _crossed(z: torch.Tensor) -> torch.Tensor:
    """The halves swapped, one taken from the other, times constants."""
    one, two = z.chunk(2, -1)
    return torch.cat([two - 0.3 * one, one * 2.0], -1)


def _swapped(z: torch.Tensor) -> torch.Tensor:
    one, two = z.chunk(2, -1)
    return torch.cat([two * -0.3, one * 2.0], -1)


def test_what_lies_between_attention_and_its_linear_map_is_found_by_probing() -> None:
    torch.manual_seed(0)
    layer, hidden = _Attends(_swapped), torch.randn(1, 7, 8)
    structure = discover_layer(layer, hidden)
    (found,) = structure.writes
    assert (found.kind, found.module, found.through) == ("attention", "out", True)
    _, captured = capture_layer(layer, structure, 0, hidden)
    check_closure(captured, full=True)


@pytest.mark.parametrize(("between", "words"), [(torch.tanh, "not linear"), (_crossed, "copies some of it")])
def test_what_is_not_of_that_form_is_refused_or_let_in_as_one_part(
    between: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    torch.manual_seed(0)
    layer, hidden = _Attends(between), torch.randn(1, 7, 8)
    with pytest.raises(StructureError, match=words):
        capture_layer(layer, discover_layer(layer, hidden), 0, hidden)
    _, captured = capture_layer(layer, discover_layer(layer, hidden, opaque=True), 0, hidden)
    check_closure(captured, full=True)
    (write,) = captured.stages[0].writes
    assert isinstance(write, OpaqueWrite)
    assert words in write.reason


def test_factors_are_read_at_each_layer_not_remembered_from_the_first() -> None:
    torch.manual_seed(0)
    first, other = (_Attends(lambda z: z, scale) for scale in (0.5, 3.0))
    hidden = torch.randn(1, 7, 8)
    _, captured = capture_layer(other, discover_layer(first, hidden), 1, hidden)
    check_closure(captured, full=True)


def test_a_missing_write_does_not_close_even_without_the_full_check(run_captured: Callable[..., Any]) -> None:
    layer = run_captured(tiny_model("gpt_neox")).captured[1]
    short = replace(layer, stages=(replace(layer.stages[0], writes=layer.stages[0].writes[:1]),))
    with pytest.raises(ClosureError, match="layer 1, resid_post"):
        check_closure(short, full=False)


def test_nan_does_not_close(run_captured: Callable[..., Any]) -> None:
    layer = run_captured(tiny_model("gpt2")).captured[0]
    stage = layer.stages[0]
    broken = replace(
        layer, stages=(Stage(stage.base * torch.nan, stage.whole, stage.writes), *layer.stages[1:])
    )
    with pytest.raises(ClosureError):
        check_closure(broken, full=False)


class _LayerNormAfter(nn.Module):
    """hidden + 0.3 * LayerNorm(2 * down(gelu(up(hidden)))): every constant that a post-norm can have."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8, eps=1e-2)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        down = self.down(nn.functional.gelu(self.up(hidden)))
        return hidden + self.norm(down * 2.0) * 0.3


def test_layer_norm_after_a_sublayer_with_its_shift_and_scales() -> None:
    torch.manual_seed(0)
    layer, hidden = _LayerNormAfter().double(), torch.randn(1, 7, 8, dtype=torch.float64)
    structure = discover_layer(layer, hidden)
    (found,) = structure.writes
    assert [step.module if isinstance(step, Norm) else step.value for step in found.path] == [
        2.0,
        "norm",
        0.3,
    ]
    _, captured = capture_layer(layer, structure, 0, hidden)
    check_closure(captured, full=True, bound=1e-8)
    without_shift = _changed(captured, MlpWrite, lambda w: replace(w, bias=w.bias - 0.3 * layer.norm.bias))
    with pytest.raises(ClosureError):
        check_closure(without_shift, full=True)


# --- refusals ---


def test_batches_are_refused() -> None:
    model = tiny_model("llama")
    calls = dry_run(model, tiny_prompt().expand(2, -1))
    layer = find_layers(model)[1][0]
    with watching(model):
        structure = discover_layer(layer, calls.hidden, calls.calls[0].args, calls.calls[0].kwargs)
        with pytest.raises(StructureError, match="batch of 2"):
            capture_layer(layer, structure, 0, calls.hidden, calls.calls[0].args, calls.calls[0].kwargs)


def test_a_layer_of_another_kind_is_refused_and_left_clean() -> None:
    gpt2, llama = tiny_model("gpt2"), tiny_model("llama")
    calls = dry_run(gpt2, tiny_prompt())
    layer = find_layers(gpt2)[1][0]
    with watching(gpt2):
        structure = discover_layer(layer, calls.hidden, calls.calls[0].args, calls.calls[0].kwargs)
    calls = dry_run(llama, tiny_prompt())
    other = find_layers(llama)[1][0]
    with watching(llama), pytest.raises(StructureError, match=r"c_proj.*discover"):
        capture_layer(other, structure, 0, calls.hidden, calls.calls[0].args, calls.calls[0].kwargs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


# --- experts ---


def test_a_neuron_of_an_expert_is_at_expert_times_width_plus_n(run_captured: Callable[..., Any]) -> None:
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    seen = []
    hook = experts.register_forward_pre_hook(lambda _m, args: seen.append(args))
    write = run_captured(model).captured[0].stages[1].writes[0]
    hook.remove()
    hidden, index, weights = seen[-1]
    F = model.config.intermediate_size
    used = write.act.view(11, 4, F).abs().sum(-1) > 0
    assert torch.equal(used, torch.zeros_like(used).scatter(1, index, True))
    expert = int(index[3, 1])
    gate, up = (hidden[3] @ experts.gate_up_proj[expert].T).chunk(2)
    expected = weights[3, 1] * experts.act_fn(gate) * up
    assert torch.allclose(write.act[3].view(4, F)[expert], expected, atol=1e-6)
    assert torch.equal(write.w_down.view(4, F, -1)[expert], experts.down_proj[expert].T)


def test_shared_experts_come_after_the_routed_ones(run_captured: Callable[..., Any]) -> None:
    model = tiny_model("qwen2_moe")
    (write,) = run_captured(model).captured[0].stages[1].writes
    shared = model.model.layers[0].mlp.shared_expert.down_proj.weight
    assert write.act.shape == (11, 4 * 24 + 24)
    assert torch.equal(write.w_down[4 * 24 :], shared.T)


def _spoil(model: Any) -> Any:
    """Experts whose neurons do not add up to what they return."""
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(lambda _m, _args, out: 2 * out, prepend=True)
    return model


def test_experts_that_are_not_understood_are_refused_or_let_in_as_one_part(
    run_captured: Callable[..., Any],
) -> None:
    model = _spoil(tiny_model("mixtral"))
    with pytest.raises(StructureError, match=r"layer 0 \(\w+\), mlp\.experts .*do not add up.*--opaque"):
        run_captured(model)
    for layer in run_captured(model, opaque=True).captured:
        check_closure(layer, full=True)
        (write,) = layer.stages[1].writes
        assert isinstance(write, OpaqueWrite)
        assert "do not add up" in write.reason
        assert write.kind == "opaque"


def test_experts_that_do_not_say_what_their_matrices_are_are_followed(
    run_captured: Callable[..., Any],
) -> None:
    """The same neurons, found by their products instead of by the module's attributes."""
    model = tiny_model("gpt_oss", layers=1)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    (known,) = run_captured(model).captured[0].stages[1].writes
    for name in ("has_bias", "has_gate"):
        if hasattr(model.model.layers[0].mlp.experts, name):
            delattr(model.model.layers[0].mlp.experts, name)
    done = run_captured(model)
    (write,) = done.captured[0].stages[1].writes
    assert done.structures[0].writes[-1].scattered
    assert torch.equal(write.w_down, known.w_down)
    assert torch.allclose(write.act, known.act, atol=1e-6)
    assert torch.allclose(write.bias, known.bias, atol=1e-6)


def test_a_softcap_that_sdpa_leaves_out_is_refused_with_the_remedy(run_captured: Callable[..., Any]) -> None:
    model = tiny_model("gemma2")
    model.config._attn_implementation = "sdpa"
    # Newer transformers says so itself; older computes without the softcap.
    with pytest.raises((StructureError, ValueError), match=r"(leaves out|does not support).*eager"):
        run_captured(model)
