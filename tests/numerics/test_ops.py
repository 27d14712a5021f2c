"""The public functions: batches, what results offer, and what bad arguments are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmtt import ops
from lmtt.errors import BackendError, InputError, LmttError
from lmtt.kernels import registry
from lmtt.testing import assert_within

B, T, H, H_KV, E, E_V, D, F, V = 3, 6, 4, 2, 5, 7, 16, 30, 40


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def arguments():
    values = {
        "q": randn(B, H, T, E),
        "k": randn(B, H_KV, T, E, seed=1),
        "v": randn(B, H_KV, T, E_V),
        "w_o": randn(H, E_V, D),
        "resid_pre": randn(B, T, D),
        "b_o": randn(D),
        "others": (randn(B, T, D, seed=2), randn(B, T, D, seed=3)),
        "row_scale": randn(B, T).abs(),
        "gate": randn(B, T, H, E_V),
    }
    pattern = (values["q"] @ values["k"].repeat_interleave(2, 1).mT * E**-0.5).masked_fill(
        torch.ones(T, T).triu(1).bool(), -torch.inf
    )
    value = torch.einsum(
        "bhij,bhje,bihe->bihe", pattern.softmax(-1), values["v"].repeat_interleave(2, 1), values["gate"]
    )
    written = torch.einsum("bihe,hed,bi->bid", value, values["w_o"], values["row_scale"])
    values["whole"] = values["resid_pre"] + written + values["b_o"] + sum(values["others"])
    return values


@pytest.fixture
def neuron_arguments():
    act, w_down, mid, bias = randn(B, T, F), randn(F, D), randn(B, T, D), randn(D)
    return {
        "act": act,
        "w_down": w_down,
        "resid_mid": mid,
        "resid_post": mid + act @ w_down + bias,
        "b_down": bias,
    }


@pytest.mark.parametrize("floor", [0.0, 1e-2])
def test_attention_shares_of_a_batch(backend, arguments, floor):
    c = ops.attention_contributions(**arguments, floor=floor, backend=backend)
    assert c.edges.shape == (B, T, T)
    assert c.per_head.shape == (B, T, H)
    assert c.others.shape == (B, T, 2)
    assert c.choice.backend == backend
    assert_within(c.checksum, torch.zeros(B, T), 1e-5, "the parts add up to the whole")
    row = c.edges.sum(-1) + c.residual + c.bias + c.others.sum(-1)
    assert_within(row, torch.ones(B, T), 1e-6)
    maps = [c.head_map(h) for h in range(H)]
    assert_within(sum(maps), c.edges, 1e-6, "head maps add up to the edges")
    assert_within(torch.stack([m.sum(-1) for m in maps], -1), c.per_head, 1e-6)

    s = c.survivors
    dense = torch.stack(maps, 1)[s.batch, s.head, s.destination, s.source]
    assert_within(s.value, dense, 1e-6, "survivors")
    order = ((s.batch * T + s.destination) * T + s.source) * H + s.head
    assert bool((order[1:] > order[:-1]).all())
    assert set(s.batch.tolist()) == set(range(B))
    assert 0 < len(s.value) < B * H * T * (T + 1) // 2

    alone = {
        name: value[1:2] if name in ("q", "k", "v", "resid_pre", "whole", "row_scale", "gate") else value
        for name, value in arguments.items()
    }
    alone["others"] = tuple(other[1:2] for other in arguments["others"])
    single = ops.attention_contributions(**alone, floor=floor, backend=backend)
    assert torch.equal(single.edges[0], c.edges[1]), "a sequence alone and in a batch"


def test_l2_has_no_survivors_and_no_certificate(arguments):
    c = ops.attention_contributions(**arguments, measure="l2", floor=0.5)
    assert len(c.survivors.value) == 0
    assert_within(c.certificate, torch.zeros(B, T), 0.0)
    assert_within(sum(c.head_map(h) for h in range(H)), c.edges, 1e-6)


def test_neurons_of_a_batch(backend, neuron_arguments):
    n = ops.neuron_contributions(**neuron_arguments, k=F, backend=backend)
    assert n.index.shape == n.value.shape == (B, T, F)
    assert n.index.dtype == torch.int64
    assert_within(n.value.sum(-1) + n.residual + n.bias, torch.ones(B, T), 1e-6)
    assert_within(n.checksum, torch.zeros(B, T), 1e-5)


def test_directions_of_a_batch_add_up(arguments):
    names = ("q", "k", "v", "w_o", "row_scale", "gate")
    given = {name: arguments[name] for name in names}
    direction = randn(B, T, D, seed=9)
    d = ops.directional_attention(**given, direction=direction)
    assert d.shape == (B, H, T, T)
    written = arguments["whole"] - arguments["resid_pre"] - arguments["b_o"] - sum(arguments["others"])
    assert_within(d.sum((1, 3)), (written * direction).sum(-1), 1e-4)
    assert_within(ops.directional_attention(**given, direction=direction, reduce="heads"), d.sum(1), 1e-5)
    assert_within(ops.directional_attention(**given, direction=direction, reduce="sources"), d.sum(3), 1e-5)


def test_masks_that_broadcast(arguments):
    full = torch.rand(B, H, T, T, generator=torch.Generator().manual_seed(0)) < 0.6
    for mask in (full[:1, :1], full[:, :1], full[:1]):
        got = ops.attention_contributions(**arguments, mask=mask)
        want = ops.attention_contributions(**arguments, mask=mask.expand(B, H, T, T))
        assert_within(got.edges, want.edges, 1e-6)
        additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        assert_within(ops.attention_contributions(**arguments, mask=additive).edges, want.edges, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_result_dtypes(arguments, neuron_arguments, dtype):
    def cast(value):
        return tuple(v.to(dtype) for v in value) if isinstance(value, tuple) else value.to(dtype)

    want = torch.float64 if dtype == torch.float64 else torch.float32
    c = ops.attention_contributions(**{n: cast(v) for n, v in arguments.items()})
    for values in (c.edges, c.per_head, c.normaliser, c.certificate, c.survivors.value, c.head_map(0)):
        assert values.dtype == want
    n = ops.neuron_contributions(**{n: cast(v) for n, v in neuron_arguments.items()})
    assert n.value.dtype == want


def test_results_carry_no_gradient(arguments):
    arguments["q"].requires_grad_()
    assert not ops.attention_contributions(**arguments).edges.requires_grad


NAN = torch.full((B, T, D), torch.nan)
BAD_ATTENTION = {
    "q": (randn(B, H, T), r"shape of q, expected \[B, H, T, E\], none of them 0, got \[3, 4, 6\]"),
    "k": (randn(B, 3, T, E), "heads of k, expected a divisor of q's 4, got 3"),
    "v": (randn(B, H_KV, T + 1, E_V), r"shape of v, expected \[3, 2, 6, 7\], got \[3, 2, 7, 7\]"),
    "w_o": (randn(H, E_V + 1, D), r"shape of w_o, expected \[4, 7, 16\], got \[4, 8, 16\]"),
    "resid_pre": (
        randn(B, T, D).double(),
        "dtype of resid_pre, expected torch.float32 like q, got torch.float64",
    ),
    "whole": (NAN, r"whole, expected finite values, got nan at \[0, 0, 0\]"),
    "b_o": (randn(D + 1), r"shape of b_o, expected \[16\], got \[17\]"),
    "others": ((randn(B, T),), r"shape of others\[0\], expected \[3, 6, 16\], got \[3, 6\]"),
    "row_scale": (randn(B, T, 1), r"shape of row_scale, expected \[3, 6\]"),
    "gate": (randn(B, H, T, E_V), "shape of gate"),
    "alibi": (randn(H, 1), "shape of alibi"),
    "sinks": (torch.full((H,), torch.inf), r"sinks, expected finite values, got inf at \[0\]"),
    "mask": (randn(B, 2, T, T), r"shape of mask, expected \[3 or 1, 4 or 1, 6, 6\], got \[3, 2, 6, 6\]"),
    "lse": (randn(B, T, H), "shape of lse"),
    "scale": (float("nan"), "scale, expected a finite number"),
    "softcap": (0.0, "softcap, expected a positive number"),
    "window": (0, "window, expected a positive integer"),
    "floor": (-1e-3, "floor, expected a finite number >= 0, got -0.001"),
    "measure": ("cosine", r"measure, expected l1 \| l2, got cosine"),
    "backend": ("cuda9", r"no such backend, expected auto \| cpp \| cuda \| triton \| reference, got"),
}


@pytest.mark.parametrize("name", sorted(BAD_ATTENTION))
def test_bad_attention_arguments(arguments, name):
    value, message = BAD_ATTENTION[name]
    with pytest.raises(LmttError, match=message) as caught:
        ops.attention_contributions(**{**arguments, name: value})
    assert isinstance(caught.value, BackendError if name == "backend" else ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", randn(B, H, T, E).long(), "dtype of q, expected torch.float32"),
        ("q", randn(B, H, T, E).tolist(), "q, expected a torch tensor, got list"),
        ("mask", torch.full((1, 1, T, T), torch.inf), "mask, expected finite values or -inf, got inf"),
        ("mask", torch.zeros(1, 1, T, T, dtype=torch.int64), "dtype of mask"),
        ("k", torch.empty(B, H_KV, T, E, device="meta"), "device of k, expected cpu like q, got meta"),
    ],
)
def test_more_bad_attention_arguments(arguments, name, value, message):
    with pytest.raises(InputError, match=message):
        ops.attention_contributions(**{**arguments, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", 0, "k, expected 1 to 30, the number of neurons, got 0"),
        ("k", 31, "k, expected 1 to 30"),
        ("k", 2.0, "k, expected 1 to 30"),
        ("w_down", randn(F + 1, D), r"shape of w_down, expected \[30, 16\], got \[31, 16\]"),
        ("resid_post", NAN, "resid_post, expected finite values"),
        ("act", randn(T, F), r"shape of act, expected \[B, T, F\]"),
    ],
)
def test_bad_neuron_arguments(neuron_arguments, name, value, message):
    with pytest.raises(InputError, match=message):
        ops.neuron_contributions(**{**neuron_arguments, name: value})


def test_other_bad_arguments(arguments):
    given = {name: arguments[name] for name in ("q", "k", "v", "w_o")}
    with pytest.raises(InputError, match=r"shape of direction, expected \[3, 6, 16\], got \[6, 16\]"):
        ops.directional_attention(**given, direction=randn(T, D))
    with pytest.raises(InputError, match=r"reduce, expected None \| heads \| sources, got tokens"):
        ops.directional_attention(**given, direction=randn(B, T, D), reduce="tokens")
    with pytest.raises(InputError, match="k, expected 1 to 40, the size of the vocabulary, got 41"):
        ops.unembed_topk(randn(2, D), randn(V, D), 41)
    with pytest.raises(InputError, match=r"shape of w_u, expected \[40, 16\], got \[40, 15\]"):
        ops.unembed_topk(randn(2, D), randn(V, D - 1), 4)
    with pytest.raises(InputError, match="head, expected 0 to 3, got 4"):
        ops.attention_contributions(**arguments).head_map(4)


def test_finiteness_is_only_checked_when_asked(arguments):
    broken = {**arguments, "whole": NAN}
    assert bool(ops.attention_contributions(**broken, check=False).edges[:, 0, 0].isnan().all())


def test_every_op_has_a_reference_and_a_formula():
    for name, op in registry.OPS.items():
        assert registry.choose(name, "reference", torch.zeros(1)).backend == "reference"
        module = __import__(op.reference, fromlist=[name])
        assert callable(getattr(module, name))


def test_the_readme_lists_what_the_registry_does():
    readme = (Path(registry.__file__).parent / "README.md").read_text()
    for name, op in registry.OPS.items():
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| [`{name}`]"))
        assert op.reference.removeprefix("lmtt.kernels.").replace(".", "/") + ".py" in row
        for backend in registry.BACKENDS:
            module = registry.load(backend)
            if not isinstance(module, registry.Unusable):
                assert hasattr(module, name) == (backend in row.split("|")[4]), (name, backend)


def test_the_choice_has_a_reason(case):
    task = case.neurons(0, dtype=torch.float64)
    choice = registry.choose("neuron_contributions", "auto", task)
    assert choice.backend == "reference"
    assert choice.refused["cpp"]
    assert "cpp" in choice.reason
    assert registry.choose("neuron_contributions", "reference", task).reason == "requested"
    with pytest.raises(
        BackendError, match=r"backend 'cpp' cannot do neuron_contributions here: .*; use one of: auto"
    ):
        registry.choose("neuron_contributions", "cpp", task)
    with pytest.raises(BackendError, match="no such op, expected directional_attention"):
        registry.choose("attention", "auto", task)


def test_a_backend_that_is_not_installed_or_cannot_run_says_so(monkeypatch, case):
    task = case.neurons(0)
    # A dictionary of its own: entries taken out and put back would stand in another order ever after.
    backends = {"cpp": "lmtt.kernels.backends.absent_backend", "reference": registry.BACKENDS["reference"]}
    monkeypatch.setattr(registry, "BACKENDS", backends)
    assert registry.availability() == {"cpp": "not part of this installation", "reference": None}
    choice = registry.choose("neuron_contributions", "auto", task)
    assert choice.refused == {"cpp": "not part of this installation"}
    with pytest.raises(BackendError, match="not part of this installation; use one of: auto, reference"):
        registry.choose("neuron_contributions", "cpp", task)
