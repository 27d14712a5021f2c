"""The proofs that need no GPU: kernels under Triton's interpreter, and kernels compiled ahead of time.

Triton reads TRITON_INTERPRET when it is first imported, hence processes of their own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("LMTT_CI", None)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore",
         "tests/numerics", "tests/gpu/test_kernels.py", "-k", "triton or test_kernels"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 60, run.stdout[-2000:]


@needs_triton
@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["80", "90"])
def test_no_kernel_spills_or_exceeds_the_chip(chip, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONSAFEPATH": ""}
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu_aot.py", "--chips", chip],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    kernels = re.search(r"(\d+) kernels: no spills", run.stdout)
    assert kernels is not None
    cuda = ("compact.cu", "evaluate.cu") if shutil.which("nvcc") is not None else ()
    assert int(kernels[1]) >= 19 + len(cuda)
    assert all(name in run.stdout for name in cuda)
