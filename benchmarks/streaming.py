"""Streaming a checkpoint: against accelerate's disk offload and plain from_pretrained, and a 70B shape.

    python benchmarks/streaming.py peers [--out FOLDER]           # SmolLM2 and a 3 GB Llama, cold and warm
    python benchmarks/streaming.py large [--layers N] [--file F]  # Llama-3-70B's shape in Q4_0, 80 layers

Every figure has a process of its own (streaming_measure.py). Cold: the checkpoint's pages are dropped from
the page cache before (posix_fadvise DONTNEED on its files alone; nothing else on the machine loses its own).
Warm: the files were read right before. Ours attributes, which the peers do not; all compute in float32 with
equal threads. Files are written to a temporary folder and deleted, unless --file names one to use and keep.

Exit status 1 if a gate is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llama_file
from run import commit, machine, others_seconds, slug, versions
from streaming_measure import Figure

HERE = Path(__file__).parent
TOKENS = 64
PROCESS_LIMIT = 3600  # seconds
LIMITS = {"smollm2": "400MiB", "3gb": "900MiB"}  # of ours
LARGE_LIMIT = "5.1GiB"  # with the interpreter, below LARGE_PEAK
LARGE_PEAK = 6_000_000_000  # bytes resident, interpreter included
LARGE_RATIO = 1.3  # of the larger of reading and computing
MEMORY_RATIO = 1.1  # of the limit
READ_RATIO = 1.02  # of the checkpoint
SURVIVORS = 0.003  # of pairs
Record = dict[str, Any]


@dataclass(frozen=True)
class Gate:
    """A figure beside what it must not exceed (or, with `least`, fall below)."""

    name: str
    got: float
    limit: float
    least: bool = False

    @property
    def passed(self) -> bool:
        return self.got >= self.limit if self.least else self.got <= self.limit


# --- processes ---------------------------------------------------------------------------------------------


def child(figure: Figure) -> Record:
    """The figure, measured in a fresh process; a status if that failed."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(figure.threads), "MKL_NUM_THREADS": str(figure.threads),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "",
    }  # fmt: skip
    command = [sys.executable, str(HERE / "streaming_measure.py"), json.dumps(asdict(figure))]
    others, start = others_seconds(), time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROCESS_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": f"over {PROCESS_LIMIT} s"}
    busy = (others_seconds() - others) / (time.perf_counter() - start)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"status": f"failed: {last}"}
    return {"status": "ok", **json.loads(done.stdout.splitlines()[-1]), "busy_with_others": round(busy, 3)}


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def cool(path: Path) -> None:
    """Take a checkpoint out of the page cache."""
    llama_file.drop(*files_of(path))


def warm(path: Path) -> None:
    """Read a checkpoint into the page cache."""
    for file in files_of(path):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def nbytes(path: Path) -> int:
    return sum(file.stat().st_size for file in files_of(path))


# --- against the peers -------------------------------------------------------------------------------------


def peers(folder: Path, threads: int) -> Iterator[Record]:
    """All figures of two models."""
    for name, path in (("smollm2", _demo(folder)), ("3gb", folder / "3gb")):
        if name == "3gb":
            llama_file.write(path, llama_file.SHAPES["3gb"], "BF16")
        for cache in ("cold", "warm"):
            for what in ("ours", "disk", "plain"):
                (cool if cache == "cold" else warm)(path)
                memory = LIMITS[name] if what == "ours" else ""
                result = child(Figure(what, str(path), TOKENS, threads, memory))
                record = {"model": name, "cache": cache, "method": what, "memory": memory,
                          "checkpoint_bytes": nbytes(path), **result}  # fmt: skip
                print(brief(record), file=sys.stderr, flush=True)
                yield record


def _demo(folder: Path) -> Path:
    """The demo model in bfloat16 safetensors: its own GGUF file is nothing that the peers stream."""
    path = folder / "smollm2"
    script = (
        "import copy, sys, torch, transformers, lmtt\n"
        "model = lmtt.load(None, dtype='bfloat16').model\n"
        "config = copy.deepcopy(model.config)\n"
        "del config.quantization_config\n"
        "plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)\n"
        "plain.load_state_dict(model.state_dict())\n"
        "plain.save_pretrained(sys.argv[1])\n"
    )
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=True)
    return path


def brief(record: Record) -> str:
    if record["status"] != "ok":
        return f"{record['model']} {record['cache']} {record['method']}: {record['status']}"
    return (
        f"{record['model']} {record['cache']} {record['method']}: {record['seconds']['total']:.2f} s, "
        f"{record['peak_above_load'] / 2**20:.0f} MiB"
    )


def peer_gates(records: Sequence[Record]) -> list[Gate]:
    """Memory, time and bytes, for each model and cache state where both were measured."""
    gates = []
    done = {(r["model"], r["cache"], r["method"]): r for r in records if r["status"] == "ok"}
    for (model, cache, method), record in done.items():
        if method != "ours":
            continue
        where = f"{model}, {cache}: "
        limit = _bytes(record["memory"])
        gates.append(Gate(where + "peak / limit", record["peak_above_load"] / limit, MEMORY_RATIO))
        gates.append(
            Gate(where + "bytes read / checkpoint", record["rchar"] / record["checkpoint_bytes"], READ_RATIO)
        )
        disk = done.get((model, cache, "disk"))
        if disk is not None:
            ratio = record["seconds"]["total"] / disk["seconds"]["total"]
            gates.append(Gate(where + "time / accelerate's", ratio, 1.0))
    return gates


def _bytes(text: str) -> int:
    from lmtt.streaming.plan import parse_bytes

    return parse_bytes(text)


# --- the large one -----------------------------------------------------------------------------------------


