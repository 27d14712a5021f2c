"""Results are the same bits for any number of threads, any workspace, and whatever memory held before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtt.kernels.backends import cpp_backend
from lmtt.kernels.types import AttentionResult, AttentionTask, NeuronResult, NeuronTask

pytestmark = pytest.mark.native


def same_bits(a: AttentionResult | NeuronResult, b: AttentionResult | NeuronResult) -> None:
    def compare(x: Any, y: Any, name: str) -> None:
        if isinstance(x, Tensor):
            assert torch.equal(x, y), f"{name} differs"
        elif isinstance(x, tuple):
            for n, (u, v) in enumerate(zip(x, y, strict=True)):
                compare(u, v, f"{name}[{n}]")
        else:
            assert x == y, f"{name}: {x} and {y}"

    for field in fields(a):
        compare(getattr(a, field.name), getattr(b, field.name), field.name)


@pytest.mark.parametrize("features", ["plain", "window+sinks+softcap+bias+others", "gate+row_scale"])
@pytest.mark.parametrize(("screen", "certificate"), [(0.0, 1.0), (1e-3, 1.0), (3e-2, 0.02)])
def test_attention(
    features: str, screen: float, certificate: float, make_attention_task: Callable[..., AttentionTask]
) -> None:
    task = make_attention_task(features, tokens=203)
    task = replace(task, screen=screen, max_certificate=certificate, keep=1e-3)
    torch.set_num_threads(1)
    want = cpp_backend.attention_contributions(task)
    assert (want.reevaluated > 0) == (certificate < 1), "rows that are screened twice are among them"
    for threads in (2, 3):
        torch.set_num_threads(threads)
        same_bits(cpp_backend.attention_contributions(task), want)
    # from "a few rows at a time, halved when their records do not fit" to "all at once"
    for workspace in (0, 1 << 12, 1 << 16, 1 << 20, 1 << 30):
        same_bits(cpp_backend.attention_contributions(replace(task, workspace=workspace)), want)


@pytest.mark.parametrize("screen", [0.0, 1e-3])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("neurons", [300, 600])  # 600: turned tile by tile for one thread only
def test_neurons(
    neurons: int, stored: bool, screen: float, make_neuron_task: Callable[..., NeuronTask]
) -> None:
    task = replace(make_neuron_task(features="row_scale+bias+others", neurons=neurons), screen=screen)
    if stored:
        task = replace(task, w_down=task.w_down.t().contiguous().t())
    torch.set_num_threads(1)
    want = cpp_backend.neuron_contributions(task)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        same_bits(cpp_backend.neuron_contributions(task), want)
    for workspace in (0, 1 << 16, 1 << 30):
        same_bits(cpp_backend.neuron_contributions(replace(task, workspace=workspace)), want)


def test_rows_do_not_depend_on_later_rows(make_attention_task: Callable[..., AttentionTask]) -> None:
    task = make_attention_task("sinks", tokens=50)
    a = task.attention
    short = replace(
        task,
        attention=replace(a, q=a.q[:, :33], k=a.k[:, :33], v=a.v[:, :33]),
        resid_pre=task.resid_pre[:33],
        whole=task.whole[:33],
    )
    whole, part = cpp_backend.attention_contributions(task), cpp_backend.attention_contributions(short)
    assert torch.equal(whole.edges[:33, :33], part.edges)
    assert torch.equal(whole.per_head[:33], part.per_head)


def test_every_output_is_written(
    make_attention_task: Callable[..., AttentionTask],
    make_neuron_task: Callable[..., NeuronTask],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs are allocated full of NaN here; none may be left."""
    attention, neurons = make_attention_task("bias+others"), make_neuron_task()
    want = cpp_backend.attention_contributions(attention), cpp_backend.neuron_contributions(neurons)
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)
    same_bits(cpp_backend.attention_contributions(attention), want[0])
    same_bits(cpp_backend.neuron_contributions(neurons), want[1])


def test_strides_do_not_matter(make_attention_task: Callable[..., AttentionTask]) -> None:
    task = make_attention_task("float mask")
    a = task.attention
    strided = replace(
        a,
        q=a.q.transpose(0, 1).contiguous().transpose(0, 1),
        w_o=a.w_o.mT.contiguous().mT,
        mask=a.mask.expand(a.heads, -1, -1) if a.mask is not None else None,
    )
    same_bits(
        cpp_backend.attention_contributions(replace(task, attention=strided)),
        cpp_backend.attention_contributions(task),
    )


@pytest.mark.parametrize("neurons", [600, 150, 16])  # whole strips and what is left of them
def test_weights_of_linear_layers_have_the_bits_of_weights_by_neurons(
    make_neuron_task: Callable[..., NeuronTask], neurons: int
) -> None:
    """W_down [D, F] is read as it is stored; the copy by neurons is the kernel's own to write."""
    from lmtt import _C

    task = make_neuron_task(neurons=neurons)
    stored = replace(task, w_down=task.w_down.t().contiguous().t())
    assert not stored.w_down.is_contiguous()
    for isa in _C.info()["available"]:
        _C.set_isa(isa)
        for screen in (0.0, 0.02):
            same_bits(
                cpp_backend.neuron_contributions(replace(stored, screen=screen)),
                cpp_backend.neuron_contributions(replace(task, screen=screen)),
            )
