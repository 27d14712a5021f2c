"""The CUDA kernels' device mathematics, compiled as C++ for the CPU: what is skipped, and what is added."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

PROGRAM = r"""
#include <algorithm>
#include <cstdio>
#include <vector>
#include "cuda/proximity.cuh"

int main() {  // width, coefficient, g, u, y for each pair; prints the proximity and how many blocks were open
  int width;
  float c, g;
  while (std::scanf("%d %a %a", &width, &c, &g) == 3) {
    std::vector<float> u(width), y(width);
    for (float& x : u) if (std::scanf("%a", &x) != 1) return 1;
    for (float& x : y) if (std::scanf("%a", &x) != 1) return 1;
    float over = 0;
    int open = 0;
    for (int b = 0; b < width; b += lmtt::kBlock) {
      const int end = std::min(width, b + lmtt::kBlock);
      float largest = 0, smallest = INFINITY;
      for (int d = b; d < end; ++d) largest = std::max(largest, std::fabs(u[d]));
      for (int d = b; d < end; ++d) smallest = std::min(smallest, std::fabs(y[d]));
      if (!lmtt::may_exceed(c, largest, smallest)) continue;
      ++open;
      for (int d = b; d < end; ++d) over += lmtt::excess(c * u[d], y[d]);
    }
    std::printf("%a %d\n", lmtt::proximity(g, over), open);
  }
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_proximity_of_random_and_special_pairs(tmp_path):
    (tmp_path / "main.cpp").write_text(PROGRAM)
    subprocess.run(
        [str(COMPILER), "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "main.cpp", "-o", "main"],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    random = np.random.default_rng(0)
    lines, wanted, allowed = [], [], []
    for n in range(300):
        width = int(random.integers(1, 100))
        u, y = random.standard_normal((2, width)).astype(np.float32)
        c = np.float32(10.0 ** random.uniform(-4, 1) * random.choice([-1, 1]))
        y[random.random(width) < 0.1] = -0.0 if n % 2 else 0.0
        x = c.astype(np.float64) * u
        t = np.where(np.signbit(y), -x, x)
        wanted.append(max(0.0, np.minimum(t, 2 * np.abs(y.astype(np.float64)) - t).sum()))
        allowed.append(2e-6 * np.abs(x).sum())
        numbers = [c, np.float32(t.sum()), *u, *y]
        lines.append(f"{width} " + " ".join(float(z).hex() for z in numbers))
    out = subprocess.run(
        [tmp_path / "main"], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    got, open_blocks = zip(*(line.split() for line in out.stdout.splitlines()), strict=True)
    assert len(got) == 300
    error = np.abs(np.array([float.fromhex(g) for g in got]) - wanted)
    assert (error <= np.array(allowed)).all(), error.max()
    small = sum(int(n) for n in open_blocks)
    assert 0 < small < 300 * 2, "no block was skipped, or all were"
