"""What profiling itself costs: traces under `lmtt profile`'s instruments against plain ones, in turns.

    python benchmarks/overhead.py [--threads N] [--pairs N]

Each trace reads the text from one token further on, so that nothing is remembered from the one before, and
the two of a pair take turns in going first: a shared machine is faster now and slower then, which the ratio
within a pair hardly sees. Judged is the median of the ratios. Writes results/overhead.json; two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmtt.engine import Engine
    from lmtt.profile.ceilings import Ceilings
    from lmtt.trace import Trace

RESULTS = Path(__file__).parent / "results" / "overhead.json"
LENGTHS = (256, 512)
PAIRS = 15
ALLOWED = 1.03  # of the time without profiling


def ratios(engine: Engine, ceilings: Ceilings, ids: Any, tokens: int, pairs: int) -> list[float]:
    """Seconds from the prompt to the route, profiled over plain, pair by pair."""
    from lmtt.profile.report import measure

    texts = (ids[0, first : first + tokens] for first in count())

    def trace() -> Trace:
        return engine.trace(input_ids=next(texts))

    def plain() -> float:
        start = time.perf_counter()
        trace().route()
        return time.perf_counter() - start

    def profiled() -> float:
        return measure(engine, ceilings, trace).wall

    found = []
    for number in range(pairs + 1):
        if number % 2:
            without, under = plain(), profiled()
        else:
            under, without = profiled(), plain()
        if number:  # the first pair warms up
            found.append(under / without)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error(f"--pairs must be 2 or more, got {options.pairs}")
    import torch
    from cases import token_ids
    from report import BUSY
    from run import commit, machine, others_seconds

    import lmtt
    from lmtt.profile.ceilings import of_this_machine

    torch.set_num_threads(options.threads)
    engine = lmtt.load(device="cpu")
    ceilings = of_this_machine("cpu")
    ids = token_ids(engine, max(LENGTHS) + 2 * (options.pairs + 1))
    others, started = others_seconds(), time.perf_counter()
    points = []
    for tokens in LENGTHS:
        found = ratios(engine, ceilings, ids, tokens, options.pairs)
        low, middle, high = quantiles(found, n=4)
        points.append({"tokens": tokens, "ratios": found, "median": median(found), "quartiles": [low, high]})
        print(f"T = {tokens}: profiled / plain {middle:.4f}, half of the pairs from {low:.4f} to {high:.4f}")
    spent = time.perf_counter() - started
    busy = round((others_seconds() - others) / spent, 3)
    content = {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**machine(options.threads), "busy_with_others": busy},
        "commit": commit(),
        "allowed": ALLOWED,
        "points": points,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    if busy > BUSY:
        print(f"others used {busy:.2g} processors meanwhile: judge again when it is quiet", file=sys.stderr)
    over = [point["tokens"] for point in points if not point["median"] <= ALLOWED]
    if over:
        raise SystemExit(f"profiling takes more than {ALLOWED - 1:.0%} at T = {', '.join(map(str, over))}")


if __name__ == "__main__":
    main()
