"""docs/performance.md and its picture, from stored reports: how ratios went, commit by commit.

    python benchmarks/performance.py [--add REPORT]

`results/history.json` holds an entry for each report that was added: commit, date, machine, ratios with their
noise. `make bench` adds its own. The page is written from that file and the newest report, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from check import RESULTS, UnusableError, fail, ratios, read
from plots import draw_history

HISTORY = RESULTS / "history.json"
DOCS = Path(__file__).parent.parent / "docs"
SHOWN = 20  # newest entries of a machine

INTRODUCTION = """# Performance, commit by commit

Written by `python benchmarks/performance.py` from `benchmarks/results/history.json`; do not edit. Every
number is a ratio of two things measured in one run on one machine ([how](../benchmarks/README.md));
smaller is better. `make bench` adds an entry, `make bench-check` fails when a ratio becomes worse than the
noise of both measurements allows.
"""


def load(path: Path = HISTORY) -> list[dict[str, Any]]:
    """Entries, oldest first. UnusableError if the file is damaged."""
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
        for entry in entries:
            if not all(isinstance(entry[key], str) for key in ("commit", "created", "machine")):
                raise TypeError("an entry without commit, date or machine")
            if not all(math.isfinite(value) and value > 0 for value, _ in entry["ratios"].values()):
                raise ValueError("a ratio that is no positive number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableError(f"{path} is damaged, expected a list of entries, got {error}") from None
    return list(entries)


def entry_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the history keeps of a report."""
    about = report["machine"]
    return {
        "commit": report["commit"]["commit"],
        "modified": report["commit"]["modified"],
        "created": report["created"],
        "machine": f"{about['cpu']} ({about['isa']}, {about['threads']} threads)",
        "quiet": about["busy_with_others"] <= 0.1,
        "ratios": {ratio.name: [ratio.value, ratio.noise] for ratio in ratios(report)},
    }


def add(report: dict[str, Any], path: Path = HISTORY) -> list[dict[str, Any]]:
    """Append a report's entry, in the place of an older one of the same commit and machine."""
    new = entry_of(report)
    same = ("commit", "machine")
    entries = [e for e in load(path) if any(e[key] != new[key] for key in same)]
    entries.append(new)
    entries.sort(key=lambda entry: entry["created"])
    path.write_text(json.dumps(entries, indent=1) + "\n")
    return entries


def page(entries: list[dict[str, Any]]) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    if not entries:
        parts.append("Nothing is measured yet: run `make bench` on a quiet machine.\n")
    for machine in dict.fromkeys(entry["machine"] for entry in reversed(entries)):
        own = [entry for entry in entries if entry["machine"] == machine]
        parts.append(f"## {machine}\n")
        if len(own) > 1:
            parts.append(f"![Ratios by commit](images/{picture(machine)})\n")
        shown = own[-SHOWN:]
        names = list(dict.fromkeys(name for entry in reversed(shown) for name in entry["ratios"]))
        head = ["ratio", *(f"{e['commit'][:8]}{'+' if e['modified'] else ''}" for e in shown)]
        lines = [_row(head), "|" + "---|" * len(head), _row(["date", *(e["created"][:10] for e in shown)])]
        for name in names:
            cells = [e["ratios"].get(name) for e in shown]
            lines.append(_row([name, *("–" if c is None else f"{c[0]:.3g}" for c in cells)]))
        parts.append("\n".join(lines) + "\n")
        if any(not entry["quiet"] for entry in shown):
            loud = ", ".join(entry["commit"][:8] for entry in shown if not entry["quiet"])
            parts.append(f"Others used the processors during {loud}: not to be quoted.\n")
        if any(entry["modified"] for entry in shown):
            parts.append("+: with changes that were not committed.\n")
    return "\n".join(parts)


def picture(machine: str) -> str:
    """The file name of a machine's plot."""
    words = "".join(c.lower() if c.isalnum() else "-" for c in machine).split("-")
    return "history-" + "-".join(word for word in words if word) + ".svg"


def write(entries: list[dict[str, Any]], docs: Path = DOCS) -> None:
    """The page and its plots."""
    for machine in {entry["machine"] for entry in entries}:
        own = [entry for entry in entries if entry["machine"] == machine]
        if len(own) > 1:
            draw_history(own, docs / "images" / picture(machine))
    (docs / "performance.md").write_text(page(entries))


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", type=Path, help="a report of run.py")
    options = parser.parse_args()
    try:
        entries = load() if options.add is None else add(read(options.add))
    except UnusableError as error:
        fail(error)
    write(entries)


if __name__ == "__main__":
    main()
