"""Random Llamas of any size as files, written a tensor at a time: 40 GB take no more memory than one matrix.

    python benchmarks/llama_file.py 70b.gguf                    # Llama-3-70B's shape in Q4_0, 40 GB
    python benchmarks/llama_file.py 70b.gguf --layers 2 --type Q4_K
    python benchmarks/llama_file.py folder --shape 3gb          # bfloat16 safetensors with a config.json

What random weights lack is put in by design, so that attribution has something to find:

- every sublayer adds `UPDATE` of the embedding's size to the stream, so that any depth stays sane;
- queries and keys are four times as large as usual, so that heads look at few positions;
- half of `RESERVED` dimensions are the same for every token and half are large for token 0 alone. Attention
  norms amplify them, so that a head either looks at token 0 from everywhere or nowhere: an attention sink.

Blocks are random bits with chosen scales: signs are balanced block by block, since weights with a common mean
would amplify the constant direction alone. The same seed gives the same file.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

UPDATE = 0.5  # rms of what a sublayer adds, of the embedding's
SHARPNESS = 4.0  # factor of queries and of keys
SINK = 2.0  # of the reserved dimensions after the attention's norm, in units of what makes logits of order 1
RESERVED = 32  # dimensions of the stream, one block of the embedding's rows
SILU = 0.6  # rms of silu(g) * u for normal g and u, about
LEFT_FREE = 20_000_000_000  # bytes of the disk that are left to others
VARIANTS = 64  # scales that blocks choose from
CHUNK = 64 << 20  # bytes made at once
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """L, D, H, H_kv, F and V of a Llama; d_head is D / H."""

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    d_mlp: int
    d_vocab: int
    rope_base: float = 500_000.0

    @property
    def d_head(self) -> int:
        return self.d_model // self.heads


SHAPES = {
    "70b": Shape(80, 8192, 64, 8, 28672, 128256),
    "3gb": Shape(24, 2048, 32, 8, 8192, 32000),
    "small": Shape(4, 256, 4, 2, 768, 512),
}


@dataclass(frozen=True)
class Entry:
    """A tensor: its names in GGUF and in transformers, shape [out, in] or [n], and what fills it."""

    gguf: str
    hf: str
    shape: tuple[int, ...]
    std: float = 0.0  # of a random matrix
    vector: NDArray[np.float32] | None = None
    embedding: bool = False


def entries(shape: Shape) -> Iterator[Entry]:
    """All tensors of a Llama, in the order of the file."""
    s, D = shape, shape.d_model
    yield Entry("token_embd.weight", "model.embed_tokens.weight", (s.d_vocab, D), 1.0, embedding=True)
    narrow, kv = 1 / math.sqrt(D), s.kv_heads * s.d_head
    for n in range(s.layers):
        size = math.sqrt(1 + 2 * n * UPDATE**2)  # rms of the stream that enters the layer, about
        sink = np.ones(D, np.float32)
        sink[:RESERVED] = SINK * size
        muted = np.ones(D, np.float32)
        muted[:RESERVED] = 0.1
        matrices = (
            ("attn_q", "self_attn.q_proj", (D, D), SHARPNESS * narrow),
            ("attn_k", "self_attn.k_proj", (kv, D), SHARPNESS * narrow),
            ("attn_v", "self_attn.v_proj", (kv, D), narrow),
            ("attn_output", "self_attn.o_proj", (D, D), UPDATE * narrow),
            ("ffn_gate", "mlp.gate_proj", (s.d_mlp, D), narrow),
            ("ffn_up", "mlp.up_proj", (s.d_mlp, D), narrow),
            ("ffn_down", "mlp.down_proj", (D, s.d_mlp), UPDATE / SILU / math.sqrt(s.d_mlp)),
        )
        block, layer = f"blk.{n}.", f"model.layers.{n}."
        yield Entry(block + "attn_norm.weight", layer + "input_layernorm.weight", (D,), vector=sink)
        for ours, theirs, size_, std in matrices:
            yield Entry(f"{block}{ours}.weight", f"{layer}{theirs}.weight", size_, std)
        yield Entry(block + "ffn_norm.weight", layer + "post_attention_layernorm.weight", (D,), vector=muted)
    yield Entry("output_norm.weight", "model.norm.weight", (D,), vector=np.ones(D, np.float32))
    yield Entry("output.weight", "lm_head.weight", (s.d_vocab, D), 4 * narrow)


def planted(shape: Shape) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The reserved dimensions of any token's embedding, and of token 0's."""
    large = math.sqrt(shape.d_model / RESERVED)  # together as large as all others
    usual = np.zeros(RESERVED, np.float32)
    usual[RESERVED // 2 :] = large
    return usual, np.full(RESERVED, large, np.float32)


# --- values ------------------------------------------------------------------------------------------------


def random_bytes(rng: np.random.Generator, n: int) -> Bytes:
    return rng.integers(0, 1 << 64, -(-n // 8), dtype=np.uint64).view(np.uint8)[:n]


UNIFORM = math.sqrt((16**2 - 1) / 12)  # standard deviation of 0..15


def _spread() -> NDArray[np.float64]:
    """Scales of the blocks that share a matrix, their mean square 1."""
    spread = np.linspace(0.7, 1.3, VARIANTS)
    return np.asarray(spread / np.sqrt(np.mean(spread**2)))


def q4_0(rng: np.random.Generator, n: int, std: float) -> Bytes:
    """n blocks of 32: float16 scale, 16 bytes of two digits, w = scale * (digit - 8)."""
    rms = math.sqrt(UNIFORM**2 + 0.25)  # digits average 7.5
    scales = (std / rms * _spread()).astype(np.float16)
    scales[::2] *= -1
    blocks = random_bytes(rng, 18 * n).view([("scale", "<f2"), ("digits", "u1", 16)])
    blocks["scale"] = scales[blocks["digits"][:, 0] % VARIANTS]
    return blocks.view(np.uint8)


def q4_1(rng: np.random.Generator, n: int, std: float) -> Bytes:
    """n blocks of 32: float16 scale and minimum, 16 bytes of two digits, w = scale * digit + minimum."""
    scales = (std / UNIFORM * _spread()).astype(np.float16)
    blocks = random_bytes(rng, 20 * n).view([("scale", "<f2"), ("least", "<f2"), ("digits", "u1", 16)])
    choice = blocks["digits"][:, 0] % VARIANTS
    blocks["scale"], blocks["least"] = scales[choice], (-7.5 * scales.astype(np.float32))[choice]
    return blocks.view(np.uint8)


def q4_k(rng: np.random.Generator, n: int, std: float) -> Bytes:
    """n blocks of 256, eight of 32 in each: float16 d and m, twelve bytes of 6-bit scales and minima,
    128 bytes of two digits, w = d * scale * digit - m * minimum."""
    scales = np.random.default_rng(0).integers(20, 64, (VARIANTS, 8)).astype(np.uint8)
    packed = np.empty((VARIANTS, 12), np.uint8)  # scale and minimum of each of the eight are equal
    packed[:, 0:4] = packed[:, 4:8] = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    packed[:, 8:12] = (scales[:, 4:] & 15) * 17
    rms = math.sqrt(float(np.mean(scales.astype(np.float64) ** 2)))
    d = np.float16(std / UNIFORM / rms)
    blocks = random_bytes(rng, 144 * n).view(
        [("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("digits", "u1", 128)]
    )
    blocks["d"], blocks["m"] = d, np.float16(7.5) * d
    blocks["scales"] = packed[blocks["digits"][:, 0] % VARIANTS]
    return blocks.view(np.uint8)


def bf16(rng: np.random.Generator, n: int, std: float) -> Bytes:
    """n normal numbers, each one of 65,536 quantiles."""
    return _round(std * _quantiles())[random_bytes(rng, 2 * n).view(np.uint16)].view(np.uint8)


@functools.cache
def _quantiles() -> NDArray[np.float32]:
    normal = statistics.NormalDist()
    half = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)], np.float32)
    return np.concatenate([-half, half])


def _round(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 words, rounded to nearest."""
    return ((values.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


@dataclass(frozen=True)
class Format:
    """How matrices are stored: `make(rng, blocks, std)` gives random ones."""

    values: int  # in a block
    nbytes: int  # of a block
    make: Callable[[np.random.Generator, int, float], Bytes]

    def size(self, shape: tuple[int, ...]) -> int:
        assert shape[-1] % self.values == 0, f"rows of {shape[-1]} are no whole blocks of {self.values}"
        return math.prod(shape) // self.values * self.nbytes


FORMATS = {
    "Q4_0": Format(32, 18, q4_0),
    "Q4_1": Format(32, 20, q4_1),
    "Q4_K": Format(256, 144, q4_k),
    "BF16": Format(1, 2, bf16),
}


def matrix(rng: np.random.Generator, entry: Entry, kind: str, shape: Shape) -> Iterator[Bytes]:
    """A matrix's bytes, some rows at a time."""
    format_ = FORMATS[kind]
    rows, width = entry.shape
    row = format_.size((width,))
    step = max(1, CHUNK // row)
    for first in range(0, rows, step):
        n = min(step, rows - first)
        raw = format_.make(rng, n * width // format_.values, entry.std)
        if entry.embedding:
            _plant(raw.reshape(n, row), first, kind, shape)
        yield raw


def _plant(rows: Bytes, first: int, kind: str, shape: Shape) -> None:
    """Write the reserved dimensions of some embedding rows."""
    usual, special = planted(shape)
    stored = [_stored(values, kind) for values in (usual, special)]
    rows[:, : len(stored[0])] = stored[0]
    if first == 0:
        rows[0, : len(stored[1])] = stored[1]


def _stored(values: NDArray[np.float32], kind: str) -> Bytes:
    if kind == "BF16":
        return _round(values).view(np.uint8)
    import gguf

    return np.asarray(gguf.quantize(values, gguf.GGMLQuantizationType[kind]))


# --- files -------------------------------------------------------------------------------------------------


def stored_as(entry: Entry, kind: str) -> str:
    """The embedding, whose first block is planted, has blocks as short as that."""
    return "Q4_0" if entry.embedding and kind == "Q4_K" else kind


def nbytes(shape: Shape, kind: str) -> int:
    """Of all tensors."""
    return sum(
        FORMATS[stored_as(e, kind)].size(e.shape) if e.vector is None else 4 * math.prod(e.shape)
        for e in entries(shape)
    )


def check_room(folder: Path, needed: int, leave: int = LEFT_FREE) -> None:
    """End with one line and status 2 where the disk would be left with less than `leave`."""
    free = shutil.disk_usage(folder).free
    if needed + leave > free:
        print(
            f"not enough room: expected {(needed + leave) / 1e9:.1f} GB free ({needed / 1e9:.1f} to write, "
            f"{leave / 1e9:.1f} to leave), got {free / 1e9:.1f}; use fewer --layers",
            file=sys.stderr,
        )
        raise SystemExit(2)


def settle(fd: int) -> None:
    """To the disk, and out of the page cache: other files keep their place in it, and reads start cold."""
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def drop(*paths: Path | str) -> None:
    """Files out of the page cache, so that reads of them start cold."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            settle(fd)
        finally:
            os.close(fd)


def write_gguf(path: Path, shape: Shape, kind: str, seed: int = 0) -> None:
    """A GGUF file without a tokenizer: prompts are token ids."""
    import gguf

    s, writer = shape, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(s.layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(s.d_model)
    writer.add_feed_forward_length(s.d_mlp)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_rope_freq_base(s.rope_base)
    writer.add_rope_dimension_count(s.d_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(s.d_vocab)
    for entry in entries(s):
        name = "F32" if entry.vector is not None else stored_as(entry, kind)
        size = 4 * entry.shape[0] if entry.vector is not None else FORMATS[name].size(entry.shape)
        raw = gguf.GGMLQuantizationType[name]
        writer.add_tensor_info(entry.gguf, entry.shape, np.dtype(np.float32), size, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for number, entry in enumerate(entries(s)):
        written = 0
        for raw in _contents(entry, stored_as(entry, kind), s, seed, number, np.float32):
            file.write(raw.data)
            written += raw.nbytes
        writer.write_padding(file, written)
        if written > CHUNK:
            file.flush()
            settle(file.fileno())
    file.flush()
    settle(file.fileno())
    writer.close()


def write_safetensors(folder: Path, shape: Shape, seed: int = 0) -> None:
    """A folder with bfloat16 weights in one file and a config."""
    s = shape
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "num_hidden_layers": s.layers, "hidden_size": s.d_model, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads, "intermediate_size": s.d_mlp, "vocab_size": s.d_vocab,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_theta": s.rope_base, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries(s):
        size = 2 * math.prod(entry.shape)
        header[entry.hf] = {
            "dtype": "BF16",
            "shape": list(entry.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, entry in enumerate(entries(s)):
            for raw in _contents(entry, "BF16", s, seed, number, np.uint16):
                file.write(raw.data)
        file.flush()
        settle(file.fileno())


def _contents(
    entry: Entry, kind: str, shape: Shape, seed: int, number: int, vector: type[Any]
) -> Iterator[Bytes]:
    """A tensor's bytes; `vector` is what one-dimensional ones are stored as."""
    if entry.vector is not None:
        values = entry.vector if vector is np.float32 else _round(entry.vector)
        yield np.ascontiguousarray(values).view(np.uint8)
        return
    rng = np.random.Generator(np.random.SFC64([seed, number]))
    yield from matrix(rng, entry, kind, shape)


def write(path: Path, shape: Shape, kind: str, seed: int = 0, leave: int = LEFT_FREE) -> int:
    """Write a model; its bytes. Ends with status 2 where the disk lacks the room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_room(path.parent, nbytes(shape, kind), leave)
    if kind == "BF16":
        write_safetensors(path, shape, seed)
        return (path / "model.safetensors").stat().st_size
    write_gguf(path, shape, kind, seed)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="a .gguf file, or a folder for safetensors")
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--layers", type=int, help="fewer, or more, than the shape has")
    parser.add_argument("--type", choices=[k for k in FORMATS if k != "BF16"], default="Q4_0", dest="kind")
    parser.add_argument("--leave", type=float, default=LEFT_FREE / 1e9, help="GB of the disk to leave free")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = replace(shape, layers=options.layers)
    kind = options.kind if options.path.suffix == ".gguf" else "BF16"
    size = write(options.path, shape, kind, options.seed, int(options.leave * 1e9))
    print(f"{options.path}: {shape.layers} layers, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
