"""Writes real activations for gpu_bench.py: two layers of the demo model on one text, in bfloat16.

    python benchmarks/gpu_capture.py [--tokens T] [--out FOLDER]

On any machine that has the demo model; the files (45 MB at 2048 tokens) are then carried to the one with the
GPU, as build/gpu-activations in the checkout. gpu_bench.py measures them where they are there.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from cases import capture, sampled_layers, save, token_ids
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "build/gpu-activations"
MOST_BYTES = 60 << 20


def halved(x: Any) -> Any:
    """Every floating tensor in bfloat16."""
    if isinstance(x, Tensor):
        return x.bfloat16() if x.is_floating_point() else x
    if isinstance(x, tuple):
        return tuple(halved(y) for y in x)
    if hasattr(x, "__dataclass_fields__"):
        return replace(x, **{f.name: halved(getattr(x, f.name)) for f in fields(x)})
    return x


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--model", help="another model than the demo's")
    options = parser.parse_args()
    import lmtt

    engine = lmtt.load(options.model, device="cpu") if options.model else lmtt.load(device="cpu")
    first, _, last = sampled_layers(engine.info.n_layers)
    options.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for case in capture(engine, token_ids(engine, options.tokens), (first, last)):
            save(replace(halved(case), flashtrace=None), options.out / f"layer-{case.layer:03}.safetensors")
    written = sum(path.stat().st_size for path in options.out.glob("*.safetensors"))
    print(f"{written / 1e6:.1f} MB in {options.out}")
    if written > MOST_BYTES:
        raise SystemExit(f"more than {MOST_BYTES >> 20} MiB: take fewer --tokens")


if __name__ == "__main__":
    main()
