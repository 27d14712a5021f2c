"""One figure of streaming: `python benchmarks/streaming_measure.py JSON` prints it as JSON on the last line.

Memory is the peak of RssAnon + RssShmem, sampled, above what it was when loading began: pages of files do not
count, the system takes those back when it likes. Bytes are /proc/self/io's: `rchar` all that was read by
calls, `read_bytes` what came from a disk.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

SAMPLE_SECONDS = 0.002
REQUEST = 8 << 20  # bytes that the sequential read asks for at once
ROUTE_THRESHOLD = 0.01
HEAD_ROWS = 8192  # of the unembedding that are measured: about as many bytes as a matrix of a layer
CALLS = 3  # of each product and each dequantisation


@dataclass(frozen=True)
class Figure:
    """What to measure."""

    what: str  # ours | disk | plain | large | rates | read
    path: str
    tokens: int
    threads: int
    memory: str = ""  # our limit


# --- instruments -------------------------------------------------------------------------------------------


def status_bytes(*names: str) -> int:
    """Lines of /proc/self/status, summed."""
    text = Path("/proc/self/status").read_text()
    return sum(1024 * int(n) for name in names for n in re.findall(rf"^{name}:\s+(\d+) kB", text, re.M))


def io_bytes() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().split("\n")
    return {name: int(value) for name, value in (line.split(": ") for line in lines if line)}


class Peak:
    """The most that RssAnon + RssShmem was above its value at the start, and the most that was resident.

    Sampled, since whoever measures memory within the run may set the system's own mark (VmHWM) back.
    """

    def __init__(self) -> None:
        self.start = self.most = status_bytes("RssAnon", "RssShmem")
        self.resident = status_bytes("VmHWM")
        self._over = threading.Event()

    @property
    def above(self) -> int:
        return self.most - self.start

    @contextmanager
    def watched(self) -> Iterator[None]:
        def watch() -> None:
            while not self._over.wait(SAMPLE_SECONDS):
                self.most = max(self.most, status_bytes("RssAnon", "RssShmem"))
                self.resident = max(self.resident, status_bytes("VmHWM"))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()


def measured(load: Callable[[], Any], run: Callable[[Any], Any]) -> tuple[dict[str, Any], Any, Any]:
    """Load, run, and what both took."""
    peak, before, start = Peak(), io_bytes(), time.perf_counter()
    with peak.watched():
        loaded = load()
        loaded_at = time.perf_counter()
        result = run(loaded)
        end = time.perf_counter()
    after = io_bytes()
    figures = {
        "seconds": {"load": loaded_at - start, "run": end - loaded_at, "total": end - start},
        "peak_above_load": peak.above,
        "peak_rss": peak.resident,
        "rchar": after["rchar"] - before["rchar"],
        "read_bytes": after["read_bytes"] - before["read_bytes"],
    }
    return figures, loaded, result


def prompt(tokens: int, vocabulary: int) -> Any:
    """Token 0, which the synthetic models have an attention sink for, and random ones."""
    rest = np.random.default_rng(0).integers(1, vocabulary, tokens - 1)
    return np.concatenate([[0], rest])


def vocabulary_of(path: str) -> int:
    return int(json.loads((Path(path) / "config.json").read_text())["vocab_size"])


# --- the model of a folder, three ways ---------------------------------------------------------------------


def measure_ours(figure: Figure) -> dict[str, Any]:
    """lmtt within a limit: load and trace, attribution included."""
    import lmtt

    ids = prompt(figure.tokens, vocabulary_of(figure.path))
    figures, engine, trace = measured(
        lambda: lmtt.load(figure.path, memory=figure.memory or None),
        lambda engine: engine.trace(input_ids=ids),
    )
    assert np.isfinite(trace.data.resid_pre).all()
    return {**figures, "streamed": not engine._weights.resident, "phases": dict(trace.cost["seconds"])}


def measure_disk(figure: Figure) -> dict[str, Any]:
    """accelerate's disk offload as transformers sets it up: load and one forward."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        return _transformers(figure, device_map={"": "disk"}, offload_folder=scratch)


def measure_plain(figure: Figure) -> dict[str, Any]:
    """from_pretrained as it is: load and one forward."""
    return _transformers(figure)


def _transformers(figure: Figure, **options: Any) -> dict[str, Any]:
    import transformers

    ids = torch.from_numpy(prompt(figure.tokens, vocabulary_of(figure.path)))[None]

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            figure.path, dtype=torch.float32, **options
        ).eval()

    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    figures, _, logits = measured(load, run)
    assert torch.isfinite(logits).all()
    return figures


# --- the large one -----------------------------------------------------------------------------------------


