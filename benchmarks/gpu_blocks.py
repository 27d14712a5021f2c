"""What exact evaluation on a GPU has to do on real activations: shares that GPU.md's predictions rest on.

    python benchmarks/gpu_blocks.py [FOLDER of gpu_capture.py]

Of all (head, source) pairs of some destinations: how many have a positive bound, how many are listed at the
screen of a trace, and of these, how many blocks of 32 coordinates can exceed the whole and must be read
(csrc/cuda).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cases
import torch
from gpu_capture import FOLDER

from lmtt.kernels.directional_attention.reference import attention_pattern
from lmtt.kernels.types import AttentionTask

BLOCK = 32
SCREENS = (0.0, 1e-4, 1e-3)


@torch.no_grad()
def shares(task: AttentionTask, rows: list[int]) -> dict[float, tuple[float, float]]:
    """By screen: share of the pairs that are listed, and share of their blocks that are open."""
    a = task.attention
    blocks = -(-task.whole.shape[1] // BLOCK)
    least = task.whole[rows].float().abs().unfold(1, BLOCK, BLOCK).amin(-1)  # [n, blocks]
    mass = task.whole[rows].float().abs().sum(-1)
    signs = torch.where(task.whole[rows] < 0, -1.0, 1.0)
    counted: dict[float, list[float]] = {screen: [0.0, 0.0] for screen in SCREENS}
    pairs = 0
    for h in range(a.heads):
        v, w_o = a.v[h // a.group].float(), a.w_o[h].float()
        pattern = attention_pattern(a, h, rows)
        g = pattern * ((signs @ w_o.T) @ v.T)  # [n, T]
        most = (v @ w_o).abs().unfold(1, BLOCK, BLOCK).amax(-1)  # [T, blocks]
        pairs += sum(row + 1 for row in rows)
        for n, row in enumerate(rows):
            open_blocks = (pattern[n, : row + 1, None] * most[: row + 1] > least[n]).sum(-1)
            for screen in SCREENS:
                listed = g[n, : row + 1] > screen * mass[n]
                counted[screen][0] += float(listed.sum())
                counted[screen][1] += float(open_blocks[listed].sum())
    return {s: (n / pairs, o / max(n, 1.0) / blocks) for s, (n, o) in counted.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--rows", type=int, default=48)
    options = parser.parse_args()
    print("layer      T  screen  listed  open blocks")
    for path in sorted(options.folder.glob("*.safetensors")):
        case: Any = cases.load(path, 1 << 30)
        T = case.tokens
        rows = torch.linspace(T // 8, T - 1, options.rows).long().tolist()
        for screen, (listed, open_share) in shares(case.attention, rows).items():
            print(f"{case.layer:5} {T:6} {screen:7.0e} {listed:7.3f} {open_share:12.3f}")


if __name__ == "__main__":
    main()
