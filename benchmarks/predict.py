"""How far predictions are from runs: efficiencies are fitted on half of a grid of runs, judged on the rest.

    python benchmarks/predict.py [--quick] [--write]

1. Every point of the grid (a model, T, dtype, memory limit) is profiled in a process of its own.
2. Points alternate: on every second one, share and extra seconds of each phase are fitted
   (`lmtt.profile.efficiency` says how they enter).
3. The other points are predicted from their config, with the survivors that screening left there, and must be
   within a quarter of the measured time. Exit status 1 if one is not.

`--write` puts the fit into lmtt/profile/efficiency.py. `--quick` is a small grid, judged but never written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "predict.json"
EFFICIENCY = HERE.parent / "lmtt" / "profile" / "efficiency.py"
ALLOWED = 0.25  # of the measured seconds
TRIES = 3  # passes at each point; the median counts
PROCESS_LIMIT = 900
# layers, d_model, heads, key/value heads, d_mlp
LLAMAS = {"llama-0.1G": (8, 768, 12, 4, 2048), "llama-0.4G": (12, 1536, 16, 4, 4096)}
DEMO = "demo"


@dataclass(frozen=True)
class Point:
    """One run. memory None: everything stays; else the limit, in bytes over the smallest that works."""

    model: str
    tokens: int
    dtype: str
    streamed: float | None  # limit as a multiple of the smallest that works; None: the weights stay

    @property
    def name(self) -> str:
        how = "resident" if self.streamed is None else f"streamed at {self.streamed:g} of the least memory"
        return f"{self.model}, T = {self.tokens}, {self.dtype}, {how}"


def grid(quick: bool) -> list[Point]:
    """In an order in which every second point is like the one before it."""
    models = [DEMO] if quick else [DEMO, *LLAMAS]
    lengths = (32, 64, 128, 192) if quick else (64, 128, 256, 512, 1024, 2048, 4096)
    points = [Point(model, T, "float32", None) for model in models for T in lengths]
    if quick:
        return points
    for model in LLAMAS:
        points += [Point(model, T, "float32", times) for times in (1.0, 1.5, 3.0) for T in (64, 512, 2048)]
        points += [Point(model, T, "bfloat16", None) for T in (64, 256, 1024)]
    return points


# --- one point, in its own process --------------------------------------------------------------------------


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds by phase, sizes, and what screening left."""
    import torch

    import lmtt
    from lmtt.profile.ceilings import of_this_machine
    from lmtt.profile.command import prompt_ids
    from lmtt.profile.planning import plan_run
    from lmtt.profile.report import measure as profiled

    torch.set_num_threads(request["threads"])
    point = Point(request["model"], request["tokens"], request["dtype"], request["streamed"])
    name = None if point.model == DEMO else str(Path(request["folder"]) / point.model)
    ceilings = of_this_machine("cpu")
    memory = None
    if point.streamed is not None:
        memory = int(point.streamed * smallest(name, point))
    engine = lmtt.load(name, device="cpu", dtype=point.dtype, memory=memory)
    if engine.resident and point.streamed is not None:
        raise SystemExit(f"{point.name} is not streamed")
    ids = prompt_ids(engine, None, point.tokens)
    engine.trace(
        input_ids=ids[: min(16, len(ids))]
    )  # discovered and proved: what is timed is any later prompt
    profiles = [profiled(engine, ceilings, lambda: engine.trace(input_ids=ids)) for _ in range(TRIES)]
    last = profiles[-1]
    planned = plan_run(name, point.tokens, memory=memory or "64GiB", device="cpu", dtype=point.dtype)
    phases = {p.name for profile in profiles for p in profile.phases}
    layers = engine.info.n_layers
    return {
        "seconds": {
            phase: median(profile.seconds().get(phase, 0.0) for profile in profiles) for phase in phases
        },
        "wall": median(profile.wall for profile in profiles),
        "survivors": [
            last.screening["pairs_evaluated"] / layers, last.screening["neurons_evaluated"] / layers
        ],
        "work": works(planned, last, point),
        "ceilings": ceilings.to_json(),
    }  # fmt: skip


