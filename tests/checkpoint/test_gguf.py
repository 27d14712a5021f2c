"""GGUF headers: the same values as the format's own package reads, and no harm from a file that lies."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from lmtt.checkpoint.gguf import read_header
from lmtt.checkpoint.gguf_lend import fast_reader
from lmtt.checkpoint.load import resolve
from lmtt.errors import CheckpointError


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tiny(version: int = 3, tensors: int = 1, offset: int = 0, rows: int = 2, kind: int = 0) -> bytes:
    """A valid GGUF file with a string, an array of strings, an array of floats and one float32 tensor."""
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, 3)
    head += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    head += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("é")
    head += text("tokenizer.ggml.scores") + struct.pack("<IIQff", 9, 6, 2, 0.5, -1.0)
    head += text("w") + struct.pack("<IQQIQ", 2, 32, rows, kind, offset)
    head += b"\0" * (-len(head) % 32)
    return head + np.arange(64, dtype="<f4").tobytes()


@pytest.fixture
def write(tmp_path: Path):
    def write(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


def test_a_valid_file(write) -> None:
    header = read_header(write(tiny()))
    assert list(header.fields) == ["general.architecture", "tokenizer.ggml.tokens", "tokenizer.ggml.scores"]
    assert header.fields["tokenizer.ggml.tokens"].parts == [b"a", "é".encode()]
    assert [float(x[0]) for x in header.fields["tokenizer.ggml.scores"].parts] == [0.5, -1.0]
    (tensor,) = header.tensors
    assert tensor.shape == (32, 2)
    assert np.array_equal(tensor.data, np.arange(64, dtype=np.float32).reshape(2, 32))


@pytest.mark.model
def test_the_demo_model_reads_as_by_its_own_package() -> None:
    """Every metadata value and every tensor's bytes, against gguf-py."""
    import gguf
    from transformers.modeling_gguf_pytorch_utils import read_field

    source = resolve(None)
    path = Path(source.folder) / str(source.gguf)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    for key in ours.fields:
        assert read_field(ours, key) == read_field(theirs, key), key
    assert len(ours.tensors) == len(theirs.tensors) == 272
    for mine, reference in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.name, mine.tensor_type) == (reference.name, reference.tensor_type)
        assert mine.data.dtype == reference.data.dtype
        assert np.array_equal(mine.data, reference.data), mine.name


def test_the_reader_is_lent_and_taken_back() -> None:
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map

    def fail_inside() -> None:
        with fast_reader():
            assert gguf.GGUFReader is read_header
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF"),
        (b"PK\x03\x04" * 20, "not a GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (tiny(version=1), "version"),
        (tiny(version=9), "version"),
        (tiny(tensors=1 << 40), "more than"),
        (tiny(tensors=2), "model.gguf"),
        (tiny(offset=1 << 50), "more than"),
        (tiny(offset=33), "misaligned"),
        (tiny(rows=1 << 30), "outside the file"),
        (tiny(kind=999), "quantisation type 999"),
        (tiny()[:-1], "outside the file"),
        (tiny().replace(b"scores", b"tokens"), "appears twice"),
    ],
)
def test_files_that_lie_are_one_line(write, content: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as raised:
        read_header(write(content))
    assert "\n" not in str(raised.value)


def test_truncations_and_mutations_only_ever_raise_our_error(write) -> None:
    """Cut anywhere, or with any bytes changed: a header, or CheckpointError; never anything else."""
    whole, draw, accepted = tiny(), random.Random(0), 0
    for length in range(len(whole)):
        with pytest.raises(CheckpointError):
            read_header(write(whole[:length]))
    for _ in range(1500):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            header = read_header(write(bytes(content)))
            for tensor in header.tensors:
                assert tensor.n_bytes <= len(content)
            accepted += 1
        except CheckpointError:
            pass
    assert accepted > 300, "hardly any mutant is valid: this test would prove nothing"


def test_a_file_that_shrinks_while_it_is_read(write) -> None:
    path = write(tiny())
    tensor = read_header(path).tensors[0]
    path.write_bytes(tiny()[:-100])
    with pytest.raises(CheckpointError, match="ended while w was being read"):
        _ = tensor.data
