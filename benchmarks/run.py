"""All figures, each in a process of its own; then a table, the gates, a JSON file and the plots.

    python benchmarks/run.py [--quick] [--tokens 64 256 ...] [--only WHAT ...] [--model MODEL] [--out FOLDER]

1. One process loads the model and writes its weights and three layers' activations to a temporary folder.
2. `plan` lists the figures; `measure.py` does each; a peer that ran out of time or memory is not tried again
   on longer prompts.
3. `report.py` computes ratios and gates from the figures alone, so that a stored file can be judged again.

Exit status 1 if a gate that could be computed is missed, so that nobody overlooks it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from measure import OUT_OF_MEMORY, Figure
from peers import FLASHTRACE_CHUNKS, flashtrace_missing
from report import BUSY, SCREENING_ALONE, Record, brief, gates, layer_seconds, tables, write_readme

HERE = Path(__file__).parent
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_TOKENS = (64, 256)
SCREENS = (0.0, 1e-4, 1e-3)
CALL_LIMIT = 60  # seconds that a peer may take for one layer
MEMORY_SHARE = 0.85  # of what is free, for any one process
PROCESS_LIMIT = 600  # seconds, start included: a process that hangs is ended

# Longest prompts of figures that say nothing new beyond, or would take most of the time.
LONGEST_COMPILED = 1024
LONGEST_ALL_CHUNKS = 1024
LONGEST_EVERYTHING_DEFAULT = 2048
LONGEST_EVERYTHING_EXACT = 4096
PATCHING_TOKENS = (64, 256, 1024)

TURNS_TOKENS = (256, 512, 1024)  # where ours and its peers take turns, too
DENSE_TOKENS = (256, 1024)  # where kernels are held to the ceiling


# --- what to measure --------------------------------------------------------------------------------------


def plan(
    tokens: Sequence[int], folder: str, layers: tuple[int, ...], threads: int, memory: int
) -> Iterator[Figure]:
    """Every figure, shorter prompts first."""
    for T in tokens:
        shared: dict[str, Any] = {
            "tokens": T, "folder": folder, "layers": layers, "threads": threads, "memory_limit": memory,
        }  # fmt: skip
        peer: dict[str, Any] = {**shared, "call_limit": CALL_LIMIT}
        for screen in (*SCREENS, SCREENING_ALONE):
            yield Figure("attention", "ours", screen=screen, **shared)
        if T in DENSE_TOKENS:
            for screen in (0.0, 1e-3):
                yield Figure("share", "ours, nothing skipped", screen=screen, **shared)
        for screen in (0.0, 1e-3):
            yield Figure("neurons", "ours", screen=screen, **shared)
        yield Figure("attention", "plain_torch", **peer)
        yield Figure("attention", "materialised", **peer)
        if T <= LONGEST_COMPILED:
            yield Figure("attention", "compiled_torch", **peer)
        for chunks in FLASHTRACE_CHUNKS:
            yield Figure("attention", "flashtrace", chunks=chunks, **peer)
        if T in TURNS_TOKENS:
            yield Figure("turns", "attention", **shared)
        yield Figure("forward", "last", **shared)
        yield Figure("forward", "all", **shared)
        yield Figure("everything", "ours", screen=1e-3, **shared)
        if T <= LONGEST_EVERYTHING_EXACT:
            yield Figure("everything", "ours", screen=0.0, **shared)
        if T <= LONGEST_EVERYTHING_DEFAULT:
            yield Figure("everything", "ours", screen=None, **shared)
        if T in PATCHING_TOKENS:
            yield Figure("patching", "zero one head", **shared)


def label(figure: Figure) -> str:
    """A figure's name without its length."""
    extras = [] if figure.chunks is None else [f"chunks {figure.chunks[0]}, {figure.chunks[1]}"]
    if figure.method.startswith("ours"):
        extras.append("default" if figure.screen is None else f"screen {figure.screen:g}")
    return " ".join([figure.what, figure.method, *extras])


def reason_to_skip(figure: Figure, records: Sequence[Record]) -> str | None:
    """Why a figure is not measured, or None."""
    if figure.method == "flashtrace":
        missing = flashtrace_missing()
        if missing is not None:
            return missing
        if figure.tokens > LONGEST_ALL_CHUNKS:
            best = best_chunks(records)
            if best is not None and figure.chunks != best:
                return f"chunks {best[0]}, {best[1]} were fastest on shorter prompts"
    if not figure.call_limit:
        return None
    for record in records:
        if record["label"] == label(figure) and record["status"] != "ok":
            return f"{record['status']} at {record['tokens']} tokens"
    return None


def best_chunks(records: Sequence[Record]) -> tuple[int, int] | None:
    """FlashTrace's fastest chunking on the longest prompt that it was measured on."""
    done = [r for r in records if r["method"] == "flashtrace" and r["status"] == "ok"]
    if not done:
        return None
    longest = max(r["tokens"] for r in done)
    best = min((r for r in done if r["tokens"] == longest), key=layer_seconds)
    return tuple(best["chunks"])


# --- running it -------------------------------------------------------------------------------------------


