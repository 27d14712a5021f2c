"""Files from someone else: whatever their bytes, the answer is a trace or one line of `RunError`, soon."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtt.errors import RunError
from lmtt.run import container, files, read_run, write_packed, write_run

SOON = 5.0  # seconds; generous for a machine that does other things


def refused(path, message=None):
    """Opening fails by one line that names the file and matches the message."""
    start = time.monotonic()
    with pytest.raises(RunError, match=message) as caught:
        read_run(path)
    assert time.monotonic() - start < SOON
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    assert len(line) < 700
    assert path.name in line


def reseal(run, change):
    """Change run.json and give it a right checksum again, as an attacker would."""
    content = json.loads((run / "run.json").read_bytes())
    content.pop("blake2b")
    change(content)
    (run / "run.json").write_bytes(files.seal(content))


def rewrite(run, name, change, part=None):
    """Change the arrays of a file of a run and make all checksums right again."""
    with open(run / name, "rb") as file:
        header = container.read_header(file.fileno(), name)
        arrays = {
            key: array.copy() for key, array in container.read_arrays(file.fileno(), header, name).items()
        }
    change(arrays)
    parts, size, blake2b = container.encode(arrays, {"part": part or name})
    (run / name).write_bytes(b"".join(parts))
    reseal(run, lambda content: content["files"].update({name: {"bytes": size, "blake2b": blake2b}}))


@pytest.fixture
def run(tmp_path, make_trace):
    write_run(tmp_path / "run", make_trace())
    return tmp_path / "run"


@pytest.fixture
def packed(tmp_path, make_trace):
    write_packed(tmp_path / "run.lmtt", make_trace())
    return tmp_path / "run.lmtt"


def test_the_helpers_here_make_valid_runs(run, make_trace, bits):
    for name in ("layer-001.safetensors", "tail.safetensors", "resid-000.safetensors"):
        rewrite(run, name, lambda arrays: None)
    assert bits(read_run(run)) == bits(make_trace())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a run, or is truncated"),
        (b"\x08", "not a run, or is truncated"),
        (b"\x00" * 8, "no header"),
        (b"\xff" * 64, "header is too large"),
        ((1 << 63).to_bytes(8, "little"), "header is too large"),
        ((1 << 20).to_bytes(8, "little") + b"{}", "truncated"),
        (pickle.dumps({"a": [1, 2, 3]}), "pickle"),
        (pickle.dumps(np.zeros(9), protocol=2), "pickle"),
        (b"PK\x03\x04" + bytes(60), "zip"),
        (b"GGUF\x03" + bytes(60), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "not a run"),
        (b'{"schema": "lmtt.run/1"}', "not a run"),
    ],
)
def test_files_that_are_no_runs(tmp_path, content, message):
    (tmp_path / "x.lmtt").write_bytes(content)
    refused(tmp_path / "x.lmtt", message)


def test_pickles_are_not_executed(tmp_path):
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(canary),))

    (tmp_path / "x.lmtt").write_bytes(pickle.dumps(Attack()))
    refused(tmp_path / "x.lmtt")
    assert not canary.exists()


def write_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": F32}, bytes(8), "no checksum"),
        ({"a": F32}, bytes(7), "truncated or has bytes behind"),
        ({"a": F32}, bytes(9), "truncated or has bytes behind"),
        ({"a": F32, "b": F32}, bytes(8), "'b' starts at 0"),
        ({"a": {**F32, "data_offsets": [8, 16]}}, bytes(16), "'a' starts at 8"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), "do not fill"),
        ({"a": {**F32, "shape": [3]}}, bytes(8), "do not fill"),
        ({"a": {**F32, "shape": [-2]}}, bytes(8), "impossible sizes"),
        ({"a": {**F32, "shape": [True, 2]}}, bytes(8), "impossible sizes"),
        ({"a": {**F32, "shape": [2.0]}}, bytes(8), "impossible sizes"),
        ({"a": {**F32, "shape": [1 << 32, 1 << 32]}}, bytes(8), "impossible sizes"),
        ({"a": {**F32, "shape": [0, 1 << 61], "data_offsets": [0, 0]}}, b"", "impossible sizes"),
        ({"a": {**F32, "shape": [1] * 70 + [2]}}, bytes(8), "impossible sizes"),
        ({"a": {**F32, "shape": "2"}}, bytes(8), "impossible sizes"),
        ({"a": {**F32, "data_offsets": [0, 4, 8]}}, bytes(8), "impossible sizes"),
        ({"a": {**F32, "dtype": "O"}}, bytes(8), "unknown type"),
        ({"a": {**F32, "dtype": ["F32"]}}, bytes(8), "unknown type"),
        ({"a": {**F32, "more": 1}}, bytes(8), "not described"),
        ({"a": 1}, b"", "not described"),
        ({"__metadata__": {"x": 1}}, b"", "not strings"),
        ({"__metadata__": []}, b"", "not strings"),
        (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', bytes(8), "not a finite number"),
        (b'{"a":NaN}', b"", "not a finite number"),
        (b'{"a":1,"a":1}', b"", "a key occurs twice"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
        (b'{"\xff":1}', b"", "not valid JSON"),
        (b"{" + b'"a":{' * 100 + b"}" * 101, b"", "nested too deeply"),
        (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a":[' + b"[]," * 1_100_000 + b"1]}", b"", "too large"),
        (json.dumps({str(i): 0 for i in range(100_001)}).encode(), b"", "too many arrays"),
        ({"__metadata__": {"blake2b": "0"}}, b"", "without lmtt's metadata"),
        ({"__metadata__": {"blake2b": "0", "lmtt": "{}"}}, b"", "does not describe a run"),
        ({"__metadata__": {"blake2b": "\x1b[2J", "lmtt": '{"schema":"lmtt.run/1"}'}}, b"", "checksum"),
        ({"__metadata__": {"blake2b": "0", "lmtt": "\ud800"}}, b"", "not valid JSON"),
    ],
)
def test_hostile_headers(tmp_path, header, data, message):
    write_header(tmp_path / "x.lmtt", header, data)
    refused(tmp_path / "x.lmtt", message)


def test_a_newer_format_asks_for_an_upgrade(run, packed):
    reseal(run, lambda content: content.update(schema="lmtt.run/2"))
    with pytest.raises(RunError, match=r"newer format, expected lmtt\.run/1, got lmtt.run/2; upgrade lmtt"):
        read_run(run)
    arrays = {"a": np.zeros(1, np.float32)}
    parts, _, _ = container.encode(arrays, {"lmtt": '{"schema":"lmtt.run/2","future":true}'})
    packed.write_bytes(b"".join(parts))
    with pytest.raises(RunError, match="upgrade lmtt"):
        read_run(packed)


@pytest.mark.parametrize("schema", ["lmtt.run/0", "lmtt.run/", "lmtt.run/1 ", "lmtt.route/1", 1, None, "١"])
def test_other_schemas_are_no_runs(run, schema):
    reseal(run, lambda content: content.update(schema=schema))
    with pytest.raises(RunError, match="does not describe a run"):
        read_run(run)


def test_packed_file_truncated_anywhere(packed):
    content = packed.read_bytes()
    with open(packed, "rb") as file:
        header = container.read_header(file.fileno(), "x")
    edges = {0, 1, 7, 8, 9, header.data_start, len(content)}
    for entry in header.entries.values():
        edges |= {header.data_start + entry.start, header.data_start + entry.end}
    for end in sorted({edge + step for edge in edges for step in (-1, 0, 1)}):
        if 0 <= end < len(content):
            packed.write_bytes(content[:end])
            refused(packed)


def test_every_file_of_a_run_missing_truncated_or_longer(run, make_trace, bits):
    for file in sorted(run.iterdir()):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(RunError, match=f"{file.name} does not exist"):
            read_run(run)
        for end in (0, 1, 8, len(content) // 2, len(content) - 2):
            file.write_bytes(content[:end])
            with pytest.raises(RunError, match=file.name):
                read_run(run)
        file.write_bytes(content + b"x")
        with pytest.raises(RunError, match=file.name):
            read_run(run)
        file.write_bytes(content)
    assert bits(read_run(run)) == bits(make_trace())


def mutate(content, rng):
    """One to three changes of the kinds that disks and people make."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content))
        kind = rng.randrange(5)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at] = rng.randrange(256)
        elif kind == 2:
            del content[at : at + rng.randint(1, 16)]
        elif kind == 3:
            content[at:at] = rng.randbytes(rng.randint(1, 16))
        else:
            other = rng.randrange(len(content))
            content[at : at + 8] = content[other : other + 8]
    return bytes(content)


