"""How far predictions are from runs: efficiencies are fitted on half of a grid of runs, judged on the rest.

    python benchmarks/predict.py [--quick] [--write] [--threads N] [--seconds S]

1. This machine's ceilings are measured anew.
2. Every group of the grid (a model, dtype and memory limit) is loaded in a process of its own, which profiles
   a prompt of each length; files are dropped from the page cache before a run that reads its weights. A
   shared machine is faster now and slower then: every pass stands between two bursts of multiply-adds, and
   its seconds are what they would have been at the ceiling's rate (`pace` has the rate over the ceiling's).
3. Every second cell is fitted: share and extra seconds of each phase (`lmtt.profile.predict.Efficiency`).
4. `lmtt.profile.predict` predicts all cells from their configs, as `lmtt plan` does. The seconds of those
   that nothing was fitted on must be within a quarter of the measured ones. Exit status 1 if one is not.

How much survives screening is what `lmtt plan` assumes of prose for the demo model; random weights are no
model of anything, so for those it is what their own runs counted. `--write` puts the fit into
lmtt/profile/efficiency.py. `--quick` is a small grid, judged but not stored. It needs a quiet machine, and
stops after `--seconds`, naming what it left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations, pairwise
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import llama_file

if TYPE_CHECKING:
    from lmtt.profile.ceilings import Ceilings
    from lmtt.profile.planning import Planned
    from lmtt.profile.predict import Efficiency, Prediction

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "predict.json"
EFFICIENCY = HERE.parent / "lmtt" / "profile" / "efficiency.py"
ALLOWED = 0.25  # of the measured seconds
TRIES, ENOUGH = 5, 2.5  # passes of a cell, of which the median counts: so many, or so many seconds of them
# Limits are over what a config needs: in a file tensors begin where they begin, and take up to a page more.
# With two threads and 1024 tokens a run may also take some hundredths more than planned, and be stopped.
LEAST = 1.1
BURST = 20_000_000  # rounds of multiply-adds: long enough for each thread to have its own processor
NOTHING = 1e9  # the share of a resource that a phase spends no time on
PROCESS_LIMIT = 600  # seconds
SECONDS = 330  # for all measurements
BUSY = 0.1  # processors that others may use meanwhile
# layers, d_model, heads, key/value heads, d_mlp
LLAMAS = {"llama-0.1G": (8, 768, 12, 4, 2048), "llama-0.2G": (6, 1536, 16, 4, 4096)}
DEMO = "demo"


@dataclass(frozen=True)
class Group:
    """Prompts that one process traces. `times`: the limit, over the smallest that works for the longest of
    them; None: all weights stay."""

    model: str
    dtype: str
    times: float | None
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        how = "resident" if self.times is None else f"streamed, {self.times:g} x least memory"
        return f"{self.model}, {self.dtype}, {how}"


@dataclass(frozen=True)
class Cell:
    """One prompt of a group: what it took, and what is known of it before."""

    group: Group
    tokens: int
    wall: float
    seconds: dict[str, float]  # by phase
    survivors: tuple[float, float]  # of a layer: pairs, neurons
    reading: float  # seconds that the reading thread was busy
    pace: float  # of the machine meanwhile, over its ceiling; seconds are times it
    planned: Planned

    @property
    def name(self) -> str:
        return f"{self.group.name}, T = {self.tokens}"

    def prediction(self, efficiency: Efficiency | None, ceilings: Ceilings) -> Prediction:
        """As `lmtt plan` says it; the survivors are assumed for the demo model only."""
        from lmtt.profile.predict import predict
        from lmtt.profile.work import Survivors

        p = self.planned
        survivors = None if self.group.model == DEMO else Survivors(*self.survivors)
        return predict(
            p.dims, ceilings, [self.tokens], p.plan, p.weights, survivors=survivors, first=False,
            efficiency=efficiency,
        )  # fmt: skip


def grid(quick: bool) -> list[Group]:
    """Of each group at least one cell is fitted and one judged."""
    if quick:
        return [
            Group(DEMO, "float32", None, (32, 64, 128, 192)),
            Group("llama-0.1G", "float32", LEAST, (64, 128)),
        ]
    groups = [
        Group(DEMO, "float32", None, (64, 128, 256, 512, 1024, 2048, 4096)),
        Group(DEMO, "bfloat16", None, (64, 128, 256)),
        Group(DEMO, "float32", 1.5, (128, 256, 512, 1024)),
    ]
    for model in LLAMAS:
        groups += [
            Group(model, "float32", None, (64, 256, 512, 1024)),
            Group(model, "bfloat16", None, (64, 128)),
        ]
        groups.append(Group(model, "float32", LEAST, (64, 256, 1024)))
        groups += [Group(model, "float32", times, (128, 512)) for times in (1.5, 2.0)]
    return groups


# --- one group, in its own process ------------------------------------------------------------------------


def measure(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of each length seconds by phase, and what screening left."""
    import torch

    import lmtt
    from lmtt import _C
    from lmtt.profile.ceilings import Ceilings
    from lmtt.profile.command import prompt_ids
    from lmtt.profile.report import measure as profiled

    torch.set_num_threads(request["threads"])
    group = Group(**request["group"])
    ceilings = Ceilings(**request["ceilings"])
    engine = lmtt.load(request["name"], device="cpu", dtype=group.dtype, memory=request["memory"])
    if engine.resident != (group.times is None):
        raise SystemExit(f"{group.name}: the weights {'stay' if engine.resident else 'are read'}")

    def rate() -> float:
        start = time.perf_counter()
        done = float(_C.multiply_adds(BURST, request["threads"])[0])
        return done / (time.perf_counter() - start) / ceilings.lanes

    # Discovered and proved, and everything imported: what is timed is any later prompt.
    engine.trace(input_ids=list(range(5, 21))).route(-1, 0.04)
    started, before = time.perf_counter(), (0, 0.0)
    for tokens in group.lengths:
        if before[0]:  # at worst it takes as much more as there are more pairs of tokens
            expected = before[1] * (tokens / before[0]) ** 2
            if time.perf_counter() - started + expected > request["left"]:
                return
        ids = prompt_ids(engine, None, tokens)
        profiles, rates, begun = [], [rate()], time.perf_counter()
        while len(profiles) < TRIES and (not profiles or time.perf_counter() - begun < ENOUGH):
            if not engine.resident:
                llama_file.drop(*request["files"])
            profiles.append(profiled(engine, ceilings, lambda: engine.trace(input_ids=ids)))  # noqa: B023
            rates.append(rate())
        paces = [mean(pair) for pair in pairwise(rates)]
        layers, last = engine.info.n_layers, profiles[-1]
        before = tokens, last.wall
        phases = {p.name for profile in profiles for p in profile.phases}
        yield {
            "tokens": tokens,
            "tries": len(profiles),
            "pace": median(paces),
            "wall": at_pace(paces, [profile.wall for profile in profiles]),
            "seconds": {
                phase: at_pace(paces, [profile.seconds().get(phase, 0.0) for profile in profiles])
                for phase in phases
            },
            "survivors": [
                last.screening["pairs_evaluated"] / layers, last.screening["neurons_evaluated"] / layers
            ],
            "reading": median(profile.overlap.get("reading_seconds", 0.0) for profile in profiles),
        }  # fmt: skip


