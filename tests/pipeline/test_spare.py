"""The buffer of a result goes to the next one, and never while anybody can still see the first."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import lmtt
from lmtt.kernels import host_memory
from lmtt.testing_models import tiny_model

IDS = (list(range(3, 15)), list(range(23, 35)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_is_kept_as_long_as_a_view_of_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "LARGE", 1)
    engine = lmtt.load(tiny_model("llama", dtype=dtype))
    first = engine.trace(input_ids=IDS[0]).data.resid_pre
    assert first is not None
    place, view = first.ctypes.data, torch.from_numpy(first[1:][0][:3])
    before = view.clone()
    del first
    gc.collect()
    second = engine.trace(input_ids=IDS[1]).data.resid_pre
    assert second is not None
    assert second.ctypes.data != place
    assert torch.equal(view, before)
    del view
    gc.collect()
    third = engine.trace(input_ids=IDS[0]).data.resid_pre
    assert third is not None
    assert third.ctypes.data == place
    assert np.array_equal(third[1][:3], before.numpy())


def test_too_small_a_buffer_and_too_large_a_one_are_not_kept() -> None:
    spare = host_memory.Spare()
    for nbytes in (host_memory.LARGE - 1, spare.MOST + 1):
        assert spare.empty((nbytes,), torch.uint8)[1] is None
    least = host_memory.LARGE
    buffer, memory = spare.empty((least,), torch.uint8)
    assert memory is not None
    place, holder = buffer.data_ptr(), buffer.numpy()
    spare.back_after(holder, memory)
    del buffer, holder, memory
    gc.collect()
    assert spare.empty((2 * least,), torch.uint8)[0].data_ptr() != place


def test_nothing_is_kept_under_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(host_memory, "LARGE", 1)
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    engine = lmtt.load(str(tmp_path), memory="1GiB", device="cpu")
    monkeypatch.setattr(host_memory.Spare, "empty", None)  # calling it would raise
    assert engine.trace(input_ids=IDS[0]).data.resid_pre is not None
