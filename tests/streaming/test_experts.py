"""Of a mixture of experts, only those that the prompts are routed to are read; the results do not know it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lmtt
from lmtt.run.layout import pack

Make = Callable[[str], Path]
PROMPTS = [np.array([3, 3]), np.array([5, 60])]  # short: four experts, two of them for each token


def routed(model: Any, prompts: list[Any]) -> dict[str, set[int]]:
    """The experts that a resident model's own forward uses, by the name of their module."""
    seen: dict[str, set[int]] = defaultdict(set)
    hooks = []
    for name, module in model.named_modules():
        if hasattr(module, "num_experts") and any(p.dim() == 3 for p in module.parameters(recurse=False)):

            def note(_module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                indices = [a for a in (*args, *kwargs.values()) if not a.is_floating_point()]
                seen[name] |= set(indices[0].flatten().tolist())

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    for ids in prompts:
        with torch.no_grad():
            model(torch.from_numpy(ids)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.usefixtures("always_streamed")
@pytest.mark.parametrize(
    ("name", "packed"),
    [("mixtral", False), ("qwen2_moe", False), ("deepseek_v3", False), ("gpt_oss", True)],
)
def test_bytes_of_routed_experts_only(checkpoint: Make, name: str, packed: bool) -> None:
    folder = checkpoint(name)
    resident = lmtt.load(str(folder))
    streamed = lmtt.load(str(folder), memory="120MiB")
    for prompts in ([PROMPTS[0]], [PROMPTS[1]]):
        before = streamed._weights.bytes_read
        got = [streamed.trace(input_ids=ids) for ids in prompts]
        read = streamed._weights.bytes_read - before
        for ids, trace in zip(prompts, got, strict=True):
            want = resident.trace(input_ids=ids)
            ours, theirs = pack(trace.data), pack(want.data)
            assert ours.keys() == theirs.keys()
            for key in ours:
                np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
            assert np.isfinite(trace.data.resid_pre).all()
        tensors = streamed._weights._source.tensors
        ahead = sum(tensors[t].nbytes for unit in streamed._weights._ahead for t in unit.tensors)
        expected = 0
        for ids in prompts:
            use = routed(resident.model, [ids])
            assert use
            assert any(len(experts) < 4 for experts in use.values())
            expected += ahead
            for layer in streamed._weights._experts:
                for experts in layer:
                    assert bool(experts.packed) is packed
                    used = use[experts.module]
                    expected += sum(tensors[t].nbytes // experts.count * len(used) for t in experts.packed)
                    expected += sum(tensors[t].nbytes for t, (_, n) in experts.single.items() if n in used)
        assert read == expected


@pytest.mark.usefixtures("always_streamed")
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_prompts_of_a_list_read_the_union(checkpoint: Make, name: str) -> None:
    folder = checkpoint(name)
    resident = lmtt.load(str(folder))
    streamed = lmtt.load(str(folder), memory="120MiB")
    prompts = PROMPTS
    before = streamed._weights.bytes_read
    got = streamed.trace(input_ids=np.stack(prompts))
    read = streamed._weights.bytes_read - before
    for ids, trace in zip(prompts, got, strict=True):
        ours, theirs = pack(trace.data), pack(resident.trace(input_ids=ids).data)
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    use, tensors = routed(resident.model, prompts), streamed._weights._source.tensors
    expected = sum(tensors[t].nbytes for unit in streamed._weights._ahead for t in unit.tensors)
    for layer in streamed._weights._experts:
        for experts in layer:
            used = use[experts.module]
            expected += sum(tensors[t].nbytes // experts.count * len(used) for t in experts.packed)
            expected += sum(tensors[t].nbytes for t, (_, n) in experts.single.items() if n in used)
    assert read == expected


@pytest.mark.usefixtures("always_streamed")
def test_experts_of_another_form_are_read_whole(checkpoint: Make) -> None:
    engine = lmtt.load(str(checkpoint("llama4")), memory="120MiB")  # one batched product over all of them
    assert not any(engine._weights._experts)
