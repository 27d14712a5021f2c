"""The runner finishes, writes what it says, and judges by the figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch


def record(
    what: str, method: str, tokens: int, seconds: float, screen: float | None = None, **more: Any
) -> Any:
    measured: dict[str, Any] = {"workspace": 1 << 20, "peak": 1 << 30, "seconds": [seconds]}
    if what in ("attention", "neurons"):
        measured = {"by_layer": [{"layer": 5, "evaluated": 1000, **measured}]}
    return {
        "label": method, "what": what, "method": method, "tokens": tokens, "screen": screen, "chunks": None,
        "status": "ok", **measured, **more,
    }  # fmt: skip


def a_report(figures: list[Any]) -> dict[str, Any]:
    return {
        "figures": figures,
        "machine": {"threads": 2},
        "ceilings": {"2": {"multiply_adds": 100.0}},
        "model": {"n_layers": 30, "n_heads": 9, "d_model": 576, "d_head": 64},
    }


def judged(figures: list[Any], start: str) -> Any:
    import report

    (gate,) = [g for g in report.gates(a_report(figures)) if g.name.startswith(start)]
    return gate


@pytest.mark.parametrize(("peer_seconds", "passed"), [(0.21, True), (0.19, False), (float("nan"), False)])
def test_a_ratio_is_judged(peer_seconds: float, passed: bool) -> None:
    figures = [
        record("attention", "ours", 256, 0.01, screen=1e-3),
        record("attention", "ours", 256, 0.5, screen=0.0),
        record("attention", "plain_torch", 256, peer_seconds),
    ]
    gate = judged(figures, "attention vs plain torch, screen 1e-3, T = 256")
    assert gate.passed is passed
    assert judged(figures, "attention vs plain torch, screen 1e-3, T = 1024").passed is None


def test_a_peer_that_ran_out_of_time_is_no_pass() -> None:
    slow = record("attention", "plain_torch", 256, 1.0) | {"status": "over 60 s"}
    figures = [record("attention", "ours", 256, 0.01, screen=1e-3), slow]
    assert judged(figures, "attention vs plain torch, screen 1e-3, T = 256").passed is None


def test_ratios_use_common_layers_only() -> None:
    import report

    ours = record("attention", "ours", 256, 0.01, screen=1e-3)
    ours["by_layer"].append({"layer": 15, "evaluated": 0, "workspace": 0, "peak": 0, "seconds": [1.0]})
    figures = report.Figures([ours, record("attention", "plain_torch", 256, 0.2)])
    assert figures.faster("plain_torch", 256, 1e-3) == pytest.approx(20)


def test_results_are_not_counted_as_workspace() -> None:
    traced = record("everything", "ours", 1024, 1.0, screen=1e-3, result_bytes=70 << 20, attribution=[0.4])
    traced["workspace"] = 300 << 20
    forward = record("forward", "last", 1024, 1.0) | {"workspace": 150 << 20}
    gate = judged([traced, forward], "workspace")
    assert gate.got == pytest.approx(80)
    assert gate.passed


@pytest.mark.parametrize(("others", "said"), [(0.02, False), (0.6, True)])
def test_a_busy_machine_is_told(others: float, said: bool) -> None:
    import report

    result = a_report([record("attention", "ours", 64, 0.01, screen=1e-3)])
    about = {"cpu": "a processor", "isa": "avx2", "cores": 2, "busy_with_others": others}
    result["machine"] |= about
    result["model"]["name"] = "a model"
    result |= {
        "versions": {"torch": "2"}, "commit": {"commit": "0" * 40, "modified": False},
        "created": "2026-01-01T00:00:00", "layers": [5],
    }  # fmt: skip
    assert ("not to be quoted" in report.tables(result)) is said


def test_exponents_are_fitted() -> None:
    import report

    figures = report.Figures(
        [record("attention", "ours", T, 1e-6 * T**1.5, screen=1e-3) for T in (256, 1024, 2048, 4096)]
    )
    assert figures.exponent("attention", "ours", 1e-3) == pytest.approx(1.5)


def test_what_failed_is_not_tried_on_longer_prompts() -> None:
    import run

    figures = [f for f in run.plan((1024, 2048), "", (5,), 2, 0) if f.method == "materialised"]
    name = run.label(figures[0])
    failed = {"label": name, "method": "materialised", "tokens": 1024, "status": "out of memory"}
    assert run.reason_to_skip(figures[1], [failed]) == "out of memory at 1024 tokens"
    assert run.reason_to_skip(figures[1], [failed | {"status": "ok"}]) is None


def test_tables_go_between_the_markers(tmp_path: Path, benchmarks_folder: Path) -> None:
    import report

    readme = tmp_path / "README.md"
    readme.write_text((benchmarks_folder / "README.md").read_text())
    report.write_readme("| new |\n", readme)
    report.write_readme("| newer |\n", readme)
    text = readme.read_text()
    assert text.count("| newer |") == 1
    assert "| new |" not in text
    assert "## Predictions" in text
    assert "![Time" in text


@pytest.mark.native
def test_a_quick_run_writes_a_report(tmp_path: Path, benchmarks_folder: Path) -> None:
    command = [
        sys.executable, str(benchmarks_folder / "run.py"), "--quick", "--tokens", "64", "--model", "tiny",
        "--threads", "1", "--out", str(tmp_path),
        "--only", "attention ours screen 0.001", "attention plain_torch",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"PYTHONSAFEPATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("cpu-*.json")
    result = json.loads(path.read_text())
    assert [figure["status"] for figure in result["figures"]] == ["ok", "ok"]
    for figure in result["figures"]:
        assert all(0 < seconds < 60 for seconds in figure["by_layer"][0]["seconds"])
    assert result["machine"]["threads"] == 1
    assert -0.1 < result["machine"]["busy_with_others"] < (os.cpu_count() or 1)
    assert result["versions"]["torch"]
    assert len(result["gates"]) > 10
    assert "| plain torch, screen 1e-3 |" in done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, benchmarks_folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(benchmarks_folder))
        import measure

        result = tmp_path_factory.mktemp("prepared")
        assert measure.prepare(result, 40, "tiny")["layers"] == (0, 1)
    return result


def test_every_planned_figure_can_be_measured(folder: Path) -> None:
    """Those of one length, in this process; what a parent does with them is tested above."""
    import measure
    import report
    import run

    torch_threads = torch.get_num_threads()
    records = []
    skipped = ("compiled_torch", "flashtrace")  # minutes of compilation; may not be installed
    for figure in run.plan((40,), str(folder), (0, 1), torch_threads, 0):
        if figure.method not in skipped:
            result = measure.FIGURES[figure.what](replace(figure, budget=0.0, call_limit=0))
            known = {"label": run.label(figure), "status": "ok", **asdict(figure), **result}
            records.append(json.loads(json.dumps(known)))
    assert {r["what"] for r in records} == {"attention", "neurons", "forward", "everything"}
    figures = report.Figures(records)
    whole = figures.get("everything", "ours", 40, 1e-3)
    assert whole is not None
    assert 0 < whole["attribution"][0] < whole["seconds"][0]
    named = sum(v for name, v in whole["phases"].items() if name not in ("total", "routes"))
    assert named == pytest.approx(whole["phases"]["total"], rel=0.1)
    assert (
        whole["result_bytes"] > 3 * 40 * 32 * 4
    )  # the residual stream alone: two layers' inputs and the end
    for screen, evaluated in ((0.0, True), (report.SCREENING_ALONE, False)):
        ours = figures.get("attention", "ours", 40, screen)
        assert ours is not None
        assert all((one["evaluated"] > 0) is evaluated for one in ours["by_layer"])


def test_what_takes_turns_is_judged_by_its_turns(folder: Path) -> None:
    import check
    import measure
    import report

    figure = measure.Figure("turns", "attention", 40, str(folder), (0, 1), 1)
    result = measure.measure_turns(figure)
    layers = [one["turns"] for one in result["by_layer"]]
    calls = {"ours 0.001": 9, "ours 0": 9, "plain_torch": 3}  # FlashTrace was given no chunks
    assert [{name: len(seconds) for name, seconds in one.items()} for one in layers] == [calls, calls]
    assert all(second > 0 for one in layers for seconds in one.values() for second in seconds)

    def seconds(ours: float, theirs: float) -> dict[str, list[float]]:
        return {"ours 0.001": [ours] * 3, "plain_torch": [theirs]}

    turns = [{"layer": n, "turns": seconds(*pair)} for n, pair in enumerate([(1.0, 10.0), (3.0, 50.0)])]
    figures = report.Figures(
        [
            record("attention", "ours", 40, 1.0, screen=1e-3),
            record("attention", "plain_torch", 40, 1.0),
            {"label": "turns", "status": "ok", **asdict(figure), "by_layer": turns},
        ]
    )
    assert figures.faster("plain_torch", 40, 1e-3) == pytest.approx(60 / 4)
    names = {ratio.name: ratio.value for ratio in check.ratios({"figures": figures.records})}
    assert names["attention, screen 1e-3 / plain torch, T = 40"] == pytest.approx(4 / 60)


def test_exact_evaluation_is_judged_beside_its_ceiling(folder: Path) -> None:
    import cases
    import measure
    import peers
    import report

    figure = measure.Figure("share", "ours, nothing skipped", 40, str(folder), (0, 1), 1, 0.02)
    result = measure.measure_share(replace(figure))
    assert {len(one["seconds"]) for one in result["by_layer"]} == {measure.SHARES}
    for one in result["by_layer"]:
        case = cases.load(folder / f"layer-{one['layer']}.safetensors", 40)
        assert 0 < one["sources"] <= one["evaluated"]
        everything = peers.sources_above(replace(case.attention, screen=-1.0))
        assert one["sources"] < everything == case.attention.attention.heads * 40
        assert all(0 < seconds < 1 for seconds in one["seconds"])
        assert all(ceiling > 1e8 for ceiling in one["ceiling"])

    # 1000 pairs of 8 coordinates and 10 sources of 2 x 8 multiply-adds, at half and a quarter of the ceiling
    lanes = 1000 * 8 * report.EVALUATION_INSTRUCTIONS + 10 * 2 * 8
    layers = [
        {
            "layer": n,
            "evaluated": 1000,
            "sources": 10,
            "seconds": [part * lanes / 1e9] * 2,
            "ceiling": [1e9] * 2,
        }
        for n, part in enumerate((2, 4))
    ]
    figures = report.Figures([{"label": "share", "status": "ok", **asdict(figure), "by_layer": layers}])
    share = report.kernel_share(figures, 40, 0.02, {"d_model": 8, "d_head": 2})
    assert share == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_weights_lie_as_a_trace_has_them(folder: Path) -> None:
    import cases

    case = cases.load(folder / "layer-0.safetensors", 40)
    stored = cases.as_stored(case)
    w_o, w_down = stored.attention.attention.w_o, stored.neurons.w_down
    assert torch.equal(w_o, case.attention.attention.w_o)
    assert torch.equal(w_down, case.neurons.w_down)
    assert w_o.permute(2, 0, 1).is_contiguous()
    assert w_down.t().is_contiguous()


def test_the_price_of_patching_is_multiplied_out(folder: Path) -> None:
    import measure

    figure = measure.Figure("patching", "zero one head", 40, str(folder), (0,), 1, budget=0.0)
    result = measure.measure_patching(figure)
    assert result["importances"] == 2 * 4 * 40  # layers, heads, positions
    assert len(result["seconds"]) >= 1


def test_a_call_over_its_limit_is_told_from_a_failure(
    tmp_path: Path, benchmarks_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import run

    endless = "import signal, time; signal.setitimer(signal.ITIMER_REAL, 0.05); time.sleep(30)"
    broken = "raise ValueError('no such figure')"
    for text, status in (
        (endless, f"over {run.CALL_LIMIT} s"),
        (broken, "failed: ValueError: no such figure"),
    ):
        (tmp_path / "measure.py").write_text(text)
        monkeypatch.setattr(run, "HERE", tmp_path)
        assert run.child({}, 1)[0]["status"] == status


def test_too_little_memory_is_told(tmp_path: Path, benchmarks_folder: Path) -> None:
    import cases
    import measure
    import run

    from lmtt.engine import load
    from lmtt.testing_models import tiny_model

    engine = load(tiny_model("llama", attention_bias=False, mlp_bias=False, max_position_embeddings=1024))
    (case,) = cases.capture(engine, cases.token_ids(engine, 800), (0,))
    cases.save(case, tmp_path / "layer-0.safetensors")
    figure = measure.Figure(
        "attention", "materialised", 800, str(tmp_path), (0,), 1, memory_limit=400 << 20, call_limit=60
    )
    assert run.child(asdict(figure), 1)[0]["status"] == "out of memory"


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import plots

    figures = [
        record("attention", method, T, 1e-6 * T * factor, screen=screen)
        for T in (64, 256)
        for method, screen, factor in (("ours", 1e-3, 1), ("plain_torch", None, 20), ("ours", 0.0, 5))
    ]
    settings = {"memory_limit_bytes": 1 << 34}
    about = {"threads": 2, "cpu": "a processor"}
    result = a_report(figures) | {"settings": settings, "machine": about}
    result["model"]["name"] = "a model"
    plots.draw(result, tmp_path)
    for name in ("bench-time.svg", "bench-memory.svg"):
        text = (tmp_path / name).read_text()
        assert text.rstrip().endswith("</svg>")
        assert "plain torch" in text
        assert "ours, screen 1e-3" in text
