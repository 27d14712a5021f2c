"""A disk that is really full, run directories behind links: one line, nothing lost, the same bytes later."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lmtt.streaming.load
from lmtt.checkpoint.disk import WeightFile
from lmtt.cli import main
from lmtt.run.partial import read_partial

KIB = 1 << 10
LIMIT = "160MiB"
pytestmark = pytest.mark.usefixtures("always_streamed", "one_thread")


def contents(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in run.iterdir() if p.name != "cost.json"}


def one_line(ended: Any) -> str:
    """What a command that was refused says."""
    assert ended.code == 2, ended
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("lmtt: ")
    return lines[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, to be resized by `resize`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", disk], check=True)


def test_full_disk(small_disk: Path, tmp_path: Path, trace_command: Any, forked: Any) -> None:
    """At several sizes: what was stored can be shown, and with more room it goes on to the same bytes."""
    ended = forked(lambda: main(trace_command(tmp_path / "whole")))
    assert ended.code == 0, ended.err
    want = contents(tmp_path / "whole")
    needed = sum(-(-len(raw) // 4096) * 4 for raw in want.values())  # KiB, in pages
    kept = []
    assert needed >= 60  # more than what is asked for before it starts
    for size in (48, needed - 8, needed - 4):
        resize(small_disk, size)
        run = small_disk / f"run-{size}"
        said = one_line(forked(lambda run=run: main(trace_command(run))))
        assert "is full" in said
        assert "--resume" in said
        assert not list(run.glob(".*"))
        partial = read_partial(run)
        assert partial is not None
        kept.append(partial.done)
        shown = forked(lambda run=run: main(["show", str(run)]))
        assert shown.code == 0, shown.err
        assert f"{partial.done} of 4 layers are stored" in shown.out
        resize(small_disk, 1024)
        again = forked(lambda run=run: main(trace_command(run, "--resume")))
        assert again.code == 0, again.err
        assert contents(run) == want
        for path in run.iterdir():
            path.unlink()
    assert kept[0] < kept[-1]


def test_too_small_a_disk_is_refused_before_weights_are_read(
    small_disk: Path, trace_command: Any, forked: Any
) -> None:
    resize(small_disk, 16)

    def attempt() -> int:
        def read(*_: Any) -> None:
            raise AssertionError("weights are read")

        lmtt.streaming.load.open_source = WeightFile.read_into = read  # type: ignore[method-assign,assignment]
        return main(trace_command(small_disk / "run"))

    assert "is too full" in one_line(forked(attempt))
    assert list(small_disk.iterdir()) == []


def test_a_file_larger_than_the_process_may_write(tmp_path: Path, trace_command: Any, forked: Any) -> None:
    run = tmp_path / "run"

    def attempt() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * KIB, 4 * KIB))
        return main(trace_command(run))

    said = one_line(forked(attempt))
    assert "larger" in said or "too large" in said
    again = forked(lambda: main(trace_command(run, "--resume")))
    assert again.code == 0, again.err


def test_checkpoint_that_leads_out_of_its_folder(folder: Path, tmp_path: Path, forked: Any) -> None:
    """By its index or by a link: the same line with a memory limit and without."""
    for kind in ("index", "link"):
        copy = tmp_path / kind
        shutil.copytree(folder, copy)
        shard = sorted(copy.glob("*.safetensors"))[0]
        shard.rename(tmp_path / shard.name)
        if kind == "link":
            shard.symlink_to(tmp_path / shard.name)
        else:
            index = copy / "model.safetensors.index.json"
            index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
        for more in ((), ("--memory", LIMIT)):
            words = ["trace", str(copy), "--prompt", "abc", *more]
            said = one_line(forked(lambda words=words: main(words)))
            assert "out" in said
            assert "folder" in said


def test_run_behind_links(
    tmp_path: Path, trace_command: Any, forked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to a directory is that directory; one that leads nowhere, or to itself, is refused."""
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to("there")
    run = link / "run"
    assert forked(lambda: main(trace_command(run))).code == 0
    assert contents(tmp_path / "there" / "run") == contents(run)
    to_run = tmp_path / "to-run"
    to_run.symlink_to(run)
    assert forked(lambda: main(trace_command(to_run, "--resume"))).code == 0
    assert forked(lambda: main(["show", str(to_run)])).code == 0
    assert "exists" in one_line(forked(lambda: main(trace_command(to_run))))
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr("lmtt.engine.load", lambda *_, **__: pytest.fail("a model is loaded"))
    for name in ("dangling", "loop"):
        for more in ((), ("--resume",), ("--force",)):
            ended = forked(lambda name=name, more=more: main(trace_command(tmp_path / name, *more)))
            assert str(tmp_path / name) in one_line(ended)
    assert not (tmp_path / "nowhere").exists()


def test_files_of_a_run_are_not_followed(tmp_path: Path, trace_command: Any, forked: Any) -> None:
    """A run whose layer is a link to elsewhere: neither read nor written through."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    assert forked(lambda: main(trace_command(run))).code == 0
    layer = run / "layer-001.safetensors"
    layer.rename(outside)
    layer.symlink_to(outside)
    before = outside.read_bytes()
    assert layer.name in one_line(forked(lambda: main(["show", str(run)])))
    assert outside.read_bytes() == before
