"""A run that was stopped at any moment, by anything, resumes to the bytes of one that was not."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from lmtt.errors import InputError, RunError
from lmtt.run import RunWriter, read_run, split, write_packed, write_run
from lmtt.run.layout import tail_of


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The order of fsyncs is tested, their effect cannot be, and it takes two thirds of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


STEPS = ("mkdir", "open", "write", "fsync", "replace", "unlink")


class Killed(BaseException):
    """Stands for SIGKILL: nothing but closing of descriptors happens after it."""


@contextmanager
def failing(monkeypatch, at, *, kill=False, error=errno.ENOSPC, steps=STEPS):
    """Let the `at`-th file operation fail; a killed process does nothing more, an error may be handled.

    A write that fails has written half of its bytes, as torn writes do.
    """
    counter = {"calls": 0}

    def wrapped(name, original):
        def call(*args, **kwargs):
            if kill and counter["calls"] >= at > 0:
                raise Killed
            if name in steps and (name != "open" or args[1] & os.O_CREAT):
                counter["calls"] += 1
                if counter["calls"] == at:
                    if name == "write":
                        original(args[0], args[1][: len(args[1]) // 2])
                    raise Killed if kill else OSError(error, os.strerror(error))
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield counter


def manifest_of(data, keep):
    return {"layers": len(data.parallel), "keep": keep, "resid_dtype": "bfloat16", "prompt": "x"}


def compute(path, data, keep, limit=None):
    """What the engine does: go on where the run stopped, from a state that must be the right one."""
    with RunWriter(path, manifest_of(data, keep), resume=True) as writer:
        start = writer.resume_state(limit)
        if start.layer and not writer.complete:
            np.testing.assert_array_equal(start.resid, data.resid_pre[start.layer])
        for layer in range(start.layer):
            np.testing.assert_array_equal(start.load(layer)["mlp"], data.mlp[layer])
        if not writer.complete:
            for layer in range(start.layer, len(data.parallel)):
                writer.commit_layer(layer, split(data, layer), data.resid_pre[layer + 1])
            writer.finish(tail_of(data), data.meta, data.cost)
        return start.layer


@pytest.mark.parametrize("keep", ["full", "light"])
def test_killed_at_every_step_resumes_to_the_same_bytes(tmp_path, monkeypatch, make_trace, snapshot, keep):
    data = make_trace()
    compute(tmp_path / "whole", data, keep)
    whole = snapshot(tmp_path / "whole")
    started = set()
    for step in range(1, 1000):
        run = tmp_path / f"{step}"
        with failing(monkeypatch, step, kill=True) as counter, suppress(Killed):
            compute(run, data, keep)
        if counter["calls"] < step:
            break
        manifest = run / "run.json"
        if not (manifest.exists() and b'"complete": true' in manifest.read_bytes()):
            with pytest.raises(RunError):
                read_run(run)
        started.add(compute(run, data, keep))
        assert snapshot(run) == whole, f"differs after a kill at step {step}"
        shutil.rmtree(run)
    assert step > 50  # it was indeed exhaustive: about six operations on each of some ten files
    assert started == {0, 1, 2, 3}  # and work was kept, not repeated


def test_notices_survive_a_kill_at_every_step(tmp_path, monkeypatch, make_trace, snapshot):
    """Once each, from layers of both processes; and nothing but cost.json knows of them."""
    data = make_trace()

    def compute_aloud(path):
        with RunWriter(path, manifest_of(data, "full"), resume=True) as writer:
            start = writer.resume_state()
            heard = [line for layer in range(start.layer) for line in start.notices(layer)]
            if writer.complete:
                return
            for layer in range(start.layer, 3):
                said = [f"layer {layer}: said"] if layer != 1 else []
                heard += said
                writer.commit_layer(layer, split(data, layer), data.resid_pre[layer + 1], {}, said)
            writer.finish(tail_of(data), data.meta, {"notices": heard})

    whole = None
    for step in range(1, 1000):
        run = tmp_path / f"{step}"
        with failing(monkeypatch, step, kill=True) as counter, suppress(Killed):
            compute_aloud(run)
        if counter["calls"] < step:
            break
        compute_aloud(run)
        cost = read_run(run).cost
        assert cost == {"notices": ["layer 0: said", "layer 2: said"]}, f"killed at step {step}"
        (run / "cost.json").unlink()
        whole = whole or snapshot(run)
        assert snapshot(run) == whole
        shutil.rmtree(run)
    assert step > 50


def test_damaged_notices_are_said_to_be_lost(tmp_path, make_trace):
    data = make_trace()
    run = tmp_path / "run"
    with RunWriter(run, manifest_of(data, "full")) as writer:
        writer.commit_layer(0, split(data, 0), data.resid_pre[1], {}, ["said"])
    for damage in (b"{", b'{"notices": {"0": ["forged"]}, "blake2b": "0"}'):
        (run / "cost.json").write_bytes(damage)
        with RunWriter(run, manifest_of(data, "full"), resume=True) as writer:
            (line,) = writer.resume_state().notices(0)
            assert "cost.json was damaged" in line


def test_killed_twice_at_every_step_of_the_second_try(tmp_path, monkeypatch, make_trace, snapshot):
    data = make_trace(L=2, T=2)
    compute(tmp_path / "whole", data, "light")
    whole = snapshot(tmp_path / "whole")
    for first in range(3, 60, 7):
        for second in range(1, 60, 5):
            run = tmp_path / "run"
            for step in (first, second):
                with failing(monkeypatch, step, kill=True), suppress(Killed):
                    compute(run, data, "light")
            compute(run, data, "light")
            assert snapshot(run) == whole, f"differs after kills at {first} and {second}"
            shutil.rmtree(run)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_disk_errors_at_every_step_keep_what_is_committed(tmp_path, monkeypatch, make_trace, snapshot, error):
    data = make_trace()
    compute(tmp_path / "whole", data, "full")
    whole = snapshot(tmp_path / "whole")
    for step in range(1, 1000):
        run = tmp_path / f"{step}"
        failed = None
        with failing(monkeypatch, step, error=error, steps=("open", "write", "fsync", "replace")) as counter:
            try:
                compute(run, data, "full")
            except RunError as caught:
                failed = caught
        if counter["calls"] < step:
            break
        assert failed is not None, f"the error at step {step} was not reported"
        assert "\n" not in str(failed)
        assert ("full" if error == errno.ENOSPC else "cannot be written") in str(failed)
        left = list(run.iterdir()) if run.exists() else []
        assert not [file for file in left if file.name.endswith(".tmp")], f"a temporary file at step {step}"
        committed = len([file for file in left if file.name.startswith("resid-")])
        assert compute(run, data, "full") >= committed - 1
        assert snapshot(run) == whole, f"differs after an error at step {step}"
        shutil.rmtree(run)
    assert step > 40


def test_nothing_is_visible_before_it_is_durable(tmp_path, monkeypatch, make_trace):
    """Each file: written, fsynced, renamed, and its directory fsynced before the next file is opened."""
    calls, names = [], {}

    def record(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            if name != "open":
                calls.append((name, names.get(args[0], args[0]).removeprefix(f"{tmp_path}/")))
                return original(*args, **kwargs)
            file = original(*args, **kwargs)
            names[file] = str(args[0])
            if args[1] & os.O_CREAT:
                calls.append((name, names[file]))
            return file

        monkeypatch.setattr(os, name, call)

    for name in ("open", "write", "fsync", "replace", "unlink"):
        record(name)
    with RunWriter(tmp_path / "run", manifest_of(make_trace(), "light")) as writer:
        data = make_trace()
        writer.commit_layer(0, split(data, 0), data.resid_pre[1])
        calls.clear()
        writer.commit_layer(1, split(data, 1), data.resid_pre[2])
    expected = []
    for name in (".layer-001.safetensors.tmp", ".resid-002.safetensors.tmp"):
        expected += [("open", name), ("write", name), ("fsync", name), ("replace", name)]
        expected += [("fsync", "run")]
    merged = [call for call, before in zip(calls, [None, *calls], strict=False) if call != before]
    assert merged == expected


def test_commit_can_be_repeated_by_the_same_process(tmp_path, monkeypatch, make_trace, snapshot):
    data = make_trace()
    compute(tmp_path / "whole", data, "light")
    with RunWriter(tmp_path / "run", manifest_of(data, "light")) as writer:
        for layer in range(3):
            with (
                failing(monkeypatch, 2),
                pytest.raises(RunError, match=rf"full \({layer} of 3 layers are kept\)"),
            ):
                writer.commit_layer(layer, split(data, layer), data.resid_pre[layer + 1])
            writer.commit_layer(layer, split(data, layer), data.resid_pre[layer + 1])
        writer.finish(tail_of(data), data.meta, data.cost)
    assert snapshot(tmp_path / "run") == snapshot(tmp_path / "whole")


CHILD = """
import importlib.util, os, signal, sys
from pathlib import Path
from unittest.mock import Mock
def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(sys.argv[1]) / f"{name}.py")
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); return module
data = load("conftest").build_trace(L=3, T=4)
compute = load("test_resume").compute
os.fsync = lambda _: None
runs, step, killed = Path(sys.argv[2]), 0, 0
while True:
    step += 1
    child = os.fork()
    if child == 0:
        calls = 0
        def wrap(original):
            def call(*args, **kwargs):
                global calls
                calls += 1
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)
            return call
        for name in ("mkdir", "open", "write", "fsync", "replace", "unlink"):
            setattr(os, name, wrap(getattr(os, name)))
        compute(runs / str(step), data, "light")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        assert status == 0
        break
    killed += 1
    compute(runs / str(step), data, "light")
