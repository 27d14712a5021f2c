"""A ratio that became worse fails, noise does not; what cannot be read is one line and exit status 2."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def figure(what: str, method: str, seconds: list[float], screen: float | None = None, **more: Any) -> Any:
    measured: dict[str, Any] = {"seconds": seconds, "workspace": 0, "peak": 0}
    if what in ("attention", "neurons"):
        measured = {"by_layer": [{"layer": layer, "evaluated": 1, **measured} for layer in (5, 15)]}
    label = f"{what} {method}" + (f" screen {screen:g}" if screen is not None else "")
    return {"label": label, "what": what, "method": method, "tokens": 256, "screen": screen, "chunks": None,
            "status": "ok", **measured, **more}  # fmt: skip


def scattered(seconds: float, noise: float = 0.01) -> list[float]:
    return [seconds * (1 + noise * step) for step in (-2, -1, 0, 0, 1, 2, 3)]


def report(ours: float = 0.01, noise: float = 0.01) -> dict[str, Any]:
    return {
        "figures": [
            figure("attention", "ours", scattered(ours, noise), screen=1e-3),
            figure("attention", "plain_torch", scattered(0.3)),
            figure("forward", "all", scattered(0.5)),
            figure("everything", "ours", scattered(1.0), screen=1e-3, attribution=scattered(0.2)),
        ],
        "machine": {"cpu": "A processor", "isa": "avx2", "threads": 2, "busy_with_others": 0.0},
        "commit": {"commit": "0123456789abcdef", "modified": False},
        "created": "2026-01-02T03:04:05+00:00",
    }


def worse(now: dict[str, Any], baseline: dict[str, Any]) -> set[str]:
    import check

    verdicts = check.judge(baseline, now)
    assert verdicts
    return {verdict.name for verdict in verdicts if verdict.worse}


def test_equal_and_faster_pass() -> None:
    assert worse(report(), report()) == set()
    assert worse(report(ours=0.005), report()) == set()


def test_slower_fails_by_name() -> None:
    assert worse(report(ours=0.013), report()) == {"attention, screen 1e-3 / plain torch, T = 256"}
    slow = report()
    slow["figures"][3]["attribution"] = scattered(0.26)
    assert worse(slow, report()) == {"attribution / plain forward, T = 256"}


def test_tolerance_follows_the_noise() -> None:
    assert worse(report(ours=0.013, noise=0.15), report()) == set()
    assert worse(report(ours=0.0108), report()) == set()


def test_a_slower_machine_is_no_slower_attribution() -> None:
    now = report()
    for one in now["figures"]:
        for holder in one.get("by_layer", [one]):
            holder["seconds"] = [3 * s for s in holder["seconds"]]
        if "attribution" in one:
            one["attribution"] = [3 * s for s in one["attribution"]]
    assert worse(now, report()) == set()


def test_what_failed_or_is_not_a_number_is_worse() -> None:
    now = report()
    now["figures"][0]["status"] = "failed: MemoryError"
    assert worse(now, report()) == {"attention, screen 1e-3 / plain torch, T = 256"}
    now = report()
    now["figures"][3]["attribution"] = [float("nan")] * 3
    assert worse(now, report()) == {"attribution / plain forward, T = 256"}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"figures": []}', '{"figures": [{"status": "ok"}]}', "null"],
)
def test_a_damaged_baseline_is_one_line(content: str, benchmarks_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(content)
    done = subprocess.run(
        [sys.executable, str(benchmarks_folder / "check.py"), "--baseline", str(path), "--now", str(path)],
        capture_output=True, text=True, check=False, env={"PYTHONSAFEPATH": ""},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("bench-check: ")


def test_exit_status(benchmarks_folder: Path, tmp_path: Path) -> None:
    then, now = tmp_path / "then.json", tmp_path / "now.json"
    then.write_text(json.dumps(report()))
    for ours, status in ((0.01, 0), (0.02, 1)):
        now.write_text(json.dumps(report(ours=ours)))
        done = subprocess.run(
            [sys.executable, str(benchmarks_folder / "check.py"), "--baseline", str(then), "--now", str(now)],
            capture_output=True, text=True, check=False, env={"PYTHONSAFEPATH": ""},
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert ("WORSE" in done.stdout) is bool(status)


def test_no_baseline_says_what_to_do(tmp_path: Path) -> None:
    import check

    with pytest.raises(check.UnusableError, match="make bench"):
        check.find_baseline("a-machine", tmp_path)


def test_history_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="only `make bench` installs it")
    import check
    import performance

    path = tmp_path / "history.json"
    assert "Nothing is measured yet" in performance.page([])
    performance.add(report(), path)
    later = copy.deepcopy(report(ours=0.005)) | {
        "commit": {"commit": "fedcba98", "modified": True},
        "created": "2026-02-02T00:00:00+00:00",
    }
    performance.add(later, path)
    entries = performance.add(later, path)  # the same commit again takes the place of the first
    assert [entry["commit"][:8] for entry in entries] == ["01234567", "fedcba98"]
    (tmp_path / "images").mkdir()
    performance.write(entries, tmp_path)
    text = (tmp_path / "performance.md").read_text()
    assert "| attention, screen 1e-3 / plain torch, T = 256 | 0.0333 | 0.0167 |" in text
    assert (tmp_path / "images" / performance.picture(entries[0]["machine"])).exists()
    path.write_text('[{"commit": 3}]')
    with pytest.raises(check.UnusableError, match="damaged"):
        performance.load(path)
