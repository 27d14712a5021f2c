"""What goes into a run comes out of it, to the bit, and equal content is equal bytes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from lmtt.errors import InputError, RunError
from lmtt.run import RunWriter, Tail, assemble, read_run, split, write_packed, write_run
from lmtt.run.layout import tail_of, widen


@pytest.mark.parametrize("resid_dtype", ["bfloat16", "float16", "float32", "float64", None])
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (2, 17)])
def test_directory_and_packed_file_give_back_every_bit(tmp_path, make_trace, bits, resid_dtype, size):
    data = make_trace(L=size[0], T=size[1], resid_dtype=resid_dtype)
    write_run(tmp_path / "run", data)
    write_packed(tmp_path / "run.lmtt", data)
    assert bits(read_run(tmp_path / "run")) == bits(data)
    assert bits(read_run(tmp_path / "run.lmtt")) == bits(data)


def test_split_and_assemble_are_inverse(make_trace, bits):
    data = make_trace(L=4, T=9)
    layers = [split(data, layer) for layer in range(4)]
    assert bits(assemble(layers, tail_of(data), data.meta, data.cost)) == bits(data)


def test_equal_content_is_equal_bytes_whatever_the_way(tmp_path, make_trace, snapshot):
    data = make_trace()
    manifest = {"layers": 3, "keep": "full", "resid_dtype": "bfloat16", "prompt": "x", "chunks": [4, 4]}
    with RunWriter(tmp_path / "a", manifest) as writer:
        for layer in range(3):
            writer.commit_layer(layer, split(data, layer), data.resid_pre[layer + 1])
        writer.finish(tail_of(data), data.meta, data.cost)
    stored = read_run(tmp_path / "a")
    assert stored.meta["manifest"] == manifest
    write_run(tmp_path / "b", stored)
    write_packed(tmp_path / "c.lmtt", read_run(tmp_path / "b"))
    write_packed(tmp_path / "d.lmtt", stored)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert (tmp_path / "c.lmtt").read_bytes() == (tmp_path / "d.lmtt").read_bytes()


def test_measurements_are_in_one_file_only(tmp_path, make_trace, snapshot):
    data = make_trace()
    write_run(tmp_path / "a", data)
    write_run(tmp_path / "b", dataclasses.replace(data, cost={"seconds": {"trace": 99.0}}))
    a, b = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert {name for name in a if a[name] != b[name]} == {"cost.json"}


def test_light_run_has_no_stream_and_a_full_one_has_all(tmp_path, make_trace):
    write_run(tmp_path / "full", make_trace())
    write_run(tmp_path / "light", make_trace(resid_dtype=None))
    assert len(list((tmp_path / "full").glob("resid-*"))) == 4
    assert list((tmp_path / "light").glob("resid-*")) == []
    assert read_run(tmp_path / "full", residual=False).resid_pre is None


@pytest.mark.parametrize("name", ["run", "run.lmtt"])
def test_opening_without_the_stream_gives_all_the_rest(tmp_path, make_trace, bits, name):
    data = make_trace()
    (write_packed if name.endswith("lmtt") else write_run)(tmp_path / name, data)
    light = bits(dataclasses.replace(data, resid_pre=None))
    assert bits(read_run(tmp_path / name, residual=False)) == light


def test_files_are_plain_safetensors(tmp_path, make_trace):
    data = make_trace(resid_dtype="float32")
    write_run(tmp_path / "run", data)
    write_packed(tmp_path / "run.lmtt", data)
    layer = load_file(tmp_path / "run" / "layer-002.safetensors")
    np.testing.assert_array_equal(layer["mlp"], data.mlp[2])
    packed = load_file(tmp_path / "run.lmtt")
    np.testing.assert_array_equal(packed["resid_pre"], data.resid_pre)
    np.testing.assert_array_equal(packed["head"], data.edges.head)


def test_bfloat16_words_are_torch_bfloat16(tmp_path, make_trace):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    values = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    data = dataclasses.replace(make_trace(), resid_pre=values.view(torch.uint16).numpy())
    write_packed(tmp_path / "run.lmtt", data)
    assert torch.equal(load_torch(tmp_path / "run.lmtt")["resid_pre"], values)
    stored = read_run(tmp_path / "run.lmtt")
    np.testing.assert_array_equal(widen(stored.resid_pre, "bfloat16"), values.float().numpy())


def test_run_json_is_for_people_and_ascii(tmp_path, make_trace):
    write_run(tmp_path / "run", make_trace())
    text = (tmp_path / "run" / "run.json").read_bytes()
    assert text.isascii()
    assert b"\x1b" not in text
    run = json.loads(text)
    assert run["schema"] == "lmtt.run/1"
    assert run["dimensions"] == {"layers": 3, "tokens": 5, "d_model": 8}


@pytest.mark.parametrize("write", [write_run, write_packed])
def test_nothing_is_overwritten_unasked(tmp_path, make_trace, bits, write):
    first, second = make_trace(0), make_trace(1)
    write(tmp_path / "x", first)
    with pytest.raises(RunError, match="already"):
        write(tmp_path / "x", second)
    assert bits(read_run(tmp_path / "x")) == bits(first)
    write(tmp_path / "x", second, force=True)
    assert bits(read_run(tmp_path / "x")) == bits(second)


@pytest.mark.parametrize("write", [write_run, write_packed])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"mlp": d.mlp.astype(np.float64)}, "mlp is float64"),
        (lambda d: {"mlp": d.mlp[:, :-1]}, "mlp has shape"),
        (lambda d: {"rest": np.full_like(d.rest, np.nan)}, "rest has a value that is not finite"),
        (lambda d: {"meta": {"x": float("inf"), "resid_dtype": "bfloat16"}}, "meta cannot be stored as JSON"),
        (lambda d: {"meta": {"x": object(), "resid_dtype": "bfloat16"}}, "meta cannot be stored as JSON"),
        (lambda d: {"meta": {}}, "type is 'uint16'"),
        (lambda d: {"tokens": d.tokens[1:]}, "shape"),
    ],
)
def test_a_trace_that_could_not_be_read_is_not_written(tmp_path, make_trace, write, change, message):
    data = make_trace()
    with pytest.raises(InputError, match=message):
        write(tmp_path / "x", dataclasses.replace(data, **change(data)))
    assert list(tmp_path.iterdir()) == []


def test_reading_needs_no_torch(tmp_path, make_trace):
    write_run(tmp_path / "run", make_trace())
    code = (
        "import sys; from lmtt.run import read_run; read_run(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "run"], check=True, timeout=60)


def test_tail_of_an_empty_prompt_is_refused(tmp_path, make_trace):
    data = make_trace(L=1, T=1, resid_dtype=None)
    tail = tail_of(data)
    empty = Tail((), tail.input_ids[:0], tail.parallel, tail.predictions, None)
    with RunWriter(tmp_path / "x", {"layers": 1, "keep": "light", "resid_dtype": "float32"}) as writer:
        writer.commit_layer(0, split(data, 0), np.zeros((1, 8), np.float32))
        with pytest.raises(InputError):
            writer.finish(empty, {}, {})
