"""Random traces with every array of the format in use, and snapshots of what a run left on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmtt.run.data import Edges, Neurons, Predictions, TraceData

RESID = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32, "float64": np.float64}


def build_trace(
    seed: int = 0, L: int = 3, T: int = 5, D: int = 8, resid_dtype: str | None = "bfloat16"
) -> TraceData:
    """A random trace; `resid_dtype=None` keeps it light. Layer 1 has no edges, some edges have no heads."""
    rng = np.random.default_rng(seed)
    counts, destination, source, heads_of, head = [], [], [], [], []
    for layer in range(L):
        pairs = [(i, j) for i in range(T) for j in range(i + 1) if layer != 1 and rng.random() < 0.5]
        counts.append(len(pairs))
        for i, j in pairs:
            kept = np.flatnonzero(rng.random(4) < 0.4)
            destination.append(i)
            source.append(j)
            heads_of.append(len(kept))
            head.extend(kept)

    def share(*shape: int) -> np.ndarray:
        return rng.random(shape, dtype=np.float32)

    resid = None
    if resid_dtype == "bfloat16":
        resid = rng.integers(0, 1 << 16, (L + 1, T, D), dtype=np.uint16)  # all bit patterns, NaN payloads too
    elif resid_dtype is not None:
        resid = rng.standard_normal((L + 1, T, D)).astype(RESID[resid_dtype])
    meta = {"model": {"name": "random"}, "floor": 1e-3, "note": "naïve \u202e \x1b[31m \ud800"}
    if resid_dtype is not None:
        meta["resid_dtype"] = resid_dtype
    return TraceData(
        tokens=tuple(["the", " capital", "\x00", "\ud800", "<script>"][t % 5] for t in range(T)),
        input_ids=rng.integers(0, 50_000, T, dtype=np.int64),
        parallel=rng.random(L) < 0.5,
        residual=share(L, T),
        mlp=share(L, T),
        passthrough=share(L, T),
        bias=share(L, T),
        opaque=share(L, T),
        rest=share(L, T),
        certificate=share(L, T),
        edges=Edges(
            layer_ptr=np.cumsum([0, *counts], dtype=np.int64),
            destination=np.array(destination, np.int32),
            source=np.array(source, np.int32),
            weight=share(len(source)),
            head_ptr=np.cumsum([0, *heads_of], dtype=np.int64),
            head=np.array(head, np.int32),
            head_weight=share(len(head)),
        ),
        neurons=Neurons(
            index=rng.integers(-1, 100, (L, T, 4), dtype=np.int32),
            contribution=share(L, T, 4),
            activation=rng.standard_normal((L, T, 4)).astype(np.float32),
            certificate=share(L, T),
        ),
        predictions=Predictions(
            token_id=rng.integers(0, 50_000, (T, 6), dtype=np.int32),
            logit=-np.sort(-rng.standard_normal((T, 6)).astype(np.float32)),
            logsumexp=share(T) + 9,
        ),
        resid_pre=resid,
        meta=meta,
        cost={"seconds": {"trace": 0.25}, "host": "here"},
    )


def flatten(data: TraceData) -> dict[str, object]:
    """Every array as (type, shape, bytes) and every other field, for comparison to the bit."""

    def walk(prefix: str, value: object) -> dict[str, object]:
        if isinstance(value, np.ndarray):
            return {prefix: (value.dtype.str, value.shape, value.tobytes())}
        if hasattr(value, "__dataclass_fields__"):
            return {
                k: v
                for f in value.__dataclass_fields__
                for k, v in walk(f"{prefix}.{f}", getattr(value, f)).items()
            }
        return {prefix: value}

    return walk("", data)


@pytest.fixture
def make_trace() -> Callable[..., TraceData]:
    return build_trace


@pytest.fixture
def bits() -> Callable[[TraceData], dict[str, object]]:
    return flatten


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """All files of a directory with their content."""
    return lambda path: {file.name: file.read_bytes() for file in sorted(path.iterdir())}