def at_pace(paces: Sequence[float], seconds: Sequence[float]) -> float:
    """The median of what passes would have taken at the ceiling's rate."""
    return median(pace * one for pace, one in zip(paces, seconds, strict=True))


# --- the fit ----------------------------------------------------------------------------------------------


def fit(cells: Sequence[Cell], ceilings: Ceilings) -> Efficiency:
    """What makes the relative errors of each phase's seconds small, by dtype, and apart for streamed weights.

    seconds = calls * extra + launch + compute / share + memory / memory_share: linear in extra and in the
    reciprocals of the shares, weighted by 1 / seconds.
    """
    from lmtt.profile.predict import STREAMED, STREAMING, Efficiency

    rows: dict[str, list[tuple[list[float], float]]] = {}
    for cell in cells:
        for phase, (calls, compute, memory, launch) in works(cell, ceilings).items():
            got = cell.reading if phase == "read" else cell.seconds.get(phase, 0.0)
            if got > 0:
                name = phase
                if cell.group.dtype != "float32":
                    name = f"{phase}, {cell.group.dtype}"
                elif cell.group.times is not None and phase not in STREAMED:
                    name = f"{phase}, {STREAMING}"
                of_calls = 0.0 if phase == "read" else calls / got  # reading goes on by itself
                row = [of_calls, compute / got, memory / got]
                rows.setdefault(name, []).append((row, 1 - launch / got))
    extra, share, memory_share = dict[str, float](), dict[str, float](), dict[str, float]()
    for name, found in sorted(rows.items()):
        extra[name], *inverse = nonnegative([row for row, _ in found], [target for _, target in found])
        share[name], memory_share[name] = (1 / x if x > 0 else NOTHING for x in inverse)
    return Efficiency(share, memory_share, extra)


def works(cell: Cell, ceilings: Ceilings) -> dict[str, tuple[float, float, float, float]]:
    """By phase: calls; seconds of compute (or storage, or bus), of memory and of launches at the ceilings."""
    from lmtt.profile.predict import Efficiency, parts

    found = {}
    for phase, one in cell.prediction(Efficiency({}, {}, {}), ceilings).phases.items():
        longest, memory, as_it_is = parts(one.work.at(ceilings))
        found[phase] = (float(one.calls), longest, memory, as_it_is)
    return found


