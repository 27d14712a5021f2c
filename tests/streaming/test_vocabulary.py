"""The unembedding is read once for a prompt, whether there is room to keep it or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import lmtt
from lmtt.checkpoint.safetensors_source import open_safetensors
from lmtt.streaming import vocabulary
from lmtt.streaming.vocabulary import StoredRows

Make = Callable[[str], Path]


@pytest.mark.usefixtures("always_streamed")
@pytest.mark.parametrize("room", [True, False])
def test_the_unembedding_is_read_once(checkpoint: Make, monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    sampled = 8
    monkeypatch.setattr(vocabulary, "SAMPLED_ROWS", sampled)
    if not room:
        monkeypatch.setattr(StoredRows, "keep", lambda _self: None)
    resident = lmtt.load(str(checkpoint("llama")))
    engine = lmtt.load(str(checkpoint("llama")), memory="110MiB")
    source, head = engine._weights._source, engine._weights._unembedding
    read: Counter[str] = Counter()
    original = source.read_into

    def counted(tensor: str, raw: memoryview, start: int = 0) -> None:
        read[tensor] += raw.nbytes
        original(tensor, raw, start)

    monkeypatch.setattr(source, "read_into", counted)
    got = engine.trace(input_ids=[5, 9, 2])
    want = resident.trace(input_ids=[5, 9, 2])
    np.testing.assert_array_equal(got.data.predictions.token_id, want.data.predictions.token_id)
    np.testing.assert_array_equal(got.data.predictions.logit, want.data.predictions.logit)
    rows, size = source.tensors[head].shape[0], source.tensors[head].nbytes
    looks = 0 if room else 2 * sampled * size // rows  # to find out how logits are made, and to verify it
    assert read[head] == size + looks


def test_ranges_in_turn_share_memory_and_single_rows_do_not(checkpoint: Make) -> None:
    path = checkpoint("llama")
    source = open_safetensors(path)
    rows = StoredRows(source, "lm_head.weight", torch.float32, torch.device("cpu"))
    want = transformers.AutoModelForCausalLM.from_pretrained(path).lm_head.weight.detach()
    with rows.in_turn():
        first = rows[0:7]
        assert torch.equal(first, want[0:7])
        second = rows[7:12]
        assert torch.equal(second, want[7:12])
        assert second.data_ptr() == first.data_ptr()
        assert torch.equal(rows[3:40], want[3:40])  # more than there was room for
        assert torch.equal(rows[torch.tensor([9, 2, 9])], want[[9, 2, 9]])
    apart = [rows[0:7], rows[7:12]]
    assert torch.equal(apart[0], want[0:7])
    assert torch.equal(apart[1], want[7:12])
