"""A 70B-shaped model through 8 GiB of device memory: peak, and time against what its parts take alone.

    python benchmarks/gpu_stream.py [--layers N] [--tokens T] [--memory 8GiB] [--json FILE]

Random weights of Llama-3-70B's shape, fewer layers (`llama_file.py`; 4 bits where gguf is installed, else
bfloat16). They are streamed under the limit, which the allocator holds, and once more with everything
resident: that run's time is the compute. Reading the file from end to end and copying as many bytes over the
bus are timed alone; the file's pages are dropped before each read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_file
import numpy as np
import torch

WALL_LIMIT = 1.15  # of max(disk and bus, compute)
CHUNK = 64 << 20
GIB = 1 << 30


def read_seconds(path: Path) -> float:
    """Reading it from end to end, cold."""
    llama_file.drop(path)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(CHUNK)
        while file.readinto(buffer):
            pass
    return time.perf_counter() - begin


def bus_seconds(nbytes: int, device: str) -> float:
    """Copying as many bytes from pinned memory to the device."""
    if device == "cpu":
        return 0.0
    host = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(CHUNK, dtype=torch.uint8, device=device)
    there.copy_(host)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(8):
        there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * nbytes / (8 * CHUNK)


def traced(path: Path, device: str, memory: str | None, tokens: int, vocabulary: int) -> dict[str, Any]:
    """Load and trace once to warm up on a few tokens, and once for the figures."""
    import lmtt

    # Token 0 is what the synthetic models have an attention sink for.
    ids = np.concatenate([[0], np.random.default_rng(0).integers(1, vocabulary, tokens - 1)])
    engine = lmtt.load(path, device=device, memory=memory)
    engine.trace(input_ids=ids[:16])
    llama_file.drop(path)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    trace = engine.trace(input_ids=ids)
    seconds = time.perf_counter() - begin
    if not np.isfinite(trace.data.resid_pre).all():
        raise SystemExit("the residual stream is not finite")
    peak = 0 if device == "cpu" else torch.cuda.max_memory_reserved()
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "streamed": not engine._weights.resident,
        "phases": dict(trace.cost["seconds"]),
        "overlap": trace.cost["overlap"],
        "edges": len(trace.route(threshold=0.01).edges),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=llama_file.SHAPES, default="70b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument(
        "--folder", type=Path, help="for the file, which is deleted; default: a temporary one"
    )
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU: no measurement")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cuda"
    if options.dry_run:
        device, options.shape, options.layers, options.tokens = "cpu", "small", 2, 24
        options.memory = "64MiB"
    shape = replace(llama_file.SHAPES[options.shape], layers=options.layers)
    packed = importlib.util.find_spec("gguf") is not None
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / ("model.gguf" if packed else "model")
        kind = "Q4_0" if packed else "BF16"
        nbytes = llama_file.write(path, shape, kind, leave=0 if options.dry_run else 4 * 10**9)
        file = path if packed else path / "model.safetensors"
        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu: no measurement",
            "shape": options.shape, "layers": options.layers, "tokens": options.tokens, "stored as": kind,
            "bytes": nbytes, "memory": options.memory,
            "read_seconds": read_seconds(file), "bus_seconds": bus_seconds(nbytes, device),
            "streamed": traced(path, device, options.memory, options.tokens, shape.d_vocab),
            "resident": traced(path, device, None, options.tokens, shape.d_vocab),
        }  # fmt: skip
    parts = max(result["read_seconds"], result["bus_seconds"], result["resident"]["seconds"])
    wall, peak = result["streamed"]["seconds"], result["streamed"]["peak_bytes"]
    result["gates"] = [
        {"gate": "70B shape: wall / max(disk and bus, compute)", "got": wall / parts, "limit": WALL_LIMIT,
         "met": wall <= WALL_LIMIT * parts},
        {"gate": "70B shape: peak, GiB", "got": peak / GIB, "limit": 8.0, "met": peak <= 8 * GIB},
    ]  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
