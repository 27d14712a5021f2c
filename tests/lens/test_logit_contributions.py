"""Direct logit attribution: parts add up to the model's own logit, and each means what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import lmtt
from lmtt.errors import InputError, ModelNeededError
from lmtt.structure.capture import capture_layer
from lmtt.structure.spec import OpaqueWrite
from lmtt.testing_models import tiny_model, tiny_prompt

if TYPE_CHECKING:
    from lmtt.engine import Engine
    from lmtt.trace import Trace

IOI = "When Mary and John went to the store, John gave a drink to"
TARGETS = (5, 17, 90)
POSITIONS = (0, 4, -1)

# float64 models close to rounding, but for what a model itself computes in float32 whatever its dtype.
FLOAT64 = {
    "gpt2": 1e-9,
    "gptj": 1e-9,  # parallel, bias on the head
    "gpt_neo": 1e-9,
    "gpt_neox": 1e-9,  # parallel
    "falcon": 1e-9,  # parallel
    "falcon_sequential": 1e-9,  # alibi
    "phi": 1e-9,  # parallel, bias on the head
    "opt": 1e-9,  # learned positions
    "stablelm": 1e-9,
    "starcoder2": 1e-9,
    "llama": 1e-6,  # from here on the model's norms work in float32
    "qwen2": 1e-6,
    "qwen3": 1e-6,
    "granite": 1e-6,  # scales on embedding, updates and logits
    "cohere": 1e-6,  # parallel, scale on logits, tied head
    "mixtral": 1e-6,  # experts
    "qwen2_moe": 1e-6,
    "gpt_oss": 1e-6,  # sinks
}
# Norms that work in float32 inside the layers: softcaps and sandwich norms, post-norm, embedding norm.
FLOAT32 = ("gemma2", "gemma3", "olmo2", "glm4", "bloom")


def traced(name: str, dtype: torch.dtype, **config: Any) -> tuple[Any, Trace]:
    model = tiny_model(name, dtype=dtype, **config)
    return model, lmtt.load(model).trace(input_ids=tiny_prompt())


def own_logits(model: Any) -> np.ndarray:
    """[T, V] float64, from the model's own forward."""
    with torch.no_grad():
        logits: np.ndarray = model(tiny_prompt()).logits[0].double().numpy()
    return logits


def sum_of_parts(parts: Any) -> float:
    arrays = (parts.heads, parts.neurons, parts.opaque, parts.bias.attention, parts.bias.mlp)
    sums = sum(float(np.sum(a, dtype=np.float64)) for a in arrays)
    return sums + parts.embed + parts.bias.final_norm + parts.bias.head


def before_softcap(logit: float, cap: float | None) -> float:
    return logit if cap is None else cap * float(np.arctanh(logit / cap))


def check_parts(name: str, dtype: torch.dtype, tolerance: float, **config: Any) -> None:
    model, trace = traced(name, dtype, **config)
    own = own_logits(model)
    cap = getattr(model.config, "final_logit_softcapping", None)
    for position in POSITIONS:
        for target, parts in zip(TARGETS, trace.logit_contributions(TARGETS, position=position), strict=True):
            want = float(own[position, target])
            assert abs(parts.logit - want) <= tolerance
            assert abs(sum_of_parts(parts) - before_softcap(want, cap)) <= tolerance
            assert abs(parts.total - sum_of_parts(parts)) <= 1e-12
        difference = trace.logit_contributions(TARGETS[0], foil=TARGETS[1], position=position)
        want = before_softcap(own[position, 5], cap) - before_softcap(own[position, 17], cap)
        assert abs(sum_of_parts(difference) - want) <= tolerance
        assert abs(difference.logit - float(own[position, 5] - own[position, 17])) <= tolerance


@pytest.mark.parametrize(("name", "tolerance"), FLOAT64.items())
def test_parts_add_up_to_the_models_logit_in_float64(name: str, tolerance: float) -> None:
    check_parts(name, torch.float64, tolerance)


@pytest.mark.parametrize("name", FLOAT32)
def test_parts_add_up_to_the_models_logit_in_float32(name: str) -> None:
    check_parts(name, torch.float32, 1e-5)


def test_a_projection_before_the_head_is_seen_through() -> None:
    """OPT's project_out: the stream is wider than the unembedding's rows."""
    check_parts("opt", torch.float64, 1e-9, word_embed_proj_dim=16)


