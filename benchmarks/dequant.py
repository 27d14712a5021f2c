"""How fast stored blocks of weights become floats.

    python benchmarks/dequant.py [--threads N] [--seconds S] [--mib SIZE] [--json]

For each format, dtype and instruction set: billions of bytes of output per second into memory that exists,
the best of repeated runs (anything else that runs only makes them worse). Beside them stands what
copying costs here, as bytes written per second: no decoder that writes to memory is faster.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from lmtt import _C

DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16}


def best_rate(work: Callable[[], object], amount: float, seconds: float) -> float:
    """Most of `amount` per second that `work` reached within `seconds`, which include one run to warm up."""
    work()
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = max(best, amount / (now - start))
        if now >= end:
            return best


def decoding(name: str, dtype: str, threads: int, seconds: float, size: int) -> float:
    """Bytes of output per second, in GB/s, for about `size` bytes of it."""
    values, block = _C.block_formats()[name]
    kind = np.dtype(DTYPES[dtype])
    count = size // kind.itemsize // values
    blocks = np.random.default_rng(0).integers(0, 256, count * block, dtype=np.uint8)
    out = np.empty(count * values, kind)
    return best_rate(lambda: _C.dequantize(name, blocks, out, dtype, threads), out.nbytes / 1e9, seconds)


def copying(threads: int, seconds: float, size: int) -> float:
    """Bytes written per second, in GB/s."""
    torch.set_num_threads(threads)
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    return best_rate(lambda: target.copy_(source), size / 1e9, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure")
    parser.add_argument("--mib", type=int, default=64, help="output of one call, in MiB")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size = options.mib << 20
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for isa in _C.info()["available"]:
        _C.set_isa(isa)
        rates[isa] = {
            name: {dtype: decoding(name, dtype, options.threads, options.seconds, size) for dtype in DTYPES}
            for name in _C.block_formats()
        }
    copied = copying(options.threads, options.seconds, size)
    if options.json:
        print(json.dumps({"threads": options.threads, "copy": copied, "output": rates}, indent=2))
        return
    print(f"GB/s of output, {options.threads} threads; copying writes {copied:.1f}")
    for isa, formats in rates.items():
        print(f"{isa:>10}" + "".join(f"{dtype:>10}" for dtype in DTYPES))
        for name, row in formats.items():
            print(f"{name:>10}" + "".join(f"{row[dtype]:10.1f}" for dtype in DTYPES))


if __name__ == "__main__":
    main()