def works(planned: Any, profile: Any, point: Point) -> dict[str, list[float]]:
    """By phase: calls, and seconds at the ceilings without and with the smallest operations."""
    from lmtt.profile.predict import predict
    from lmtt.profile.work import Survivors

    layers = planned.dims.shapes.layers
    survivors = Survivors(
        profile.screening["pairs_evaluated"] / layers, profile.screening["neurons_evaluated"] / layers
    )
    prediction = predict(
        planned.dims, planned.ceilings, [point.tokens], planned.plan, planned.weights, survivors=survivors,
        first=False,
    )  # fmt: skip
    found = {}
    for phase, one in prediction.phases.items():
        busy = one.work.at(planned.ceilings)
        launch = busy.pop("launch")
        calls = 1 if phase in ("dry run", "lens", "graph") else layers
        found[phase] = [float(calls), max(busy.values()), launch, one.seconds]
    return found


def smallest(name: str | None, point: Point) -> int:
    """The least memory that works, as the planner names it."""
    import re

    from lmtt.errors import InputError
    from lmtt.profile.planning import plan_run
    from lmtt.streaming.plan import parse_bytes

    try:
        plan_run(name, point.tokens, memory="1MiB", device="cpu", dtype=point.dtype)
    except InputError as error:
        named = re.search(r"at least (\S+);", str(error))
        assert named is not None
        return parse_bytes(named[1])
    raise AssertionError("nothing works within 1 MiB")


# --- the fit ------------------------------------------------------------------------------------------------


