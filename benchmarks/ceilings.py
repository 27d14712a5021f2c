"""What this machine can do at most, beside which times of kernels are judged.

    python benchmarks/ceilings.py [--threads N] [--seconds S] [--json]

Prints, for one thread and for N: multiply-adds in registers (float32 lanes per second, by `lmtt._C`), torch's
own matrix product, and memory bandwidth (reading and copying an array far larger than any cache). Each figure
is the best of repeated short runs, since anything else running on the machine only ever makes them worse.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from lmtt import _C

ARRAY_BYTES = 256 << 20
GEMM = 1024  # rows, columns and depth of torch's product


def best_rate(work: Callable[[], float], seconds: float) -> float:
    """Largest amount per second that `work` (which returns the amount done) reached within `seconds`."""
    work()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        amount = work()
        best = max(best, amount / (time.perf_counter() - start))
    return best


def measure(threads: int, seconds: float) -> dict[str, float]:
    """Billions per second: multiply-adds of registers and of torch.mm, bytes read and copied."""
    torch.set_num_threads(threads)
    a, b, c = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM), torch.empty(GEMM, GEMM)
    source = torch.ones(ARRAY_BYTES // 4)
    target = torch.empty_like(source)

    def registers() -> float:
        # Long enough for a thread that begins on the other's processor to be moved: bursts showed one's rate
        return float(_C.multiply_adds(20_000_000, threads)[0])

    def product() -> float:
        torch.mm(a, b, out=c)
        return float(GEMM**3)

    def read() -> float:
        source.sum()
        return float(ARRAY_BYTES)

    def copy() -> float:
        target.copy_(source)
        return 2.0 * ARRAY_BYTES  # read and written

    return {
        "multiply_adds": best_rate(registers, seconds) / 1e9,
        "torch_mm": best_rate(product, seconds) / 1e9,
        "bytes_read": best_rate(read, seconds) / 1e9,
        "bytes_copied": best_rate(copy, seconds) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="per figure")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    info = _C.info()
    results = {n: measure(n, options.seconds) for n in sorted({1, options.threads})}
    if options.json:
        print(json.dumps({"native": info, "by_threads": results}))
        return
    print(f"lmtt._C: {info['isa']} of {', '.join(info['available'])}; threads: {info['threads']}")
    print("threads | G multiply-adds/s: registers, torch.mm | GB/s: read, copied")
    for threads, r in results.items():
        print(
            f"{threads:7d} | {r['multiply_adds']:27.1f} {r['torch_mm']:9.1f}"
            f" | {r['bytes_read']:10.1f} {r['bytes_copied']:7.1f}"
        )


if __name__ == "__main__":
    main()
