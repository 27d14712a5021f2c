"""The proofs that need no GPU: kernels under Triton's interpreter, and kernels compiled ahead of time.

Triton reads TRITON_INTERPRET when it is first imported, hence processes of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="these tests start the interpreter themselves"
)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.slow
def test_every_numerical_test_passes_under_the_interpreter():
    """In two processes: what all backends share, and what only these kernels know."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("LMTT_CI", None)
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *arguments],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for arguments in (
            ["tests/numerics", "-k", "triton"],
            ["tests/gpu/test_kernels.py", "tests/gpu/test_unembedding.py", "tests/gpu/test_features.py"],
        )
    ]  # fmt: skip
    for run, least in zip(runs, (40, 95), strict=True):
        output, _ = run.communicate(timeout=560)
        assert run.returncode == 0, output[-4000:]
        passed = re.search(r"(\d+) passed", output)
        assert passed is not None
        assert int(passed[1]) >= least, output[-2000:]


@needs_triton
@pytest.mark.aot
@pytest.mark.slow
def test_no_kernel_spills_or_exceeds_the_chip():
    # Kept between runs: a kernel that did not change is not compiled again.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(ROOT / "build/triton-cache")}
    runs = {
        chip: subprocess.Popen(
            [sys.executable, "benchmarks/gpu_aot.py", "--chips", chip],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for chip in ("80", "90")
    }  # fmt: skip
    cuda = ("compact.cu", "evaluate.cu") if shutil.which("nvcc") is not None else ()
    for chip, run in runs.items():
        output, _ = run.communicate(timeout=560)
        assert run.returncode == 0, output[-4000:]
        kernels = re.search(r"(\d+) kernels: no spills", output)
        assert kernels is not None, output[-2000:]
        assert int(kernels[1]) >= (51 if chip == "90" else 42) + len(cuda)
        assert all(name in output for name in cuda)


@needs_triton
@pytest.mark.slow
def test_the_gpu_script_runs_dry(tmp_path):
    """Every stage of gpu.sh, tiny and on the CPU, so that its first run on a GPU does not end at a slip."""
    environment = {**os.environ, "PYTHON": sys.executable, "RESULTS": str(tmp_path)}
    environment.pop("LMTT_CI", None)
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--dry-run"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    for stage in ("build", "test", "sanitize", "bench", "stream"):
        record = records[f"gpu-{stage}"]
        assert record["status"] == "ok" or record["detail"][0].startswith("not run: no nvcc"), stage
    assert isinstance(records["gpu"]["results"][0]["triton_attention"], float)
    assert records["stream"]["streamed"]["edges"] > 0
    assert records["gpu"]["results"][0]["sdpa_backend"] == "FLASH_ATTENTION"
    limits = re.findall(r"\) run \w+ (\d+) ", (ROOT / "benchmarks/gpu.sh").read_text())
    assert len(limits) == 5
    assert sum(map(int, limits)) < 480, "eight minutes in all"


@needs_triton
def test_the_gpu_script_finds_tests_without_any_plugin_of_pytest(tmp_path):
    """With its own options, as on a machine that has pytest alone and does not know all of our settings."""
    environment = {**os.environ, "PYTHON": sys.executable, "RESULTS": str(tmp_path)}
    environment["PYTEST_ADDOPTS"] = "-p no:timeout -p no:hypothesispytest"
    environment.pop("LMTT_CI", None)
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--dry-run", "sanitize"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    record = json.loads((tmp_path / "gpu-sanitize.json").read_text())
    assert run.returncode == 0, record
    assert record["status"] == "ok", record
    collected = re.search(r"(\d+)/\d+ tests collected", record["detail"][-1])
    assert collected is not None, record
    assert int(collected[1]) >= 4, record


@needs_triton
def test_a_failing_layer_loses_no_figure_of_the_others(tmp_path, monkeypatch):
    """Written after each layer, the fault listed with its first line, and an exit status that says so."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_bench

    path, before = tmp_path / "gpu.json", []

    def measure(layer, machine, seconds):
        before.append(len(json.loads(path.read_text())["results"]) if path.exists() else 0)
        if layer == 2:
            raise RuntimeError("planted\nwith details")
        if layer == 3:
            raise torch.OutOfMemoryError("planted")
        return {"tile_pass": float(layer), "width": 64}

    def plan(options):
        for n in (1, 2, 3, 4):
            yield "tiny", n, lambda n=n: n

    monkeypatch.setattr(gpu_bench, "measure", measure)
    monkeypatch.setattr(gpu_bench, "plan", plan)
    monkeypatch.setattr(gpu_bench.registry, "availability", lambda: {"triton": None})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["gpu_bench.py", "--dry-run", "--json", str(path)])
    with pytest.raises(SystemExit) as end:
        gpu_bench.main()
    assert end.value.code
    assert before == [0, 1, 2, 3], "the file holds all that was measured before"
    results = json.loads(path.read_text())["results"]
    assert [r["tokens"] for r in results] == [1, 2, 3, 4]
    assert [r.get("tile_pass") for r in results] == [1.0, None, None, 4.0]
    assert results[1]["failed"] == "RuntimeError: planted"
    assert results[2]["not run"] == "out of memory: planted"
    assert list(tmp_path.iterdir()) == [path]