def fit(points: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """(share, extra) by phase that make the largest relative error of the phase's seconds small.

    seconds = calls * extra + launch + ideal / share: linear in extra and 1 / share, weighted by 1 / seconds.
    """
    shares, extras = {}, {}
    for phase in sorted({name for point in points for name in point["work"]}):
        rows = [
            (*point["work"][phase][:3], point["seconds"][phase])
            for point in points
            if phase in point["work"] and point["seconds"].get(phase, 0) > 0
        ]
        if not rows:
            continue
        inverse, extra = _nonnegative(
            [(calls / got, ideal / got, 1 - launch / got) for calls, ideal, launch, got in rows]
        )
        shares[phase] = 1 / inverse if inverse > 0 else 1e9
        extras[phase] = extra
    return shares, extras


def _nonnegative(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """(x, e) >= 0 minimising the squares of a e + b x - c over rows (a, b, c)."""
    aa, bb = sum(a * a for a, _, _ in rows), sum(b * b for _, b, _ in rows)
    ab = sum(a * b for a, b, _ in rows)
    ac, bc = sum(a * c for a, _, c in rows), sum(b * c for _, b, c in rows)
    candidates = [(max(0.0, bc / bb) if bb > 0 else 0.0, 0.0), (0.0, max(0.0, ac / aa) if aa > 0 else 0.0)]
    determinant = aa * bb - ab * ab
    if determinant > 1e-12 * aa * bb:
        x, e = (aa * bc - ab * ac) / determinant, (bb * ac - ab * bc) / determinant
        if x >= 0 and e >= 0:
            candidates.append((x, e))
    return min(candidates, key=lambda v: sum((a * v[1] + b * v[0] - c) ** 2 for a, b, c in rows))


def predicted(point: dict[str, Any], shares: dict[str, float], extras: dict[str, float]) -> float:
    """Seconds of a whole pass at a fit."""
    total = 0.0
    for phase, (calls, ideal, launch, whole) in point["work"].items():
        if phase == "read":
            total += whole  # what is waited for follows from the other phases
        elif phase in shares:
            total += calls * extras[phase] + launch + ideal / shares[phase]
    return total


def judge(
    points: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, float]]:
    """Fit on every second point; all of them with what was predicted and measured."""
    shares, extras = fit(points[::2])
    rows = []
    for number, point in enumerate(points):
        measured = sum(s for phase, s in point["seconds"].items() if phase in point["work"])
        rows.append(
            {
                "name": point["name"],
                "fitted": number % 2 == 0,
                "predicted_total": predicted(point, shares, extras),
                "measured_total": measured,
                "seconds": point["seconds"],
            }
        )
    return rows, shares, extras


def off(row: dict[str, Any]) -> float:
    """Relative error; NaN stays NaN."""
    return float(abs(row["predicted_total"] / row["measured_total"] - 1))


# --- running it ---------------------------------------------------------------------------------------------


def make_llama(folder: Path, name: str) -> None:
    """A random Llama of a shape, saved; its tokenizer is missing, so that its prompts count upwards."""
    import torch
    import transformers

    L, D, H, kv, F = LLAMAS[name]
    config = transformers.LlamaConfig(
        num_hidden_layers=L, hidden_size=D, num_attention_heads=H, num_key_value_heads=kv, vocab_size=32000,
        intermediate_size=F, max_position_embeddings=8192, dtype=torch.float32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / name)


def child(point: Point, folder: Path, threads: int) -> dict[str, Any]:
    """One point in a fresh process."""
    request = {"model": point.model, "tokens": point.tokens, "dtype": point.dtype, "streamed": point.streamed,
               "folder": str(folder), "threads": threads}  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": ""}
    done = subprocess.run(
        [sys.executable, str(HERE / "predict.py"), "--point", json.dumps(request)], env=environment,
        capture_output=True, text=True, timeout=PROCESS_LIMIT, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{point.name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"name": point.name, **result}


def write_efficiency(shares: dict[str, float], extras: dict[str, float], about: str) -> None:
    """lmtt/profile/efficiency.py with new numbers."""
    before = EFFICIENCY.read_text().split("FITTED_ON")[0]

    def listed(values: dict[str, float]) -> str:
        return "".join(f'    "{name}": {value:.4g},\n' for name, value in sorted(values.items()))

    EFFICIENCY.write_text(
        f'{before}FITTED_ON = "{about}"\nSHARE: dict[str, float] = {{\n{listed(shares)}}}\n'
        f"EXTRA: dict[str, float] = {{  # seconds\n{listed(extras)}}}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the fit into lmtt/profile/efficiency.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point is not None:
        print(json.dumps(measure(json.loads(options.point))))
        return
    from run import commit, machine, others_seconds

    others, started = others_seconds(), datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="lmtt-predict-") as scratch:
        for name in () if options.quick else LLAMAS:
            make_llama(Path(scratch), name)
        points = []
        for point in grid(options.quick):
            points.append(child(point, Path(scratch), options.threads))
            print(f"{point.name}: {points[-1]['wall']:.3g} s", file=sys.stderr, flush=True)
    rows, shares, extras = judge(points)
    spent = (datetime.now(UTC) - started).total_seconds()
    about = {**machine(options.threads), "busy_with_others": round((others_seconds() - others) / spent, 3)}
    for row in rows:
        use = "fitted" if row["fitted"] else "judged"
        print(f"{use} {off(row):6.1%}  {row['name']}: predicted {row['predicted_total']:.3g} s,"
              f" measured {row['measured_total']:.3g} s")  # fmt: skip
    if not options.quick:
        content = {"schema": 1, "created": started.isoformat(timespec="seconds"), "machine": about,
                   "commit": commit(), "points": rows, "share": shares, "extra": extras}  # fmt: skip
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        if options.write:
            write_efficiency(shares, extras, f"{about['cpu']}, {about['threads']} threads")
    missed = [row["name"] for row in rows if not row["fitted"] and not off(row) <= ALLOWED]
    if about["busy_with_others"] > 0.1:
        print(
            f"others used {about['busy_with_others']:.2g} processors meanwhile: judge again when it is quiet"
        )
    if missed or not all(math.isfinite(off(row)) for row in rows):
        raise SystemExit(f"more than {ALLOWED:.0%} off: " + "; ".join(missed))


if __name__ == "__main__":
    main()
