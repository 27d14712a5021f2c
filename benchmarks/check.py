"""Has attribution become slower? Ratios measured now against those of a stored report.

    python benchmarks/check.py [--baseline FILE] [--tokens 256 1024] [--now FILE]

1. The baseline is the stored report of this machine (results/cpu-*.json, written by `make bench`).
2. The figures of a few ratios are measured again, each in a process of its own, as `run.py` does.
3. A ratio is worse if it exceeds the baseline's by more than the tolerance, which follows from how much
   repeated calls of the same figures scattered, then and now.

Ratios are of things measured in one run on one machine, so that a faster or slower machine cancels out.
Exit status 0: nothing is worse; 1: something is, or was not measured; 2: there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, NoReturn

from report import Figures, Record, paired

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TOKENS = (256, 1024)
LEAST_TOLERANCE = 0.10  # a ratio of two medians on a quiet machine repeats to a few percent
NOISE_FACTOR = 4.0  # standard errors
ONLY = ("attention ours screen 0.001", "attention ours screen 0", "attention plain_torch", "neurons ours",
        "forward all", "everything ours screen 0.001", "attention materialised")  # fmt: skip
MATERIALISED_TOKENS = 256  # beyond it takes minutes, or more memory than there is


@dataclass(frozen=True)
class Ratio:
    """Ours over something else's; larger is worse."""

    name: str
    value: float
    noise: float  # relative standard error


@dataclass(frozen=True)
class Verdict:
    """One ratio then and now; `now` is None where it was not measured."""

    name: str
    then: float
    now: float | None
    tolerance: float

    @property
    def worse(self) -> bool:
        """NaN is worse."""
        return self.now is None or not self.now <= self.then * (1 + self.tolerance)

    def line(self) -> str:
        got = "not measured" if self.now is None else f"{self.now:.4g} ({self.now / self.then - 1:+.1%})"
        word = "WORSE" if self.worse else "ok"
        return f"{word:5s}  {self.name}: {self.then:.4g} then, {got} now, tolerance {self.tolerance:.0%}"


class UnusableError(Exception):
    """There is no baseline, or it cannot be read: one line."""


def ratios(report: Record) -> list[Ratio]:
    """Those whose figures the report holds, by rising length."""
    figures = Figures(report["figures"])
    found = []
    for T in sorted({int(r["tokens"]) for r in report["figures"]}):
        for name, ours, theirs in _pairs(figures, T):
            if ours and theirs:
                spread = math.hypot(_noise(ours), _noise(theirs))
                found.append(Ratio(f"{name}, T = {T}", _seconds(ours) / _seconds(theirs), spread))
    return found


def _pairs(figures: Figures, T: int) -> Iterator[tuple[str, list[list[float]], list[list[float]]]]:
    """Name, samples of ours, samples of the other; samples are by layer."""
    forward = figures.get("forward", "all", T)
    everything = figures.get("everything", "ours", T, 1e-3)
    if everything is not None:
        for field, words in (("attribution", "attribution"), ("seconds", "whole trace")):
            if everything.get("paired"):
                own, beside = paired(everything, field)
                yield f"{words} / plain forward", [own], [beside]
            elif forward is not None:
                yield f"{words} / plain forward", [everything[field]], [forward["seconds"]]
    for screen, said in ((1e-3, "1e-3"), (0.0, "off")):
        ours = figures.get("attention", "ours", T, screen)
        for peer, words in (("plain_torch", "plain torch"), ("materialised", "materialised")):
            theirs = figures.get("attention", peer, T)
            turns = figures.turns(peer, T, screen)
            if turns[0]:
                yield f"attention, screen {said} / {words}", *turns
            elif ours is not None and theirs is not None:
                yield f"attention, screen {said} / {words}", *_common(ours, theirs)
    neurons = figures.get("neurons", "ours", T, 1e-3)
    if neurons is not None and forward is not None:
        yield "neurons of a layer / plain forward", _by_layer(neurons), [forward["seconds"]]


def _common(a: Record, b: Record) -> tuple[list[list[float]], list[list[float]]]:
    layers = {one["layer"] for one in a["by_layer"]} & {one["layer"] for one in b["by_layer"]}
    return _by_layer(a, layers), _by_layer(b, layers)


