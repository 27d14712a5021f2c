"""What the GPU engine holds beside inputs and results stays within the task's workspace.

At sizes where chunks matter, on the CPU, with kernels that compute nothing but mark pairs for evaluation.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lmtt.kernels.types import Attention, AttentionTask, NeuronTask
from lmtt.testing import PeakBytes

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="once is enough: no kernel runs here"
    ),
]


class _Stub:
    """In the place of a kernel."""

    def __init__(self, work=lambda **_: None):
        self.work = work

    def __getitem__(self, grid):
        def launch(*args, **named):
            self.work(**named)

        return launch


def _mark(share):
    """A screen that lists `share` of all pairs, spread evenly."""

    def work(*, bits, values=None, stats=None, **_):
        bits.zero_()
        bits.view(-1)[:: max(1, round(1 / (32 * share)))] = 1
        for tensor in (values, stats):
            if tensor is not None:
                tensor.zero_()

    return work


@pytest.fixture
def no_kernels(monkeypatch):
    """Every Triton kernel replaced: screens list 3 % of all pairs, and results are whatever was allocated."""
    from lmtt.kernels import triton_split
    from lmtt.kernels.directional_attention import fused as directional
    from lmtt.kernels.neurons import fused as neurons
    from lmtt.kernels.proximity import fused as proximity
    from lmtt.kernels.proximity import rows, screen

    for module, names in (
        (triton_split, ["_split"]),
        (directional, ["_row_logsumexp", "_tiles", "_tiles_inside", "_row_sums"]),
        (screen, ["_screen_inside"]),
        (rows, ["_part", "_deposit", "_shares"]),
        (proximity, ["_coefficients", "_evaluate", "_dense"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, _Stub())
    monkeypatch.setattr(screen, "_screen", _Stub(_mark(0.03)))
    monkeypatch.setattr(neurons, "_screen", _Stub(_mark(0.03)))
    # Turning bits is not what is measured: as many bits, the other way round.
    turned = screen.turn_bits

    def turn(by_row, tokens):
        out = turned(by_row, tokens)
        _mark(0.03)(bits=out)
        return out

    monkeypatch.setattr(screen, "_turn_bits", _Stub())
    monkeypatch.setattr(proximity, "turn_bits", turn)
    monkeypatch.setattr(neurons, "turn_bits", turn)


def _results(result):
    """Bytes of what a result keeps, views by what they are views of."""
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tree_leaves(list(vars(result).values()))
        if isinstance(t, torch.Tensor)
    }
    return sum(kept.values())


@pytest.mark.parametrize("mebibytes", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention(no_kernels, dtype, mebibytes):
    from lmtt.kernels.proximity import fused

    T, H, E, D = 1024, 16, 64, 1024
    draw = lambda *shape: torch.ones(*shape, dtype=dtype)  # noqa: E731
    a = Attention(draw(H, T, E), draw(4, T, E), draw(4, T, E), draw(H, E, D), scale=0.1)
    task = AttentionTask(a, draw(T, D), draw(T, D), screen=1e-3, keep=1e-3, workspace=mebibytes << 20)
    with PeakBytes() as memory:
        result = fused.attention_contributions(task, dense=False)
    beyond = memory.peak - _results(result)
    assert beyond <= task.workspace, f"{beyond / 2**20:.1f} MiB at {memory.at}"
    assert beyond > task.workspace / 8, "this test measures something"


@pytest.mark.parametrize("settled", [True, False], ids=["settled", "searched"])
@pytest.mark.parametrize("mebibytes", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_neurons(no_kernels, monkeypatch, dtype, mebibytes, settled):
    from lmtt.kernels.neurons import fused

    class Best(_Stub):
        def __getitem__(self, grid):
            def launch(values, bits, keys, sums, *_, **__):
                keys.fill_((1 << 62) + 1 if settled else -1)
                sums.zero_()

            return launch

    monkeypatch.setattr(fused, "_best", Best())

    T, F, D = 1024, 4096, 512
    task = NeuronTask(
        torch.ones(T, F, dtype=dtype), torch.ones(F, D, dtype=dtype), torch.ones(T, D, dtype=dtype),
        torch.ones(T, D, dtype=dtype), k=20, screen=1e-3, workspace=mebibytes << 20,
    )  # fmt: skip
    with PeakBytes() as memory:
        result = fused.neuron_contributions(task)
    beyond = memory.peak - _results(result)
    assert beyond <= task.workspace, f"{beyond / 2**20:.1f} MiB at {memory.at}"
    assert beyond > task.workspace / 8, "this test measures something"


@pytest.mark.parametrize("mebibytes", [4, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unembedding(monkeypatch, dtype, mebibytes):
    """No logits are held, nor weights as float32: only some keys of each strip."""
    from lmtt.kernels.unembed_topk import fused

    class Keys(_Stub):
        def __getitem__(self, grid):
            def launch(*arguments, **_):
                keys, largest, exponentials = arguments[5:8]
                keys.random_()
                largest.zero_()
                exponentials.fill_(1)

            return launch

    monkeypatch.setattr(fused, "_best_logits", Keys())
    T, V, D, k = 1000, 50_000, 64, 40
    with PeakBytes() as memory:
        result = fused.unembed_topk(
            torch.ones(T, D, dtype=dtype),
            torch.ones(V, D, dtype=torch.bfloat16),
            k,
            workspace=mebibytes << 20,
        )
    inputs = (T + V) * D * 2 + (T * D * 4 if dtype == torch.float32 else 0)
    beyond = memory.peak - inputs - _results(result)
    assert beyond <= mebibytes << 20, f"{beyond / 2**20:.1f} MiB at {memory.at}"
    assert beyond > (mebibytes << 20) / 8, "this test measures something"
    assert 10 * beyond < 4 * T * V, "far from [T, V]"
