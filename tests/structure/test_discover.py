"""What discovery says of models whose structure is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lmtt.errors import StructureError
from lmtt.structure.attention_hook import watching
from lmtt.structure.capture import capture_layer
from lmtt.structure.discover import discover_layer
from lmtt.structure.replay import dry_run, find_layers
from lmtt.structure.spec import LayerStructure, Norm
from lmtt.structure.verify import check_closure
from lmtt.testing_models import tiny_model, tiny_prompt

# name: (source of attention, stages, [(kind, module, post_norm)])
KNOWN = {
    "llama": ("registry", 2, [("attention", "self_attn.o_proj", None), ("mlp", "mlp.down_proj", None)]),
    "gpt2": ("registry", 2, [("attention", "attn.c_proj", None), ("mlp", "mlp.c_proj", None)]),
    "gpt_neox": ("registry", 1, [("attention", "attention.dense", None), ("mlp", "mlp.dense_4h_to_h", None)]),
    "cohere": ("registry", 1, [("attention", "self_attn.o_proj", None), ("mlp", "mlp.down_proj", None)]),
    "phi": ("registry", 1, [("attention", "self_attn.dense", None), ("mlp", "mlp.fc2", None)]),
    "falcon": (
        "sdpa",
        1,
        [("attention", "self_attention.dense", None), ("mlp", "mlp.dense_4h_to_h", None)],
    ),
    "bloom": (
        "product",
        2,
        [("attention", "self_attention.dense", None), ("mlp", "mlp.dense_4h_to_h", None)],
    ),
    "gptj": ("product", 1, [("attention", "attn.out_proj", None), ("mlp", "mlp.fc_out", None)]),
    "opt": ("registry", 2, [("attention", "self_attn.out_proj", None), ("mlp", "fc2", None)]),
    "gemma2": (
        "registry",
        2,
        [
            ("attention", "self_attn.o_proj", "post_attention_layernorm"),
            ("mlp", "mlp.down_proj", "post_feedforward_layernorm"),
        ],
    ),
    "qwen2_moe": (
        "registry",
        2,
        [
            ("attention", "self_attn.o_proj", None),
            ("experts", "mlp.experts", None),
            ("mlp", "mlp.shared_expert.down_proj", None),
        ],
    ),
}


def discover_first(name: str, **options: object) -> LayerStructure:
    model = tiny_model(name, **options)
    calls = dry_run(model, tiny_prompt())
    layer = find_layers(model)[1][0]
    with watching(model):
        return discover_layer(layer, calls.hidden, calls.calls[0].args, calls.calls[0].kwargs)


@pytest.mark.parametrize("name", KNOWN)
def test_known_structures(name: str) -> None:
    source, stages, writes = KNOWN[name]
    found = discover_first(name)
    assert found.attention_source == source
    assert found.stages == stages
    assert found.parallel == (stages == 1)
    assert sorted((w.kind, w.module, w.post_norm) for w in found.writes) == sorted(writes)


def test_scalar_multiplier_is_found() -> None:
    assert [w.scale for w in discover_first("granite").writes] == [0.22, 0.22]


def test_shared_expert_gate_is_a_factor_per_token() -> None:
    assert [w.factor for w in discover_first("qwen2_moe").writes] == [False, False, True]


def test_all_layers_of_a_kind_are_alike(run_captured: Callable[..., object]) -> None:
    structures = run_captured(tiny_model("mistral")).structures  # type: ignore[attr-defined]
    assert structures[0] == structures[1] == structures[2]


def test_a_norm_of_the_sum_takes_the_stream_along() -> None:
    found = discover_first("opt_post_norm")
    assert found.carries == ((Norm("self_attn_layer_norm"),), (Norm("final_layer_norm"),))
    assert [w.path for w in found.writes] == list(found.carries)


class _NormFirst(nn.Module):
    """Normalises the stream before anything is added to it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, bias=bias)
        self.linear = nn.Linear(8, 8)
        nn.init.normal_(self.norm.weight)
        if bias:
            nn.init.normal_(self.norm.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return 2 * normed + self.linear(normed)


def test_a_norm_at_the_start_is_part_of_the_first_sum() -> None:
    layer, hidden = _NormFirst(bias=False), torch.randn(1, 5, 8)
    _, captured = capture_layer(layer, discover_layer(layer, hidden), 0, hidden)
    (stage,) = captured.stages
    assert torch.allclose(stage.base, 2 * layer.norm(hidden)[0], atol=1e-6)
    assert stage.carry is not None
    assert torch.allclose(stage.carry.apply(hidden[0]), stage.base)
    assert all(closure.error <= 1e-6 for closure in check_closure(captured, full=True))


def test_a_shift_that_has_no_home_is_refused() -> None:
    layer, hidden = _NormFirst(bias=True), torch.randn(1, 5, 8)
    with pytest.raises(StructureError, match="norm shifts the stream"):
        capture_layer(layer, discover_layer(layer, hidden), 0, hidden)


class _Doubled(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.rand(8))


class _Gated(_Linear):
    """Rescales the stream by something that depends on it."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.sigmoid() * hidden + self.linear(hidden)


class _Rescaled(_Linear):
    """Rescales the stream by constants: still a sum."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 0.5 * (self.gain * hidden + self.linear(hidden))


class _InPlace(_Linear):
    """Adds onto its own sublayer's output, as some models do to save memory."""

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.linear(hidden)
        out += hidden
        return out


@pytest.mark.parametrize(("layer", "words"), [(_Doubled(), "added 2 times"), (_Gated(), "not a sum")])
def test_streams_that_are_not_passed_on_once_are_refused(layer: nn.Module, words: str) -> None:
    with pytest.raises(StructureError, match=words):
        discover_layer(layer, torch.randn(1, 5, 8), index=3)


def test_in_place_addition_is_followed() -> None:
    found = discover_layer(_InPlace(), torch.randn(1, 5, 8))
    assert [(w.kind, w.module) for w in found.writes] == [("mlp", "linear")]


def test_a_stream_that_constants_rescale_is_a_sum_still() -> None:
    layer, hidden = _Rescaled(), torch.randn(1, 5, 8)
    structure = discover_layer(layer, hidden)
    _, captured = capture_layer(layer, structure, 0, hidden)
    (stage,) = captured.stages
    assert torch.allclose(stage.base, 0.5 * layer.gain * hidden[0])
    assert all(closure.error <= 1e-6 for closure in check_closure(captured, full=True))


class _Squashed(_Linear):
    """Takes the sum through something that is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.squash = nn.Tanh()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.squash(hidden + self.linear(hidden))


def test_a_function_of_the_sum_that_is_no_norm_is_refused() -> None:
    layer, hidden = _Squashed(), torch.randn(1, 5, 8)
    with pytest.raises(StructureError, match="not a norm"):
        capture_layer(layer, discover_layer(layer, hidden), 0, hidden)


class _TwoStreams(_Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden)


def test_several_streams_at_once_are_refused() -> None:
    with pytest.raises(StructureError, match="several streams"):
        discover_layer(_TwoStreams(), torch.randn(1, 5, 2, 8))


def test_discovery_leaves_no_hooks() -> None:
    layer = _Gated()
    with pytest.raises(StructureError):
        discover_layer(layer, torch.randn(1, 5, 8))
    assert not layer.linear._forward_hooks
    assert not layer.linear._forward_pre_hooks