def _by_layer(record: Record, layers: set[int] | None = None) -> list[list[float]]:
    return [one["seconds"] for one in record["by_layer"] if layers is None or one["layer"] in layers]


def _seconds(samples: Sequence[Sequence[float]]) -> float:
    return mean(median(one) for one in samples)


def _noise(samples: Sequence[Sequence[float]]) -> float:
    """Relative standard error of a median, by the median deviation of its calls; one call tells nothing."""
    errors = []
    for one in samples:
        middle = median(one)
        deviation = 1.4826 * median(abs(x - middle) for x in one)
        errors.append(1.2533 * deviation / math.sqrt(len(one)) / middle if len(one) > 1 else 0.05)
    return max(errors)


def judge(baseline: Record, now: Record) -> list[Verdict]:
    """Every ratio that both could have: those of the baseline at lengths that were measured now."""
    measured = {ratio.name: ratio for ratio in ratios(now)}
    lengths = {int(r["tokens"]) for r in now["figures"]}
    tried = {r["label"].split(" chunks")[0] for r in now["figures"]}
    verdicts = []
    for then in ratios(baseline):
        if int(then.name.rsplit("= ", 1)[1]) not in lengths:
            continue
        if "materialised" in then.name and "attention materialised" not in tried:
            continue
        found = measured.get(then.name)
        noise = math.hypot(then.noise, found.noise) if found else then.noise
        tolerance = max(LEAST_TOLERANCE, NOISE_FACTOR * noise)
        verdicts.append(Verdict(then.name, then.value, found.value if found else None, tolerance))
    return verdicts


def read(path: Path) -> Record:
    """A stored report. UnusableError for anything else."""
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise UnusableError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UnusableError(f"{path} is damaged, expected a report of run.py, got {error}") from None
    try:
        found = ratios(report)
        usable = all(math.isfinite(r.value) and r.value > 0 and math.isfinite(r.noise) for r in found)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UnusableError(
            f"{path} is no report of run.py, or is damaged: {type(error).__name__} {error}"
        ) from None
    if not found or not usable:
        raise UnusableError(f"{path} holds no ratio to compare with; run `make bench` on a quiet machine")
    return dict(report)


def find_baseline(slug: str, folder: Path = RESULTS) -> Path:
    """The stored report of this machine."""
    path = folder / f"cpu-{slug}.json"
    if path.is_file():
        return path
    others = ", ".join(sorted(p.name for p in folder.glob("cpu-*.json"))) or "none"
    raise UnusableError(
        f"no baseline of this machine, expected {path.name}, got {others};"
        " run `make bench` on it while it is quiet, or name one with --baseline"
    )


def measure(tokens: Sequence[int], threads: int) -> Record:
    """The figures of the ratios, now."""
    from run import run

    figures: list[Any] = []
    report: Record = {}
    for T in tokens:
        wanted = [name for name in ONLY if "materialised" not in name or T <= MATERIALISED_TOKENS]
        with tempfile.TemporaryDirectory(prefix="lmtt-bench-") as scratch:
            report = run([T], threads, None, wanted, Path(scratch))
        figures += report["figures"]
    return {**report, "figures": figures}


def fail(error: UnusableError) -> NoReturn:
    print(f"bench-check: {error}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--baseline", type=Path, help="a report of run.py [that of this machine]")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--now", type=Path, help="a report to judge, in place of measuring")
    options = parser.parse_args()
    try:
        if options.baseline is None:
            from run import machine, slug

            options.baseline = find_baseline(slug({"machine": machine(options.threads)}))
        baseline = read(options.baseline)
        now = measure(options.tokens, options.threads) if options.now is None else read(options.now)
    except UnusableError as error:
        fail(error)
    verdicts = judge(baseline, now)
    if not verdicts:
        fail(UnusableError(f"{options.baseline} has none of the lengths {options.tokens}"))
    for verdict in verdicts:
        print(verdict.line())
    busy = now["machine"].get("busy_with_others", 0.0)
    if busy > 0.1:
        print(f"others used {busy:.2g} processors meanwhile: a ratio that is worse may be theirs")
    sys.exit(1 if any(verdict.worse for verdict in verdicts) else 0)


if __name__ == "__main__":
    main()