def nonnegative(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """x >= 0 with the least squares of rows @ x - targets: the best of all choices of entries that are 0."""
    import numpy as np

    a, b = np.array(rows), np.array(targets)
    n = a.shape[1]
    best, least = np.zeros(n), float((b**2).sum())
    for chosen in (c for size in range(1, n + 1) for c in combinations(range(n), size)):
        columns = a[:, chosen]
        scale = np.abs(columns).max(0)
        if not (scale > 0).all():
            continue
        found = np.linalg.lstsq(columns / scale, b, rcond=None)[0] / scale
        error = float(((columns @ found - b) ** 2).sum())
        if (found >= 0).all() and error < least * (1 - 1e-9):
            best, least = np.zeros(n), error
            best[list(chosen)] = found
    return [float(x) for x in best]


def judge(cells: Sequence[Cell], ceilings: Ceilings) -> tuple[list[dict[str, Any]], Efficiency]:
    """Fit on every second cell of each group; all of them with what was predicted and measured."""
    at: dict[Group, int] = {}
    fitted = []
    for cell in cells:
        fitted.append(at.setdefault(cell.group, 0) % 2 == 0)
        at[cell.group] += 1
    efficiency = fit([cell for cell, used in zip(cells, fitted, strict=True) if used], ceilings)
    rows = []
    for cell, used in zip(cells, fitted, strict=True):
        prediction = cell.prediction(efficiency, ceilings)
        rows.append(
            {
                "name": cell.name,
                **asdict(cell.group),
                "tokens": cell.tokens,
                "fitted": used,
                "predicted_total": prediction.seconds,
                "measured_total": cell.wall,
                "predicted": {name: one.seconds for name, one in prediction.phases.items()},
                "measured": cell.seconds,
                "survivors": cell.survivors,
                "pace": cell.pace,
            }
        )
    return rows, efficiency


def off(row: dict[str, Any]) -> float:
    """Relative error, with its sign; NaN stays NaN."""
    return float(row["predicted_total"] / row["measured_total"] - 1)


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Judged cells that are further off than allowed."""
    return [row["name"] for row in rows if not row["fitted"] and not abs(off(row)) <= ALLOWED]


def furthest(row: dict[str, Any]) -> str:
    """The phase whose seconds are furthest from what was predicted."""
    said, got = row["predicted"], row["measured"]
    name = max({*said, *got}, key=lambda phase: abs(said.get(phase, 0.0) - got.get(phase, 0.0)))
    return f"most of it {name}: {said.get(name, 0.0):.3f} s for {got.get(name, 0.0):.3f} s"


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table."""
    width = max(len(row["name"]) for row in rows)
    yield f"{'':{width}}  predicted   measured    off"
    for row in rows:
        use = "fitted" if row["fitted"] else "MISSED" if row["name"] in missed(rows) else "judged"
        p, m = row["predicted_total"], row["measured_total"]
        why = f", {furthest(row)}" if not abs(off(row)) <= ALLOWED else ""
        yield f"{row['name']:{width}}  {p:7.3f} s  {m:7.3f} s  {off(row):+5.0%}  {use}{why}"
    for use, chosen in (("fitted", True), ("judged", False)):
        errors = [abs(off(row)) for row in rows if row["fitted"] is chosen]
        if errors:
            yield f"{use}: {len(errors)} cells, median {median(errors):.0%} off, largest {max(errors):.0%}"


# --- running it -------------------------------------------------------------------------------------------


def make_llama(folder: Path, name: str) -> None:
    """A random Llama of a shape, saved in float32; it has no tokenizer, so that its prompts count upwards."""
    import torch

    from lmtt.testing_memory import write_llama

    L, D, H, kv, F = LLAMAS[name]
    write_llama(
        folder / name, torch.float32, num_hidden_layers=L, hidden_size=D, num_attention_heads=H,
        num_key_value_heads=kv, vocab_size=16000, intermediate_size=F,
    )  # fmt: skip


def run(group: Group, folder: Path, threads: int, ceilings: Ceilings, left: float) -> tuple[list[Cell], str]:
    """The cells of a group that `left` seconds are enough for, measured in a new process; what went wrong."""
    from lmtt.checkpoint.load import resolve
    from lmtt.profile.planning import plan_run
    from lmtt.streaming.plan import smallest_limit

    name = None if group.model == DEMO else str(folder / group.model)
    sizes = plan_run(name, max(group.lengths), memory="64GiB", device="cpu", dtype=group.dtype)
    memory = None
    if group.times is not None:
        least = smallest_limit(sizes.dims.shapes, sizes.weights, [max(group.lengths)])
        memory = int(group.times * least)
    source = resolve(name)
    files = [str(path) for path in Path(source.folder).glob(source.gguf or "*.safetensors")]
    request = {"group": asdict(group), "name": name, "memory": memory, "files": files, "threads": threads,
               "ceilings": ceilings.to_json(), "left": left}  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": ""}
    done = subprocess.run(
        [sys.executable, str(HERE / "predict.py"), "--group", json.dumps(request)], env=environment,
        capture_output=True, text=True, timeout=PROCESS_LIMIT, check=False,
    )  # fmt: skip
    failed = ""  # what it measured before counts
    if done.returncode != 0:
        failed = f"{group.name} failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}"
    cells = []
    for line in done.stdout.splitlines():
        one = json.loads(line)
        limit = "64GiB" if memory is None else memory
        planned = plan_run(name, one["tokens"], memory=limit, device="cpu", dtype=group.dtype)
        cells.append(
            Cell(group, one["tokens"], one["wall"], one["seconds"], tuple(one["survivors"]), one["reading"],
                 one["pace"], planned)
        )  # fmt: skip
    return cells, failed


def write_efficiency(efficiency: Efficiency, about: str) -> None:
    """lmtt/profile/efficiency.py with new numbers."""
    before = EFFICIENCY.read_text().split("FITTED_ON")[0]

    def listed(values: Any) -> str:
        short = ((name, float(f"{value:.4g}")) for name, value in sorted(values.items()))
        return "".join(f'    "{name}": {value!r},\n' for name, value in short)

    EFFICIENCY.write_text(
        f'{before}FITTED_ON = "{about}"\nSHARE: dict[str, float] = {{\n{listed(efficiency.share)}}}\n'
        f"MEMORY_SHARE: dict[str, float] = {{\n{listed(efficiency.memory_share)}}}\n"
        f"EXTRA: dict[str, float] = {{  # seconds\n{listed(efficiency.extra)}}}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the fit into lmtt/profile/efficiency.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all measurements [{SECONDS}]")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.group is not None:
        for one in measure(json.loads(options.group)):
            print(json.dumps(one), flush=True)
        return
    import torch
    from run import commit, machine, others_seconds

    from lmtt.profile.ceilings import of_this_machine

    torch.set_num_threads(options.threads)
    others, started = others_seconds(), datetime.now(UTC)
    ceilings = of_this_machine("cpu", remeasure=True)
    cells, left_out, failures = list[Cell](), list[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="lmtt-predict-") as scratch:
        groups = grid(options.quick)
        for name in {group.model for group in groups} - {DEMO}:
            make_llama(Path(scratch), name)
        for group in groups:
            left = options.seconds - (datetime.now(UTC) - started).total_seconds()
            found, failed = list[Cell](), ""
            if left > 0:
                found, failed = run(group, Path(scratch), options.threads, ceilings, left)
            cells += found
            failures += [failed] if failed else []
            left_out += [f"{group.name}, T = {T}" for T in group.lengths[len(found) :]]
            words = ", ".join(f"{cell.tokens}: {cell.wall:.3g} s" for cell in found)
            spent = (datetime.now(UTC) - started).total_seconds()
            print(f"[{spent:4.0f} s] {group.name}: {failed or words}", file=sys.stderr, flush=True)
    if not cells:
        raise SystemExit("; ".join(failures) or "no cell was measured: allow more --seconds")
    rows, efficiency = judge(cells, ceilings)
    spent = (datetime.now(UTC) - started).total_seconds()
    about = {**machine(options.threads), "busy_with_others": round((others_seconds() - others) / spent, 3)}
    print("\n".join(lines(rows)))
    if left_out:
        print(f"left out of {options.seconds:.0f} s: " + "; ".join(left_out))
    if not options.quick:
        content = {"schema": 2, "created": started.isoformat(timespec="seconds"), "machine": about,
                   "commit": commit(), "duration_seconds": round(spent, 1), "ceilings": ceilings.to_json(),
                   "left_out": left_out, "points": rows, "share": efficiency.share,
                   "memory_share": efficiency.memory_share, "extra": efficiency.extra}  # fmt: skip
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        if options.write:
            write_efficiency(efficiency, f"{about['cpu']}, {about['threads']} threads")
    if about["busy_with_others"] > BUSY:
        used = about["busy_with_others"]
        print(f"others used {used:.2g} processors meanwhile: judge again when it is quiet")
    worse = missed(rows)
    if worse or not all(math.isfinite(off(row)) for row in rows):
        failures.append(f"more than {ALLOWED:.0%} off: " + "; ".join(worse))
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