def measure_large(figure: Figure) -> dict[str, Any]:
    """A GGUF file within a limit: is the result complete, and how long does each layer take?"""
    import lmtt

    starts: list[float] = []

    def run(engine: Any) -> Any:
        starts.append(time.perf_counter())
        ids = prompt(figure.tokens, engine.info.d_vocab)
        return engine.trace(input_ids=ids, progress=lambda *_: starts.append(time.perf_counter()))

    figures, engine, trace = measured(lambda: lmtt.load(figure.path, memory=figure.memory), run)
    data, info, T = trace.data, engine.info, figure.tokens
    pairs = info.n_layers * info.n_heads * T * (T + 1) // 2
    route = trace.route(threshold=ROUTE_THRESHOLD)
    return {
        **figures,
        "streamed": not engine._weights.resident,
        "layers": info.n_layers,
        "processor_seconds": sum(os.times()[:2]),
        "system_seconds": os.times()[1],
        "layer_seconds": [float(x) for x in np.diff(starts)],
        "phases": dict(trace.cost["seconds"]),
        "overlap": trace.cost.get("overlap"),
        "finite": bool(np.isfinite(data.resid_pre).all() and np.isfinite(data.edges.weight).all()),
        "rms": [float(np.sqrt(np.mean(np.square(state)))) for state in data.resid_pre],
        "closure": trace.cost["closure"],
        "checksum": trace.data.meta["closure"]["checksum"],
        "survivors": trace.cost["pairs"]["evaluated"] / pairs,
        "rows_reevaluated": trace.cost["rows_reevaluated"],
        "edges": len(data.edges.weight),
        "edges_by_layer": np.diff(data.edges.layer_ptr).tolist(),
        "row_sums_off_by": _rows_off_by(data),
        "route_edges": len(route.edges),
        "result_bytes": int(data.resid_pre.nbytes),
    }


def _rows_off_by(data: Any) -> float:
    """The most by which a row's shares (edges, residual, bias, rest) miss 1."""
    L, T = data.residual.shape
    total = (data.residual + data.bias + data.rest).astype(np.float64)
    layer = np.repeat(np.arange(L), np.diff(data.edges.layer_ptr))
    np.add.at(total, (layer, data.edges.destination), data.edges.weight)
    assert total.shape == (L, T)
    return float(np.abs(total - 1).max())


def measure_read(figure: Figure) -> dict[str, Any]:
    """Plain sequential reads of the whole file, from the disk."""
    buffer = memoryview(bytearray(REQUEST))
    size, start = Path(figure.path).stat().st_size, time.perf_counter()
    fd = os.open(figure.path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    done = 0
    while got := os.preadv(fd, [buffer], done):
        os.posix_fadvise(fd, done, got, os.POSIX_FADV_DONTNEED)
        done += got
    os.close(fd)
    assert done == size
    return {"bytes": done, "seconds": time.perf_counter() - start}


def measure_rates(figure: Figure) -> dict[str, Any]:
    """Dequantising one layer and the unembedding, and their products with T rows, each alone."""
    import transformers

    from lmtt.checkpoint.gguf_lend import fast_reader
    from lmtt.checkpoint.gguf_source import open_gguf
    from lmtt.kernels.host_memory import anonymous

    path = Path(figure.path)
    with fast_reader():
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    source = open_gguf(path, config)
    layer = [name for name, info in source.tensors.items() if ".layers.1." in name and len(info.shape) == 2]
    room = anonymous(max(4 * math.prod(source.tensors[name].shape) for name in layer))
    total = {"dequantise": 0.0, "multiply": 0.0}
    for name in layer:
        for part, seconds in _tensor(source, name, figure.tokens, room, None).items():
            total[part] += seconds
    head = "lm_head.weight"
    rows = source.tensors[head].shape[0]
    tile = min(rows, HEAD_ROWS)
    for part, seconds in _tensor(source, head, figure.tokens, room, range(tile)).items():
        total[f"head {part}"] = seconds * rows / tile
    return {"seconds": total, "flop": 2 * figure.tokens * _elements(source, layer)}


def _elements(source: Any, names: list[str]) -> int:
    return sum(math.prod(source.tensors[name].shape) for name in names)


def _tensor(source: Any, name: str, tokens: int, room: Any, rows: range | None) -> dict[str, float]:
    info = source.tensors[name]
    shape = info.shape if rows is None else (len(rows), *info.shape[1:])
    nbytes = info.nbytes if rows is None else info.nbytes // info.shape[0] * len(rows)
    raw = torch.empty(nbytes, dtype=torch.uint8)
    source.read_into(name, raw.numpy().data)
    out = room[: 4 * math.prod(shape)].view(torch.float32).view(shape)
    x = torch.randn(1, tokens, shape[1])
    return {
        "dequantise": _median(lambda: source.decode(name, raw, out, rows)),
        "multiply": _median(lambda: torch.nn.functional.linear(x, out)),
    }


def _median(call: Callable[[], Any]) -> float:
    call()
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


FIGURES: dict[str, Callable[[Figure], dict[str, Any]]] = {
    "ours": measure_ours,
    "disk": measure_disk,
    "plain": measure_plain,
    "large": measure_large,
    "rates": measure_rates,
    "read": measure_read,
}


def import_all() -> None:
    """What loading would import, which is the start of a program and not a part of loading."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import lmtt.engine  # noqa: F401


def main() -> None:
    figure = Figure(**json.loads(sys.argv[1]))
    import_all()
    torch.set_num_threads(figure.threads)
    print(json.dumps(FIGURES[figure.what](figure)))


if __name__ == "__main__":
    main()
