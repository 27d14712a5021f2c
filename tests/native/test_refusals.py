"""What does not fit is refused in words, before any memory is touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lmtt.errors import InputError
from lmtt.kernels.backends import cpp_backend
from lmtt.kernels.types import AttentionTask, NeuronTask

pytestmark = pytest.mark.native


def test_available_says_what_it_runs() -> None:
    from lmtt import _C

    assert cpp_backend.available() is None
    info = _C.info()
    assert info["isa"] in info["available"]
    assert "portable" in info["available"]


def test_unknown_instruction_set_names_the_known() -> None:
    from lmtt import _C

    with pytest.raises(ValueError, match=r"auto, .*portable, got sse9"):
        _C.set_isa("sse9")


def test_refuses_what_it_cannot_do(make_attention_task: Callable[..., AttentionTask]) -> None:
    task = make_attention_task()
    assert cpp_backend.refuses("attention_contributions", task) is None
    assert "l2" in str(cpp_backend.refuses("attention_contributions", replace(task, measure="l2")))
    wide = replace(task, whole=task.whole.double())
    assert "float64" in str(cpp_backend.refuses("attention_contributions", wide))
    assert "does not implement" in str(cpp_backend.refuses("unembed_topk", task))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("q", lambda x: x[:, :-1]),
        ("k", lambda x: x[:, :-1]),
        ("k", lambda x: x[:2]),
        ("k", lambda x: x[..., :-1]),
        ("v", lambda x: x[:, 1:]),
        ("w_o", lambda x: x[:-1]),
        ("w_o", lambda x: x[:, :-1]),
        ("w_o", lambda x: x.double()),
    ],
)
def test_attention_operands_that_do_not_fit(
    field: str, change: Callable[[Any], Any], make_attention_task: Callable[..., AttentionTask]
) -> None:
    task = make_attention_task()
    broken = replace(task.attention, **{field: change(getattr(task.attention, field))})
    with pytest.raises(InputError, match="expected"):
        cpp_backend.attention_contributions(replace(task, attention=broken))


def test_neuron_operands_that_do_not_fit(make_neuron_task: Callable[..., NeuronTask]) -> None:
    task = make_neuron_task()
    for field in ("w_down", "base", "whole"):
        with pytest.raises(InputError, match="expected"):
            cpp_backend.neuron_contributions(replace(task, **{field: getattr(task, field)[:-1]}))
    for k in (0, task.act.shape[1] + 1):
        with pytest.raises(InputError, match="number of neurons"):
            cpp_backend.neuron_contributions(replace(task, k=k))


def test_the_extension_checks_again(make_neuron_task: Callable[..., NeuronTask]) -> None:
    """Called past cpp_backend, with one argument wrong at a time: no crash, an error that names it."""
    from lmtt import _C

    task, rows = make_neuron_task(), 37
    good: dict[str, Any] = {
        "act": task.act.numpy(), "w_down": task.w_down.numpy(), "stored": None,
        "base": task.base.numpy(), "whole": task.whole.numpy(), "bias": None, "others": [],
        "row_scale": None, "k": 3, "screen": 0.0, "workspace": 1 << 20, "threads": 1,
        "index": torch.empty(rows, 3, dtype=torch.int64).numpy(),
        "value": torch.empty(rows, 3).numpy(), "out_others": torch.empty(rows, 0).numpy(),
    }  # fmt: skip
    good |= {
        n: torch.empty(rows).numpy()
        for n in ("out_residual", "out_bias", "normaliser", "certificate", "checksum")
    }
    _C.neurons(**good)
    read_only = good["value"].copy()
    read_only.flags.writeable = False
    wrong: dict[str, list[Any]] = {
        "act": [good["act"][:, :5], good["act"].astype("float64"), good["act"][0], 12345, None],
        "w_down": [good["w_down"][:, ::2], good["w_down"][:7]],
        "stored": [good["w_down"], good["w_down"].T],  # neither its shape nor dense
        "whole": [good["whole"][:, :-1], good["whole"][::-1]],
        "others": [[good["whole"][:3]]],
        "value": [read_only, good["value"][:, :2]],
        "index": [good["value"]],
        "k": [0, 10**6, "three"],
        "threads": [0, -1, 10**9],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError, BufferError, RuntimeError)):
                _C.neurons(**(good | {name: value}))
    for name in good:
        with pytest.raises(TypeError, match=name):
            _C.neurons(**{key: value for key, value in good.items() if key != name})
