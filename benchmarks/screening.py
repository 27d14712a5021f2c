"""What screening skips and what that costs, on real activations: the table in kernels/proximity/README.md.

    python benchmarks/screening.py [--tokens 423]

For each of a few layers of the demo model: pairs whose bound is not positive, pairs evaluated exactly at two
screens, and at the finer one the mean certificate beside the largest error that any edge really has.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import lmtt
from lmtt.contributions import Settings, attention_task
from lmtt.kernels import registry
from lmtt.run.data import TraceData

LAYERS = (0, 2, 10, 20, 29)


def rows(tokens: int) -> list[str]:
    """One Markdown row for each layer."""
    from cases import token_ids  # beside this file

    engine = lmtt.load(device="cpu")
    data: TraceData = engine.trace(input_ids=token_ids(engine, tokens)).data
    lines = []
    for layer in LAYERS:
        block = engine._block(data, layer)
        task = replace(attention_task(block, Settings(), screen=0.0, keep=None), max_certificate=1.0)
        exact, _ = registry.run("attention_contributions", task)
        coarse, _ = registry.run("attention_contributions", replace(task, screen=1e-3))
        fine, _ = registry.run("attention_contributions", replace(task, screen=1e-4))
        pairs = task.attention.heads * tokens * (tokens + 1) // 2
        error = float((fine.edges - exact.edges).abs().max())
        lines.append(
            f"| {layer} | {1 - exact.positive / pairs:.0%} | {coarse.evaluated / pairs:.1%} "
            f"| {fine.evaluated / pairs:.1%} | {float(fine.certificate.mean()):.4f} | {error:.0e} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=423)
    options = parser.parse_args()
    print("| layer | bound ≤ 0 | evaluated at 1e-3 | at 1e-4 | mean certificate there | worst edge error |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows(options.tokens)))


if __name__ == "__main__":
    main()