def opens_or_is_refused(path, expected, bits):
    try:
        found = bits(read_run(path))
    except RunError:
        return True
    assert found == expected, "damage passed for content"
    return False


def test_random_damage_is_found(run, packed, make_trace, bits):
    rng = random.Random(0)
    expected = bits(make_trace())
    found = 0
    content = packed.read_bytes()
    for _ in range(300):
        # Half of the mutants keep the data whole, where damage is found at once, and break the header.
        start = content[:2000] if rng.random() < 0.5 else content
        packed.write_bytes(mutate(start, rng) + content[len(start) :])
        found += opens_or_is_refused(packed, expected, bits)
    for file in sorted(run.iterdir()):
        content = file.read_bytes()
        for _ in range(40):
            file.write_bytes(mutate(content, rng))
            found += opens_or_is_refused(run, expected, bits)
        file.write_bytes(content)
    assert found > 600  # of 740: a mutant may be equal, or differ in the spaces of run.json only


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("run.json", b" capital", b" Capital"),
        ("run.json", b'"floor": 0.001', b'"floor": 0.002'),
        ("cost.json", b"0.25", b"0.75"),
    ],
)
def test_small_changes_of_the_descriptions_are_found(run, name, before, after):
    content = (run / name).read_bytes()
    assert before in content
    (run / name).write_bytes(content.replace(before, after))
    with pytest.raises(RunError, match=f"{name} is damaged: its checksum does not match"):
        read_run(run)