def large(path: Path, threads: int, memory: str) -> Record:
    """The run, and separately what its parts take."""
    shared: dict[str, Any] = {"path": str(path), "tokens": TOKENS, "threads": threads}
    result: Record = {"checkpoint_bytes": nbytes(path), "memory": memory}
    for what in ("rates", "read", "large"):
        cool(path)
        result[what] = child(Figure(what, memory=memory if what == "large" else "", **shared))
        print(f"{what}: {json.dumps(result[what])[:400]}", file=sys.stderr, flush=True)
    return result


def compute_seconds(result: Record) -> float:
    """Dequantisation and products of all layers and the unembedding, at their separately measured rates."""
    seconds = result["rates"]["seconds"]
    layer = seconds["dequantise"] + seconds["multiply"]
    return float(result["large"]["layers"] * layer + seconds["head dequantise"] + seconds["head multiply"])


def large_gates(result: Record) -> list[Gate]:
    run = result["large"]
    if any(result[what]["status"] != "ok" for what in ("rates", "read", "large")):
        return []
    bound = max(result["read"]["seconds"], compute_seconds(result))
    return [
        Gate("peak resident set, GB", run["peak_rss"] / 1e9, LARGE_PEAK / 1e9),
        Gate("wall / max(read, compute)", run["seconds"]["total"] / bound, LARGE_RATIO),
        Gate("survivors", run["survivors"], SURVIVORS, least=True),
        Gate("edges of a route", run["route_edges"], 1, least=True),
        Gate("bytes read / checkpoint", run["rchar"] / result["checkpoint_bytes"], READ_RATIO),
        Gate("rows whose shares miss 1, by", run["row_sums_off_by"], 1e-5),
        Gate("largest closure error", max(run["closure"].values()), 1e-5),
    ]


# --- the report --------------------------------------------------------------------------------------------


def tables(report: Record) -> str:
    """Markdown."""
    about = report["machine"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, T = {TOKENS}, float32; others "
        f"used {about['busy_with_others']:.2f} processors. Commit {report['commit']['commit'][:10]}"
        f"{' and changes' if report['commit']['modified'] else ''}, torch {report['versions']['torch']}, "
        f"transformers {report['versions']['transformers']}.",
        "",
    ]
    if report["kind"] == "peers":
        lines += [
            "| model | cache | who | load s | run s | peak above load, MiB | read from disk / checkpoint |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in report["figures"]:
            who = {"ours": f"ours, {r['memory']}", "disk": "accelerate, disk", "plain": "plain"}[r["method"]]
            if r["status"] != "ok":
                lines.append(f"| {r['model']} | {r['cache']} | {who} | {r['status']} | | | |")
                continue
            seconds, read = r["seconds"], r["read_bytes"] / r["checkpoint_bytes"]
            lines.append(
                f"| {r['model']} | {r['cache']} | {who} | {seconds['load']:.2f} | {seconds['run']:.2f} | "
                f"{r['peak_above_load'] / 2**20:.0f} | {read:.2f} |"
            )
    else:
        lines += ["| what | seconds |", "|---|---|"]
        result = report["large"]
        if report["gates"]:
            phases = result["large"]["phases"]
            lines += [f"| {name} | {seconds:.1f} |" for name, seconds in phases.items()]
            lines.append(f"| load and trace | {result['large']['seconds']['total']:.1f} |")
            lines.append(f"| separately: dequantisation and products | {compute_seconds(result):.1f} |")
            lines.append(f"| separately: reading the file | {result['read']['seconds']:.1f} |")
    lines += ["", "| gate | got | limit | |", "|---|---|---|---|"]
    for gate in report["gates"]:
        sign, verdict = (">=" if gate["least"] else "<="), ("met" if gate["passed"] else "**missed**")
        lines.append(f"| {gate['name']} | {gate['got']:.3g} | {sign} {gate['limit']:g} | {verdict} |")
    return "\n".join(lines)


def report_of(kind: str, threads: int, work: Any) -> Record:
    """Do `work`, and say on what."""
    others, start = others_seconds(), time.perf_counter()
    done = work()
    about = machine(threads)
    about["busy_with_others"] = round((others_seconds() - others) / (time.perf_counter() - start), 3)
    report: Record = {
        "schema": 1,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": about,
        "versions": versions(),
        "commit": commit(),
        ("figures" if kind == "peers" else "large"): done,
    }
    gates = peer_gates(done) if kind == "peers" else large_gates(done)
    report["gates"] = [{**asdict(gate), "passed": gate.passed} for gate in gates]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["peers", "large"])
    parser.add_argument("--layers", type=int, default=80, help="of the large one")
    parser.add_argument("--type", choices=["Q4_0", "Q4_1", "Q4_K"], default="Q4_0", help="of the large one")
    parser.add_argument("--file", type=Path, help="a large file to use, and keep")
    parser.add_argument("--memory", default=LARGE_LIMIT, help="limit of the large one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lmtt-streaming-") as scratch:
        if options.kind == "peers":
            report = report_of("peers", options.threads, lambda: list(peers(Path(scratch), options.threads)))
        else:
            path = options.file or Path(scratch) / "large.gguf"
            if options.file is None:
                shape = replace(llama_file.SHAPES["70b"], layers=options.layers)
                llama_file.write(path, shape, options.type)
            report = report_of("large", options.threads, lambda: large(path, options.threads, options.memory))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"streaming-{options.kind}-{slug(report)}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(tables(report))
    print(f"written to {path}")
    missed = [gate["name"] for gate in report["gates"] if not gate["passed"]]
    if missed or not report["gates"]:
        raise SystemExit("missed: " + ("; ".join(missed) or "everything: nothing was measured"))


if __name__ == "__main__":
    main()
