"""What the source distribution and the built package hold beside code."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CROSSOVER = "crossovers/some-chip.json"  # where kernels/crossover.py looks


@pytest.mark.parametrize("measured", [False, True], ids=["none", "one"])
def test_measured_crossovers_travel_where_there_are_any(tmp_path: Path, measured: bool) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("lmtt", "kernels", "viz", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "crossovers")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    if measured:
        (tree / "kernels/crossovers").mkdir()
        (tree / "kernels" / CROSSOVER).write_text('{"crossover": []}')
    commands = ("build_py", "--build-lib", "out", "sdist", "--dist-dir", "dist")
    build = [sys.executable, "setup.py", "-q", *commands]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tree / "out/lmtt/kernels/README.md").is_file()
    assert (tree / "out/lmtt/kernels" / CROSSOVER).is_file() == measured
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = [name.split("/", 1)[1] for name in sdist.getnames() if "/" in name]
    assert (f"kernels/{CROSSOVER}" in names) == measured
    assert {"kernels/crossover.py", "csrc/cuda/api.h", "csrc/cuda/evaluate.cu"} <= set(names)