def test_a_truncated_stream_is_found_although_it_is_not_read(run):
    os.truncate(run / "resid-001.safetensors", 100)
    with pytest.raises(RunError, match="truncated or changed"):
        read_run(run, residual=False)


def test_more_files_than_a_run_has_are_refused(run):
    reseal(run, lambda content: content["files"].update(x={"bytes": 1, "blake2b": "0"}))
    with pytest.raises(RunError, match="lists 9 files for 3 layers"):
        read_run(run)


def test_damage_of_the_stream_is_found_although_it_is_not_kept(packed):
    with open(packed, "rb") as file:
        header = container.read_header(file.fileno(), "x")
    content = bytearray(packed.read_bytes())
    content[header.data_start + header.entries["resid_pre"].start + 3] ^= 1
    packed.write_bytes(content)
    with pytest.raises(RunError, match="checksum"):
        read_run(packed, residual=False)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "\x00", 2**63, -1, 1 << 40, "lmtt.run/1", 1.5, 100_000]),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=4,
)


def places(value, path=()):
    """Paths of all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_descriptions_that_lie_under_a_right_checksum(run, data):
    original = (run / "run.json").read_bytes()
    content = json.loads(original)
    content.pop("blake2b")
    places_of = [path for path in places(content) if path]
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(places_of))
        holder = content
        try:
            for key in way:
                holder = holder[key]
            if data.draw(st.booleans()) and isinstance(holder, dict):
                holder.pop(last)
            else:
                holder[last] = data.draw(JSON_VALUES)
        except (LookupError, TypeError):
            pass  # the first change took this place away
    try:
        (run / "run.json").write_bytes(files.seal(content))
        trace = read_run(run)
        assert len(trace.tokens) == trace.mlp.shape[1]
    except RunError:
        pass
    finally:
        (run / "run.json").write_bytes(original)


def put(name, value, at=0):
    def change(arrays):
        arrays[name].reshape(-1)[at] = value

    return change


def swap(name):
    def change(arrays):
        arrays[name][[0, 1]] = arrays[name][[1, 0]]

    return change


def replace(name, make):
    def change(arrays):
        arrays[name] = make(arrays[name])

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layer-000.safetensors", put("mlp", np.nan), "mlp has a value that is not finite"),
        ("layer-000.safetensors", put("edge_weight", np.inf), "edge_weight has a value that is not finite"),
        ("layer-000.safetensors", put("neuron_activation", -np.inf), "neuron_activation .* not finite"),
        ("layer-000.safetensors", put("edge_destination", 5, -1), "0 <= source <= destination < T"),
        ("layer-000.safetensors", put("edge_source", -1), "0 <= source <= destination < T"),
        ("layer-000.safetensors", put("edge_source", 4), "0 <= source <= destination < T"),
        ("layer-000.safetensors", put("edge_destination", 2**31 - 1, -1), "0 <= source <= destination < T"),
        ("layer-000.safetensors", put("head", -1), "head has a negative value"),
        ("layer-000.safetensors", put("head_ptr", 1), "head_ptr is not a rising pointer"),
        ("layer-000.safetensors", put("head_ptr", 1 << 62, 1), "head_ptr is not a rising pointer"),
        ("layer-000.safetensors", put("head_ptr", 0, -1), "head_ptr is not a rising pointer"),
        ("layer-000.safetensors", put("neuron_index", -2), "neuron_index has a value below -1"),
        ("layer-000.safetensors", replace("edge_source", lambda a: a[::-1].copy()), "sorted|0 <= source"),
        ("layer-000.safetensors", replace("mlp", lambda a: a[:-1]), r"mlp has shape \[4\], expected \[5\]"),
        ("layer-000.safetensors", replace("mlp", lambda a: a.astype(np.float64)), "mlp is float64"),
        ("layer-000.safetensors", replace("mlp", lambda a: a.reshape(1, 5)), "mlp has shape"),
        ("layer-000.safetensors", replace("head", lambda a: a[:0]), "head"),
        ("layer-000.safetensors", lambda arrays: arrays.pop("rest"), "rest is missing"),
        ("layer-000.safetensors", lambda arrays: arrays.update(extra=arrays["mlp"]), "'extra' is unknown"),
        ("layer-002.safetensors", replace("neuron_index", lambda a: a[:, :2].copy()), "neuron"),
        ("tail.safetensors", put("input_ids", -5), "input_ids has a negative value"),
        ("tail.safetensors", put("token_id", -1), "token_id has a negative value"),
        ("tail.safetensors", put("logsumexp", np.nan), "logsumexp has a value that is not finite"),
        ("tail.safetensors", replace("parallel", lambda a: a[:-1]), "parallel has shape"),
        ("tail.safetensors", replace("input_ids", lambda a: a.astype(np.int32)), "input_ids is int32"),
        (
            "resid-002.safetensors",
            replace("resid_pre", lambda a: a[:, :-1].copy()),
            "does not hold one array",
        ),
        ("resid-002.safetensors", replace("resid_pre", lambda a: a.astype(np.float16)), "float16, expected"),
        ("resid-002.safetensors", lambda arrays: arrays.update(x=arrays["resid_pre"]), "does not hold one"),
    ],
)
def test_arrays_that_lie_under_right_checksums(run, name, change, message):
    rewrite(run, name, change)
    with pytest.raises(RunError, match=message):
        read_run(run)


def test_duplicate_edges_and_heads_are_refused(run):
    def twice(arrays):
        arrays["edge_destination"][:] = arrays["edge_destination"][-1]
        arrays["edge_source"][:] = 0

    rewrite(run, "layer-000.safetensors", twice)
    with pytest.raises(RunError, match="sorted by destination and source, or one occurs twice"):
        read_run(run)


def test_unsorted_heads_are_refused(run):
    def unsorted(arrays):
        first = int(np.flatnonzero(np.diff(arrays["head_ptr"]) >= 2)[0])
        at = int(arrays["head_ptr"][first])
        arrays["head"][[at, at + 1]] = arrays["head"][[at + 1, at]]

    rewrite(run, "layer-000.safetensors", unsorted)
    with pytest.raises(RunError, match="heads of an edge are not sorted"):
        read_run(run)


def test_lying_pointers_of_a_packed_file_are_refused(packed):
    with open(packed, "rb") as file:
        header = container.read_header(file.fileno(), "x")
        arrays = container.read_arrays(file.fileno(), header, "x")
    for name in ("layer_ptr", "head_ptr"):
        for at, value in ((0, 1), (1, -1), (1, 1 << 62), (-1, 0)):
            changed = arrays[name].copy()
            changed[at] = value
            parts, _, _ = container.encode({**arrays, name: changed}, {"lmtt": header.metadata["lmtt"]})
            packed.write_bytes(b"".join(parts))
            refused(packed, f"{name} is not a rising pointer")


def test_truth_values_that_are_none(packed):
    with open(packed, "rb") as file:
        header = container.read_header(file.fileno(), "x")
    content = bytearray(packed.read_bytes())
    content[header.data_start + header.entries["parallel"].start] = 7
    packed.write_bytes(content)
    refused(packed, "no truth values")


def test_a_file_of_another_run_or_layer_is_refused(run, tmp_path, make_trace):
    write_run(tmp_path / "other", make_trace(0, L=4))
    for name in ("layer-001.safetensors", "resid-001.safetensors", "tail.safetensors"):
        content = (run / name).read_bytes()
        shutil.copy(tmp_path / "other" / name, run / name)
        with pytest.raises(RunError, match=r"truncated or changed|checksum differs"):
            read_run(run)
        (run / name).write_bytes(content)
    rewrite(run, "layer-001.safetensors", lambda arrays: None, part="layer-000.safetensors")
    with pytest.raises(RunError, match=r"not the file that run\.json lists"):
        read_run(run)


@pytest.mark.parametrize("evil", ["../secret", "/etc/passwd", "layer-000.safetensors/../x", "a\x00b", ""])
def test_names_in_run_json_lead_nowhere(run, evil):
    def change(content):
        content["files"][evil] = content["files"].pop("layer-000.safetensors")

    reseal(run, change)
    with pytest.raises(RunError, match="does not list layer-000"):
        read_run(run)


@pytest.mark.parametrize("layers", [10**9, 100_000, 4, 2, 0, -1, True, "3", 3.0])
def test_impossible_numbers_of_layers(run, layers):
    reseal(run, lambda content: content["dimensions"].update(layers=layers))
    refused(run)


def test_links_pipes_and_folders_inside_a_run(run, tmp_path):
    for name in ("layer-000.safetensors", "run.json", "cost.json", "resid-000.safetensors"):
        moved = tmp_path / "elsewhere"
        (run / name).rename(moved)
        (run / name).symlink_to(moved)
        refused(run)
        (run / name).unlink()
        os.mkfifo(run / name)
        refused(run)
        (run / name).unlink()
        (run / name).mkdir()
        refused(run)
        (run / name).rmdir()
        moved.rename(run / name)
    read_run(run)


def test_places_without_a_run(tmp_path):
    with pytest.raises(RunError, match=r"missing does not exist; give a run directory or a \.lmtt file"):
        read_run(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"empty/run\.json does not exist"):
        read_run(tmp_path / "empty")
    with pytest.raises(RunError, match="not a path"):
        read_run("a\0b")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RunError, match="loop"):
        read_run(tmp_path / "loop")


def test_links_that_the_user_typed_are_followed(run, packed, tmp_path, bits):
    (tmp_path / "a").symlink_to(run)
    (tmp_path / "b").symlink_to(packed)
    assert bits(read_run(tmp_path / "a")) == bits(read_run(tmp_path / "b"))


def test_a_run_whose_file_shrinks_while_it_is_read(packed, monkeypatch):
    original = os.preadv
    calls = 0

    def shrinking(file, buffers, offset):
        nonlocal calls
        calls += 1
        if calls == 5:
            os.truncate(packed, 3000)
        return original(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrinking)
    refused(packed, "truncated")


def test_run_that_does_not_fit_in_memory(run, monkeypatch):
    monkeypatch.setattr(np, "empty", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError()))
    refused(run, "does not fit in memory")