print(killed)
"""


def test_real_sigkills(tmp_path, snapshot):
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tests, tmp_path],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert int(done.stdout) > 60
    runs = [snapshot(run) for run in tmp_path.iterdir()]
    assert len(runs) == int(done.stdout) + 1
    assert all(run == runs[0] for run in runs)


def test_sigterm_and_sigint_are_not_swallowed(tmp_path, monkeypatch, make_trace):
    data = make_trace()
    for error in (KeyboardInterrupt, SystemExit):
        stop = Mock(side_effect=error)
        monkeypatch.setattr(os, "fsync", stop)
        with pytest.raises(error):
            compute(tmp_path / "run", data, "full")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert compute(tmp_path / "run", data, "full") == 0


def run_until(path, data, keep, layers):
    with RunWriter(path, manifest_of(data, keep)) as writer:
        for layer in range(layers):
            writer.commit_layer(layer, split(data, layer), data.resid_pre[layer + 1])


def tear(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 7])


def rot(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [tear, rot, Path.unlink])
@pytest.mark.parametrize("keep", ["full", "light"])
def test_a_damaged_newest_stream_costs_one_layer(tmp_path, make_trace, snapshot, keep, damage):
    data = make_trace(L=5)
    compute(tmp_path / "whole", data, keep)
    run_until(tmp_path / "run", data, keep, 4)
    damage(tmp_path / "run" / "resid-004.safetensors")
    assert compute(tmp_path / "run", data, keep) == 3
    assert snapshot(tmp_path / "run") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("damage", [tear, rot, Path.unlink])
@pytest.mark.parametrize(
    ("keep", "name", "start"),
    [
        ("full", "layer-002.safetensors", 2),
        ("light", "layer-002.safetensors", 0),  # the stream that enters layer 2 is gone by then
        ("light", "layer-003.safetensors", 3),
        ("full", "resid-002.safetensors", 1),
        ("full", "resid-000.safetensors", 0),
    ],
)
def test_damaged_results_are_computed_again(tmp_path, make_trace, snapshot, keep, name, start, damage):
    data = make_trace(L=5)
    compute(tmp_path / "whole", data, keep)
    run_until(tmp_path / "run", data, keep, 4)
    damage(tmp_path / "run" / name)
    assert compute(tmp_path / "run", data, keep) == start
    assert snapshot(tmp_path / "run") == snapshot(tmp_path / "whole")


def test_a_stream_of_another_layer_is_not_taken_for_the_newest(tmp_path, make_trace):
    data = make_trace(L=5)
    run_until(tmp_path / "run", data, "light", 4)
    shutil.copy(tmp_path / "run" / "resid-003.safetensors", tmp_path / "run" / "resid-004.safetensors")
    assert compute(tmp_path / "run", data, "light") == 3


@pytest.mark.parametrize("keep", ["full", "light"])
def test_prompts_that_share_a_read_go_on_at_the_earlier_layer(tmp_path, make_trace, snapshot, keep):
    data = make_trace(L=5)
    compute(tmp_path / "whole", data, keep)
    run_until(tmp_path / "run", data, keep, 4)
    assert compute(tmp_path / "run", data, keep, limit=3) == 3
    assert snapshot(tmp_path / "run") == snapshot(tmp_path / "whole")


def test_a_light_run_holds_two_streams_while_it_runs(tmp_path, make_trace):
    run_until(tmp_path / "run", make_trace(L=5), "light", 4)
    names = sorted(file.name for file in (tmp_path / "run").glob("resid-*"))
    assert names == ["resid-003.safetensors", "resid-004.safetensors"]


def test_another_manifest_is_refused_by_the_keys_that_differ(tmp_path, make_trace):
    data = make_trace()
    first = {**manifest_of(data, "full"), "settings": {"floor": 1e-3, "measure": "l1"}}
    second = {**manifest_of(data, "full"), "settings": {"floor": 1e-2, "measure": "l1"}, "seed": 1}
    RunWriter(tmp_path / "run", first).close()
    with pytest.raises(RunError) as caught:
        RunWriter(tmp_path / "run", second, resume=True)
    assert "seed (was null, now 1), settings.floor (was 0.001, now 0.01)" in str(caught.value)
    assert "measure" not in str(caught.value)
    assert "--force" in str(caught.value)
    compute(tmp_path / "done", data, "full")
    with pytest.raises(RunError, match="settings"):
        RunWriter(tmp_path / "done", second, resume=True)


def test_a_run_has_one_writer(tmp_path, make_trace):
    manifest = manifest_of(make_trace(), "full")
    with RunWriter(tmp_path / "run", manifest):
        for options in ({"resume": True}, {"force": True}, {}):
            with pytest.raises(RunError, match="written by another process"):
                RunWriter(tmp_path / "run", manifest, **options)
        assert (tmp_path / "run" / "run.json").exists()
    RunWriter(tmp_path / "run", manifest, resume=True).close()


def test_lock_goes_with_its_process(tmp_path, make_trace):
    manifest = manifest_of(make_trace(), "full")
    code = (
        "import os, signal, sys; from lmtt.run import RunWriter;"
        f"w = RunWriter(sys.argv[1], {manifest!r}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    RunWriter(tmp_path / "run", manifest, resume=True).close()


def test_readers_see_an_unfinished_run_as_such(tmp_path, make_trace):
    run_until(tmp_path / "run", make_trace(L=5), "full", 2)
    with pytest.raises(RunError, match="unfinished: 2 of 5 layers; continue with --resume"):
        read_run(tmp_path / "run")


def test_what_is_in_the_way_is_left_alone(tmp_path, make_trace):
    data = make_trace()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(RunError, match=r"is not a run: it holds 'thesis.tex'"):
            RunWriter(tmp_path / "home", manifest_of(data, "full"), **options)
        with pytest.raises(RunError, match="in the way"):
            RunWriter(tmp_path / "file", manifest_of(data, "full"), **options)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    write_run(tmp_path / "run", data)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    write_run(tmp_path / "run", make_trace(1, L=2), force=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "layer-002.safetensors").exists()


def test_force_that_is_killed_leaves_nothing_that_passes_for_a_run(tmp_path, monkeypatch, make_trace, bits):
    manifest = manifest_of(make_trace(L=2), "full")
    old, new = (
        dataclasses.replace(trace, meta={**trace.meta, "manifest": manifest})
        for trace in (make_trace(0, L=2), make_trace(1, L=2))
    )
    for step in range(1, 200):
        run = tmp_path / "run"
        write_run(run, old)
        with failing(monkeypatch, step, kill=True) as counter, suppress(Killed):
            write_run(run, new, force=True)
        try:
            found = bits(read_run(run))
        except RunError:
            found = None
        assert found in (None, bits(old), bits(new)), f"a mixture after step {step}"
        try:
            with RunWriter(run, manifest, resume=True) as writer:
                start = writer.resume_state()
                assert not writer.complete or found is not None, f"not complete after step {step}"
                for layer in range(0 if writer.complete else start.layer):
                    np.testing.assert_array_equal(start.load(layer)["mlp"], new.mlp[layer])
        except RunError:
            pass
        write_run(run, new, force=True)
        assert bits(read_run(run)) == bits(new)
        shutil.rmtree(run)
        if counter["calls"] < step:
            break
    assert step > 40


def test_packed_file_is_all_or_nothing(tmp_path, monkeypatch, make_trace, bits):
    old, new = make_trace(0), make_trace(1)
    write_packed(tmp_path / "x.lmtt", old)
    for step in range(1, 100):
        with failing(monkeypatch, step) as counter, suppress(RunError):
            write_packed(tmp_path / "x.lmtt", new, force=True)
        if counter["calls"] < step:
            break
        assert [file.name for file in tmp_path.iterdir()] == ["x.lmtt"]
        assert bits(read_run(tmp_path / "x.lmtt")) in (bits(old), bits(new))
    assert step > 5


@pytest.mark.parametrize("keep", ["full", "light"])
def test_resuming_removes_what_lies_beyond(tmp_path, make_trace, keep):
    data = make_trace(L=5)
    run_until(tmp_path / "run", data, keep, 4)
    stray = tmp_path / "run" / ".layer-009.safetensors.tmp"
    stray.write_bytes(b"half")
    (tmp_path / "run" / ".mine.tmp").write_text("of somebody else")
    with RunWriter(tmp_path / "run", manifest_of(data, keep), resume=True) as writer:
        writer.resume_state(3)
        names = {file.name for file in (tmp_path / "run").iterdir()}
    layers = {f"layer-00{layer}.safetensors" for layer in range(3)}
    streams = {f"resid-00{layer}.safetensors" for layer in (range(4) if keep == "full" else [3])}
    assert names == {"run.json", ".mine.tmp"} | layers | streams


def test_too_small_a_disk_is_refused_before_any_work(tmp_path, make_trace):
    with pytest.raises(RunError, match="too full"):
        RunWriter(tmp_path / "run", manifest_of(make_trace(), "full"), expected_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_any_work(make_trace):
    with pytest.raises(RunError, match="nothing was computed"):
        RunWriter("/proc/self/run", manifest_of(make_trace(), "full"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(tmp_path, make_trace, bits):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        data = make_trace(L=6, T=64, D=400)
        with pytest.raises(RunError, match=r"full \(\d of 6 layers are kept\)") as caught:
            run_until(disk / "run", data, "full", 6)
        kept = int(str(caught.value).split("(")[1][0])
        assert kept > 0
        assert not list((disk / "run").glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert compute(disk / "run", data, "full") == kept
        write_packed(disk / "x.lmtt", read_run(disk / "run"))
        assert bits(read_run(disk / "x.lmtt")) == bits(read_run(disk / "run"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_misuse_is_named(tmp_path, make_trace):
    data = make_trace()
    manifest = manifest_of(data, "full")
    for key, value in (("layers", 0), ("layers", True), ("keep", "all"), ("resid_dtype", "int8")):
        with pytest.raises(InputError, match=key):
            RunWriter(tmp_path / "x", {**manifest, key: value})
    with pytest.raises(InputError, match="both resume and force"):
        RunWriter(tmp_path / "x", manifest, resume=True, force=True)
    with RunWriter(tmp_path / "run", manifest) as writer:
        with pytest.raises(InputError, match="in order"):
            writer.commit_layer(1, split(data, 1), data.resid_pre[2])
        with pytest.raises(InputError, match="once, after its last layer"):
            writer.finish(tail_of(data), {}, {})
        without = {name: array for name, array in split(data, 0).items() if name != "resid_pre"}
        with pytest.raises(InputError, match="resid_pre is missing"):
            writer.commit_layer(0, without, data.resid_pre[1])
        with pytest.raises(InputError, match="float32, expected uint16"):
            writer.commit_layer(0, split(data, 0), data.resid_pre[1].astype(np.float32))
        writer.commit_layer(0, split(data, 0), data.resid_pre[1])
        with pytest.raises(InputError, match="4 wide, expected 8"):
            writer.commit_layer(1, split(data, 1), data.resid_pre[2][:, :4])
        with pytest.raises(InputError, match="disagree on manifest"):
            writer.finish(tail_of(data), {"manifest": {}}, {})
    with (
        RunWriter(tmp_path / "run", manifest, resume=True) as writer,
        pytest.raises(InputError, match="resume_state"),
    ):
        writer.commit_layer(1, split(data, 1), data.resid_pre[2])