def child(request: dict[str, Any], threads: int) -> tuple[Record, str]:
    """Run measure.py in a fresh process; its result, or a status that says how it ended, and its stderr."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "",
    }  # fmt: skip
    command = [sys.executable, str(HERE / "measure.py"), json.dumps(request)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROCESS_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not run: over {PROCESS_LIMIT} s in all"}, ""
    if done.returncode == 0:
        result: Record = json.loads(done.stdout.splitlines()[-1])
        return result, done.stderr
    if done.returncode == -signal.SIGALRM:
        return {"status": f"over {CALL_LIMIT} s"}, done.stderr
    if done.returncode == -signal.SIGKILL:
        return {"status": OUT_OF_MEMORY}, done.stderr
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"status": f"failed: {last}"}, done.stderr


def measure_all(figures: Sequence[Figure], only: Sequence[str]) -> list[Record]:
    """Do the figures one after another, saying so on stderr."""
    records: list[Record] = []
    for number, planned in enumerate(figures, 1):
        turns = planned.what == "turns"
        figure = replace(planned, chunks=best_chunks(records)) if turns else planned
        name = label(figure)
        if only and not any(wanted in name for wanted in only):
            continue
        why = reason_to_skip(figure, records)
        start = time.perf_counter()
        result, _ = (
            child(asdict(figure), figure.threads) if why is None else ({"status": f"not run: {why}"}, "")
        )
        spent = time.perf_counter() - start
        record = {
            "label": name, "what": figure.what, "method": figure.method, "tokens": figure.tokens,
            "screen": figure.screen, "chunks": figure.chunks, **result, "process_seconds": round(spent, 2),
        }  # fmt: skip
        records.append(record)
        print(
            f"[{number}/{len(figures)}] {figure.tokens:5d} {name}: {brief(record)}",
            file=sys.stderr,
            flush=True,
        )
    return records


# --- the report -------------------------------------------------------------------------------------------


def machine(threads: int) -> Record:
    """What the figures belong to."""
    from lmtt import _C

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return {
        "cpu": name[1].strip() if name else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "isa": _C.info()["isa"],
    }


def versions() -> dict[str, str]:
    result = {"python": platform.python_version()}
    for name in ("lmtt", "torch", "transformers", "numpy", "flashtrace"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = "not installed"
    return result


def commit() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "modified": bool(git("status", "--porcelain", "-uno")),
    }


def ceilings(threads: int) -> Record:
    """benchmarks/ceilings.py, in its own process."""
    command = [sys.executable, str(HERE / "ceilings.py"), "--threads", str(threads), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PROCESS_LIMIT)
    by_threads: Record = json.loads(done.stdout.splitlines()[-1])["by_threads"]
    return by_threads


def others_seconds() -> float:
    """Processor seconds that anything but us has used since the machine started."""
    user, nice, system, _idle, _wait, *rest = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    everyone = sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")
    return everyone - sum(os.times()[:4])


def free_memory() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def slug(report: Record) -> str:
    words = re.findall(r"[a-z0-9]+", report["machine"]["cpu"].lower())
    return "-".join([*words, report["machine"]["isa"], f"{report['machine']['threads']}threads"])


def run(tokens: Sequence[int], threads: int, model: str | None, only: Sequence[str], scratch: Path) -> Record:
    """Measure everything and return the report."""
    started, others = time.perf_counter(), others_seconds()
    about = machine(threads)
    request = {
        "what": "prepare",
        "folder": str(scratch),
        "tokens": max(tokens),
        "model": model,
        "threads": threads,
    }
    prepared, errors = child(request, threads)
    if "layers" not in prepared:
        raise SystemExit(f"preparation failed: {prepared['status']}\n{errors}")
    limits = ceilings(threads) if not only or "ceilings" in only else {}
    memory = int(MEMORY_SHARE * free_memory())
    figures = list(plan(tokens, str(scratch), tuple(prepared["layers"]), threads, memory))
    records = measure_all(figures, only)
    spent = time.perf_counter() - started
    about["busy_with_others"] = round((others_seconds() - others) / spent, 3)  # in processors
    report: Record = {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": about,
        "versions": versions(),
        "commit": commit(),
        "model": prepared["model"],
        "backends": prepared["backends"],
        "layers": prepared["layers"],
        "settings": {"tokens": list(tokens), "call_limit_seconds": CALL_LIMIT, "memory_limit_bytes": memory},
        "ceilings": limits,
        "figures": records,
        "duration_seconds": round(spent, 1),
    }
    report["gates"] = [asdict(gate) for gate in gates(report)]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"T = {QUICK_TOKENS} only; files go to a scratch folder"
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths to measure")
    parser.add_argument(
        "--only", nargs="+", default=[], help="parts of figures' names, such as 'attention ours'"
    )
    parser.add_argument("--model", help="what lmtt.load takes; default: the demo model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of the JSON file; default: benchmarks/results")
    options = parser.parse_args()
    tokens = tuple(options.tokens or (QUICK_TOKENS if options.quick else TOKENS))
    whole = tokens == TOKENS and not options.only and options.model is None and options.out is None
    out: Path = options.out or (HERE / "results" if whole else Path(tempfile.mkdtemp(prefix="lmtt-bench-")))
    with tempfile.TemporaryDirectory(prefix="lmtt-bench-") as scratch:
        report = run(tokens, options.threads, options.model, options.only, Path(scratch))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"cpu-{slug(report)}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    text = tables(report)
    print(text)
    print(f"written to {path}, {report['duration_seconds']:.0f} s in all")
    if whole:
        import performance
        from plots import draw

        write_readme(text, HERE / "README.md")
        draw(report, HERE.parent / "docs" / "images")
        performance.write(performance.add(report))
    failed = [r for r in report["figures"] if str(r["status"]).startswith("failed")]
    if failed:
        raise SystemExit("\n".join(f"{r['label']} at {r['tokens']} tokens {r['status']}" for r in failed))
    if whole and report["machine"]["busy_with_others"] > BUSY:
        raise SystemExit("others were using the processors: run it again on a quiet machine")
    missed = [gate["name"] for gate in report["gates"] if gate["passed"] is False]
    if missed and whole:
        raise SystemExit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
