"""Damaged checkpoints: one line that names the file or tensor, before any weight is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lmtt
from lmtt.checkpoint import safetensors_lend
from lmtt.checkpoint.disk import WeightFile
from lmtt.checkpoint.safetensors_source import INDEX, open_safetensors
from lmtt.checkpoint.source import TensorInfo
from lmtt.errors import CheckpointError

Damage = Callable[[Path], None]


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def cut(folder: Path) -> None:
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    raw = bytearray(shard(folder).read_bytes())
    at = raw.index(b'"shape":[') + len(b'"shape":[')
    raw[at] ^= 1
    shard(folder).write_bytes(raw)


def pointer(folder: Path) -> None:
    shard(folder).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def outside(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../model.safetensors")
    (folder / INDEX).write_text(json.dumps(index))


def linked(folder: Path) -> None:
    path = shard(folder)
    elsewhere = folder.parent / "elsewhere.safetensors"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def wrong_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))


def unnamed(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.0.extra"] = shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "cut short"),
        (flip, "damaged"),
        (pointer, "git-lfs pointer"),
        (lambda folder: shard(folder).unlink(), "is missing"),
        (outside, "outside its folder"),
        (linked, "leads out of its folder"),
        (wrong_shape, "contradict the config in shape"),
        (unnamed, "model.layers.0.extra"),
    ],
)
@pytest.mark.usefixtures("always_streamed")
def test_named_in_one_line(
    checkpoint: Callable[[str], Path], tmp_path: Path, damage: Damage, says: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("llama"), folder)
    damage(folder)
    for options in ({"memory": "101MiB"}, {}):  # streamed, and as transformers reads it
        with pytest.raises(CheckpointError, match=says) as error:
            lmtt.load(str(folder), **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *("../model.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", ".", "", "a\\b.safetensors"),
        *("model.safetensors\0", "sub/model.safetensors", "model.bin", 7, None, ["model.safetensors"]),
    ],
)
def test_index_names_plain_files_only(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: object
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("llama"), folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_safetensors(folder)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "loop"])
def test_shards_are_regular_files(checkpoint: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("llama"), folder)
    path = shard(folder)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    with pytest.raises(CheckpointError, match=f"shard {path.name} is not a regular file"):
        open_safetensors(folder)


def test_the_hub_s_cache_is_made_of_links(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder, blobs = tmp_path / "models--x" / "snapshots" / "revision", tmp_path / "models--x" / "blobs"
    shutil.copytree(checkpoint("llama"), folder)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    engine = lmtt.load(str(folder))
    assert np.isfinite(engine.trace(input_ids=[5, 6]).residual).all()


@pytest.mark.usefixtures("always_streamed")
def test_cut_while_it_is_read(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("llama"), folder)
    engine = lmtt.load(str(folder), memory="101MiB")
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.truncate(200)
    with pytest.raises(CheckpointError, match="ended while it was read"):
        engine.trace(input_ids=[5, 6, 7])


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])  # as stored, and packed by transformers
def test_cut_while_all_of_it_is_read(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint(name), folder)
    want = lmtt.load(str(folder)).trace(input_ids=[5, 6, 7])
    last = sorted(folder.glob("*.safetensors"))[-1]
    original = safetensors_lend.read_header

    def cut_when_it_was_opened(file: WeightFile, number: int) -> dict[str, TensorInfo]:
        header = original(file, number)
        if file.path.name == last.name:
            os.truncate(last, last.stat().st_size - 1000)
        return header

    whole = last.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_lend, "read_header", cut_when_it_was_opened)
        with pytest.raises(CheckpointError, match=f"{last.name} ended while it was read") as error:
            lmtt.load(str(folder))
    assert "\n" not in str(error.value)
    last.write_bytes(whole)
    before = len(os.listdir("/proc/self/fd"))
    engine = lmtt.load(str(folder))
    assert len(os.listdir("/proc/self/fd")) == before
    for path in folder.glob("*.safetensors"):
        os.truncate(path, 8)  # a mapped file would now be a signal
    got = engine.trace(input_ids=[5, 6, 7])
    np.testing.assert_array_equal(got.data.resid_pre, want.data.resid_pre)


def test_every_flipped_byte_of_a_header_is_refused_or_harmless(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("llama"), folder)
    path = shard(folder)
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for at in range(length):
        raw = bytearray(whole)
        raw[at] ^= 0x04
        path.write_bytes(raw)
        try:
            open_safetensors(folder).close()
        except CheckpointError:
            refused += 1
    assert refused > 0.8 * length  # the rest are bytes of metadata and of padding
