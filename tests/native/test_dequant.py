"""Blocks of weights become what the format's own package makes of them, to the last bit."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

pytestmark = pytest.mark.native

FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGERS = {4: torch.int32, 2: torch.int16}


def native() -> Any:
    return import_module("lmtt._C")


def isas() -> list[str]:
    try:
        return list(native().info()["available"])
    except ImportError:  # the fixture skips these tests then
        return ["auto"]


def random_blocks(name: str, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Any bytes are blocks: scales are then subnormal, infinite and NaN as well."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    return np.random.default_rng(seed).integers(0, 256, count * size, dtype=np.uint8)


def reference(name: str, blocks: NDArray[np.uint8], dtype: str = "float32") -> Tensor:
    kind = gguf.GGMLQuantizationType[name]
    with np.errstate(all="ignore"):
        # in rows of one block, as its functions want them
        values = gguf.dequantize(blocks.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]), kind)
    return torch.from_numpy(values.reshape(-1).copy()).to(DTYPES[dtype])


def decode(name: str, blocks: NDArray[np.uint8], dtype: str = "float32", threads: int = 1) -> Tensor:
    """Decoded into the middle of a larger array, whose other elements must stay as they were."""
    values, size = native().block_formats()[name]
    n, around = len(blocks) // size * values, 19
    kind = np.float32 if dtype == "float32" else np.uint16
    room = np.full(n + 2 * around, 77, kind)
    native().dequantize(name, blocks, room[around : around + n], dtype, threads)
    assert (room[:around] == 77).all()
    assert (room[around + n :] == 77).all()
    return torch.from_numpy(room[around : around + n].copy()).view(DTYPES[dtype])


def same_bits(got: Tensor, want: Tensor) -> None:
    """Equal bit for bit, zeros' signs included; NaN where NaN is wanted, with any payload."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    integers = INTEGERS[want.element_size()]
    differs = (got.view(integers) != want.view(integers)) & ~(got.isnan() & want.isnan())
    at = differs.nonzero().flatten()[:3].tolist()
    assert not at, f"{len(differs)} values, {int(differs.sum())} differ; {at}: {got[at]} for {want[at]}"


def test_all_formats_are_there() -> None:
    kinds = native().block_formats()
    assert set(kinds) == set(FORMATS)
    for name, sizes in kinds.items():
        assert sizes == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_values_are_the_reference_s(name: str, dtype: str, isa: str) -> None:
    native().set_isa(isa)
    for count in (1, 2, 5, 16, 31, 1024):
        blocks = random_blocks(name, count, seed=count)
        same_bits(decode(name, blocks, dtype), reference(name, blocks, dtype))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_half(dtype: str, isa: str) -> None:
    """All 65,536: every exponent, every subnormal, both zeros, infinities; as values and as scales."""
    native().set_isa(isa)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    for name in ("F16", "BF16"):
        same_bits(decode(name, halves, dtype), reference(name, halves, dtype))
    scales = np.concatenate(
        [halves.reshape(-1, 2), np.full((1 << 16, 32), 1, np.uint8)], axis=1, dtype=np.uint8
    ).reshape(-1)
    same_bits(decode("Q8_0", scales, dtype), reference("Q8_0", scales, dtype))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding(dtype: str, isa: str) -> None:
    """Around every place where rounding changes its mind: ties, the last subnormal, the first overflow."""
    native().set_isa(isa)
    narrow = torch.arange(0, 1 << 15, dtype=torch.int16).view(DTYPES[dtype]).float()
    narrow = narrow[narrow.isfinite()]
    between = (narrow[1:].double() + narrow[:-1].double()).div(2).float()
    points = torch.cat([between, between.nextafter(narrow[1:]), between.nextafter(narrow[:-1]), narrow])
    big = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 3.3895e38, 3.4e38, torch.inf, torch.nan])
    values = torch.cat([points, -points, big, -big])
    same_bits(decode("F32", values.numpy().view(np.uint8), dtype), values.to(DTYPES[dtype]))


@pytest.mark.parametrize("name", FORMATS)
def test_any_number_of_threads(name: str) -> None:
    """Several pieces of work, and a last one that is not whole."""
    values = native().block_formats()[name][0]
    blocks = random_blocks(name, 5 * (1 << 16) // values + 3)
    for dtype in DTYPES:
        want = decode(name, blocks, dtype, threads=1)
        for threads in (2, 3, 7):
            same_bits(decode(name, blocks, dtype, threads), want)
    same_bits(decode(name, blocks, threads=2), reference(name, blocks))


def test_nothing_to_do() -> None:
    assert decode("Q4_K", np.empty(0, np.uint8)).numel() == 0


def test_refusals() -> None:
    run, blocks, out = native().dequantize, random_blocks("Q4_0", 4), np.empty(128, np.float32)
    with pytest.raises(ValueError, match=r"expected one of Q4_0.*got Q9_9"):
        run("Q9_9", blocks, out, "float32", 1)
    with pytest.raises(ValueError, match="whole blocks"):
        run("Q4_0", blocks[:-1], out, "float32", 1)
    with pytest.raises(ValueError, match=r"out: expected shape \[128\]"):
        run("Q4_0", blocks, out[:-1], "float32", 1)
    with pytest.raises(TypeError, match="out: expected uint16"):
        run("Q4_0", blocks, out, "bfloat16", 1)
    with pytest.raises(ValueError, match="dtype"):
        run("Q4_0", blocks, out, "float64", 1)
    with pytest.raises(ValueError, match="threads"):
        run("Q4_0", blocks, out, "float32", 0)
    with pytest.raises(ValueError, match="dense"):
        run("Q4_0", np.repeat(blocks, 2)[::2], out, "float32", 1)
    out.flags.writeable = False
    with pytest.raises((ValueError, BufferError), match=r"(?i)read-?only|writ"):
        run("Q4_0", blocks, out, "float32", 1)