def test_softcap_is_undone_and_said() -> None:
    model, trace = traced("gemma2", torch.float32)
    cap = model.config.final_logit_softcapping
    for parts in trace.logit_contributions(TARGETS):
        assert abs(parts.logit - cap * np.tanh(parts.pre_softcap / cap)) <= 1e-5
        assert abs(parts.total - parts.pre_softcap) <= 1e-5
    assert max(abs(p.logit - p.pre_softcap) for p in trace.logit_contributions(TARGETS)) >= 1e-2


def test_every_kind_of_part_matters() -> None:
    """In these models no kind of part is so small that forgetting it would pass the sums above."""
    parts = traced("gptj", torch.float64)[1].logit_contributions(5)
    assert min(abs(parts.embed), abs(parts.bias.final_norm), abs(parts.bias.head)) >= 1e-4
    assert np.abs(parts.bias.mlp).max() >= 1e-4
    parts = traced("gpt2", torch.float64)[1].logit_contributions(5)
    assert np.abs(parts.bias.attention).max() >= 1e-4
    assert np.abs(parts.heads).max() >= 1e-4
    assert np.abs(parts.neurons).max() >= 1e-4


def test_an_mlp_that_is_not_taken_apart_is_opaque(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its write is one part of its layer; the other layers keep their neurons."""

    def closed(layer: Any, structure: Any, index: int, *rest: Any) -> Any:
        hidden, captured = capture_layer(layer, structure, index, *rest)
        if index == 1:
            last = captured.stages[-1]
            writes = tuple(OpaqueWrite(w.written, "mlp", "closed by the test") for w in last.writes)
            captured = replace(captured, stages=(*captured.stages[:-1], replace(last, writes=writes)))
        return hidden, captured

    before = traced("gpt2", torch.float64)[1].logit_contributions(5)
    monkeypatch.setattr("lmtt.engine.capture_layer", closed)
    parts = traced("gpt2", torch.float64)[1].logit_contributions(5)
    assert abs(parts.total - before.total) <= 1e-9
    assert abs(parts.defect) <= 1e-9
    assert np.abs(parts.neurons[1]).max() == parts.bias.mlp[1] == 0
    assert abs(parts.opaque[1] - (before.neurons[1].sum() + before.bias.mlp[1])) <= 1e-9
    assert abs(parts.opaque[1]) >= 1e-3
    assert np.abs(parts.opaque[[0, 2]]).max() == 0
    assert np.array_equal(parts.neurons[[0, 2]], before.neurons[[0, 2]])


def test_shapes_and_dtypes() -> None:
    for dtype, host in ((torch.float32, np.float32), (torch.float64, np.float64)):
        parts = traced("llama", dtype)[1].logit_contributions(5, position=4)
        assert parts.heads.shape == (3, 4, 11)
        assert parts.neurons.shape == (3, 48)
        assert parts.bias.attention.shape == parts.bias.mlp.shape == parts.opaque.shape == (3,)
        assert parts.heads.dtype == parts.neurons.dtype == host
        assert np.abs(parts.heads[:, :, 5:]).max() == 0, "a part of a token that is yet to come"
        assert np.abs(parts.per_head - parts.heads.sum(-1)).max() <= 1e-6


@pytest.mark.parametrize(
    ("name", "projection", "norm"),
    [
        ("llama", "model.layers.{}.self_attn.o_proj", "model.norm"),
        ("opt", "model.decoder.layers.{}.self_attn.out_proj", "model.decoder.final_layer_norm"),
    ],
)
def test_a_head_is_what_its_write_adds_to_the_logit(name: str, projection: str, norm: str) -> None:
    """Taking a head's write out of the final state, the norm's statistics held, takes its part away.

    The write and the frozen norm are formed here from the model's own modules and definitions.
    """
    model, trace = traced(name, torch.float64)
    layer, head, width = 1, 2, 8
    inputs: dict[str, torch.Tensor] = {}

    def note(key: str) -> Any:
        return lambda _module, args: inputs.__setitem__(key, args[0])

    out = model.get_submodule(projection.format(layer))
    final_norm = model.get_submodule(norm)
    with torch.no_grad():
        hooks = [out.register_forward_pre_hook(note("z")), final_norm.register_forward_pre_hook(note("x"))]
        model(tiny_prompt())
        for hook in hooks:
            hook.remove()
        span = slice(head * width, (head + 1) * width)
        write = inputs["z"].reshape(-1, 32)[-1, span] @ out.weight[:, span].T
        state = inputs["x"].reshape(-1, 32)[-1]

        if name == "llama":
            rms = (state.square().mean() + model.config.rms_norm_eps).sqrt()

            def frozen(x: torch.Tensor) -> torch.Tensor:
                return x / rms * final_norm.weight
        else:
            std = (state.var(unbiased=False) + final_norm.eps).sqrt()

            def frozen(x: torch.Tensor) -> torch.Tensor:
                return (x - x.mean()) / std * final_norm.weight + final_norm.bias

        unembed = model.get_output_embeddings().weight
        effect = unembed @ frozen(state) - unembed @ frozen(state - write)
    assert float(effect.abs().max()) >= 1e-2
    for target, parts in zip(TARGETS, trace.logit_contributions(TARGETS), strict=True):
        assert abs(parts.per_head[layer, head] - float(effect[target])) <= 1e-6


def test_a_neuron_is_what_its_write_adds_to_the_logit() -> None:
    model, trace = traced("gpt2", torch.float64)
    layer, neuron = 2, 7
    down, norm = model.transformer.h[layer].mlp.c_proj, model.transformer.ln_f
    inputs: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        hooks = [
            down.register_forward_pre_hook(lambda _m, args: inputs.__setitem__("act", args[0])),
            norm.register_forward_pre_hook(lambda _m, args: inputs.__setitem__("x", args[0])),
        ]
        model(tiny_prompt())
        for hook in hooks:
            hook.remove()
        write = inputs["act"][0, -1, neuron] * down.weight[neuron]
        state = inputs["x"][0, -1]
        std = (state.var(unbiased=False) + norm.eps).sqrt()
        effect = model.lm_head.weight @ ((write - write.mean()) / std * norm.weight)
    parts = trace.logit_contributions(5)
    assert abs(float(effect[5])) >= 1e-4
    assert abs(parts.neurons[layer, neuron] - float(effect[5])) <= 1e-9


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_targets_are_attributed_in_the_pass_itself(name: str) -> None:
    """The same numbers as on demand, without the model's layers running again, kept light or not."""
    model = tiny_model(name)
    engine = lmtt.load(model)
    ids = tiny_prompt()
    later = engine.trace(input_ids=ids).logit_contributions(TARGETS)
    runs: list[int] = []
    for keep in ("full", "light"):
        trace = engine.trace(input_ids=ids, targets=TARGETS, keep=keep)
        hook = engine.model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
        at_once = trace.logit_contributions(TARGETS)
        pair = trace.logit_contributions(5, foil=17)
        hook.remove()
        assert not runs
        for a, b in zip(at_once, later, strict=True):
            assert np.array_equal(a.heads, b.heads)
            assert np.array_equal(a.neurons, b.neurons)
            assert a.total == b.total
        assert abs(pair.total - (later[0].total - later[1].total)) <= 1e-6
    with pytest.raises(ModelNeededError, match="kept light"):
        trace.logit_contributions(6)
    with pytest.raises(ModelNeededError, match="kept light"):
        trace.logit_contributions(5, position=0)


def test_batched_targets_equal_single_ones() -> None:
    trace = traced("qwen2", torch.float64)[1]
    together = trace.logit_contributions(list(TARGETS), foil=[17, 90, 5])
    for target, foil, parts in zip(TARGETS, (17, 90, 5), together, strict=True):
        alone = trace.logit_contributions(target, foil=foil)
        assert (parts.target, parts.foil) == (target, foil) == (alone.target, alone.foil)
        assert np.abs(parts.heads - alone.heads).max() <= 1e-12
        assert np.abs(parts.neurons - alone.neurons).max() <= 1e-12
    assert trace.logit_contributions([]) == []


def test_a_foil_changes_sign_when_exchanged() -> None:
    trace = traced("gpt2", torch.float64)[1]
    one, other = trace.logit_contributions(5, foil=17), trace.logit_contributions(17, foil=5)
    assert np.abs(one.heads + other.heads).max() <= 1e-12
    assert abs(one.total + other.total) <= 1e-12


def test_top_names_the_strongest_parts() -> None:
    parts = traced("llama", torch.float64)[1].logit_contributions(5)
    top = parts.top(10**6)
    values = np.array([part.logit for part in top])
    assert abs(values.sum() - parts.total) <= 1e-9, "a part is missing or named twice"
    assert len({part.what for part in top}) == len(top)
    assert (np.diff(np.abs(values)) <= 0).all()
    assert parts.top(3) == top[:3]
    layer, head, source = np.unravel_index(np.abs(parts.heads).argmax(), parts.heads.shape)
    named = next(part for part in top if part.what.startswith(f"head {head} of layer {layer} reading"))
    assert named.what.endswith(f" at {source}")
    assert named.logit == parts.heads[layer, head, source]
    with pytest.raises(InputError, match="k is out of range"):
        parts.top(0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": 97}, "unknown token"),
        ({"target": -1}, "unknown token"),
        ({"target": True}, "unknown token"),
        ({"target": 1.5}, "unknown token"),
        ({"target": [1, 1.5]}, "unknown token"),
        ({"target": 1, "foil": 97}, "unknown token"),
        ({"target": "a"}, "has no tokenizer"),
        ({"target": [1, 2], "foil": [3]}, "foils do not match"),
        ({"target": 1, "foil": [3, 4]}, "foils do not match"),
        ({"target": 1, "position": 11}, "position is out of range"),
        ({"target": 1, "position": -12}, "position is out of range"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: dict[str, Any], words: str) -> None:
    trace = traced("llama", torch.float32)[1]
    with pytest.raises(InputError, match=words) as caught:
        trace.logit_contributions(**arguments)
    assert "\n" not in str(caught.value)


def test_targets_of_a_trace_are_a_list() -> None:
    engine = lmtt.load(tiny_model("llama"))
    with pytest.raises(InputError, match="a list of tokens"):
        engine.trace(input_ids=[1, 2], targets=" Mary")  # type: ignore[call-overload]
    with pytest.raises(InputError, match="unknown token"):
        engine.trace(input_ids=[1, 2], targets=[97])


def test_a_stored_trace_needs_the_model(tmp_path: Any) -> None:
    trace = traced("llama", torch.float32)[1]
    trace.save(tmp_path / "run")
    with pytest.raises(ModelNeededError, match="without the model"):
        lmtt.open(tmp_path / "run").logit_contributions(5)


@pytest.mark.model
def test_parts_add_up_on_a_real_model(demo_engine: Engine) -> None:
    """To 1e-4 of the logits that the model gives by itself, on positions with large and small states."""
    with torch.no_grad():
        ids = demo_engine.tokenizer(IOI, return_tensors="pt").input_ids
        own = demo_engine.model(ids).logits[0].double().numpy()
    trace = demo_engine.trace(IOI)
    mary, john = (demo_engine.token_id(name) for name in (" Mary", " John"))
    for position in (-1, 0, 5):
        for target, parts in zip(
            (mary, john), trace.logit_contributions([" Mary", " John"], position=position), strict=True
        ):
            assert abs(sum_of_parts(parts) - own[position, target]) <= 1e-4
            assert abs(parts.logit - own[position, target]) <= 1e-4
    difference = trace.logit_contributions(" Mary", foil=" John")
    assert difference.name == " Mary -  John"
    assert abs(sum_of_parts(difference) - (own[-1, mary] - own[-1, john])) <= 1e-4
    assert difference.total >= 1, "the model is expected to solve this prompt"


@pytest.mark.model
def test_parts_add_up_on_a_real_model_in_float64(demo_engine: Engine) -> None:
    """To 1e-6: the final norm itself works in float32 (measured 1e-7 of a logit of 11)."""
    engine = lmtt.load(dtype="float64", device="cpu")
    trace = engine.trace("The capital of France is")
    parts = trace.logit_contributions(" Paris")
    with torch.no_grad():
        own = engine.model(torch.as_tensor(trace.input_ids)[None]).logits[0, -1, parts.target]
    assert abs(sum_of_parts(parts) - float(own)) <= 1e-6 * abs(float(own))


@pytest.mark.model
def test_a_target_is_one_token(demo_engine: Engine) -> None:
    trace = demo_engine.trace("The capital of France is")
    for text in ("", " Saint Petersburg"):
        with pytest.raises(InputError, match="is not one token"):
            trace.logit_contributions(text)
    with pytest.raises(InputError, match=" Saint', "):  # what it is made of is named
        trace.logit_contributions(" Saint Petersburg")
