"""The CUDA library is called with the tensors' device current; here one that records is in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmtt.kernels import cuda_library

STREAM = 77


class Recorder:
    """In the library's place: what was called, how the calls ended, and what was current then."""

    def __init__(self, code: int) -> None:
        self.code, self.current, self.calls = code, "nothing", list[tuple[str, Any, int]]()

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, str(device)
        try:
            yield
        finally:
            self.current = before

    def lmtt_cuda_error(self, _code: int) -> bytes:
        return b"out of order"

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, self.current, arguments[-1]))
            return self.code

        return call


def recorder(monkeypatch: pytest.MonkeyPatch, code: int = 0) -> Recorder:
    found = Recorder(code)
    monkeypatch.setattr(cuda_library, "library", lambda: found)
    monkeypatch.setattr(torch.cuda, "device", found.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=STREAM))
    return found


def test_the_tensors_device_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    found = recorder(monkeypatch)
    y = torch.ones(2, 64)
    cuda_library.compact(torch.zeros(0, 4, dtype=torch.int32))
    smallest = cuda_library.block_smallest(y)
    index = torch.zeros(3, dtype=torch.int32)
    cuda_library.evaluate(y, y, smallest, index, index, torch.ones(3), torch.ones(3))
    names = ["lmtt_cuda_count", "lmtt_cuda_list", "lmtt_cuda_block_smallest", "lmtt_cuda_evaluate"]
    assert found.calls == [(name, str(y.device), STREAM) for name in names]
    assert found.current == "nothing"


def test_a_failed_call_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder(monkeypatch, code=3)
    with pytest.raises(RuntimeError, match="CUDA: out of order"):
        cuda_library.block_smallest(torch.ones(2, 64))
