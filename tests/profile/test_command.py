"""`lmtt plan`, `profile`, `show --cost` as a user meets them: what is printed, and mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmtt
from lmtt.cli import main
from lmtt.profile import chrome


@pytest.fixture
def folder(checkpoint: Callable[..., Path]) -> str:
    return str(checkpoint("llama"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_plan(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", folder, "--tokens", "32", "--memory", "1GiB")
    assert (code, err) == (0, "")
    assert "fits: weights stay in memory" in out
    code, out, _ = run(capsys, "plan", folder, "--tokens", "32", "--memory", "1GiB", "--json", "-")
    content = json.loads(out)
    assert content["schema"] == "lmtt.plan/1"
    assert content["bytes"]["total"] <= content["limit_bytes"] == 2**30
    assert content["seconds"]["total"] > 0


def test_profile(folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, report = str(tmp_path / "trace.json"), str(tmp_path / "profile.json")
    code, out, _ = run(capsys, "profile", folder, "--tokens", "12", "--trace", trace, "--json", report)
    assert code == 0
    assert "forward" in out
    assert "named" in out
    assert list(chrome.defects(json.loads(Path(trace).read_text(), parse_constant=pytest.fail))) == []
    content = json.loads(Path(report).read_text())
    assert content["schema"] == "lmtt.profile/1"
    assert content["seconds"]["named"] >= 0.97 * content["seconds"]["wall"]
    assert content["plan"]["bytes"]["total"] > 0
    for phase in content["phases"].values():
        assert phase["bound"] in ("compute", "memory", "disk", "bus", "launch")


def test_profile_of_a_model_on_disk(folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device maps are accelerate's")
    asked = ["profile", folder, "--tokens", "12", "--json", "-", "--device-map", '{"": "disk"}']
    code, out, err = run(capsys, *asked, "--offload-folder", str(tmp_path))
    assert code == 0, err
    assert json.loads(out)["schema"] == "lmtt.profile/1"
    code, _, err = run(capsys, *asked, "--memory", "1GiB")
    assert code == 2
    assert "device_map excludes memory" in err


@pytest.mark.native
def test_profile_beside_another_backend(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "profile", folder, "--tokens", "12", "--compare", "reference", "--json", "-")
    content: dict[str, Any] = json.loads(out)
    assert code == 0
    assert content["backend"]["attention_contributions"] == "cpp"
    assert content["compared_with"]["backend"]["attention_contributions"] == "reference"
    total = content["comparison"]["total"]
    assert total["ratio"] == pytest.approx(total["second"] / total["first"])


def test_costs_of_runs(folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    engine = lmtt.load(folder)
    a, b = str(tmp_path / "a"), str(tmp_path / "b.lmtt")
    engine.trace(input_ids=range(9), out=a)
    engine.trace(input_ids=range(1, 10)).save(b)
    code, out, _ = run(capsys, "show", a, "--cost")
    assert code == 0
    assert "planned" in out
    assert "weights that stay" in out
    code, out, _ = run(capsys, "show", a, "--cost", "--compare", b)
    assert code == 0
    assert "ratio" in out
    code, out, _ = run(capsys, "show", a, "--cost", "--json", "-")
    assert json.loads(out)["cost"]["plan"]["resident"] is True
    code, out, _ = run(capsys, "profile", folder, "--tokens", "9", "--compare", a)
    assert code == 0
    assert "ratio" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "FOLDER", "--tokens", "32", "--memory", "1MiB"], "at least"),
        (["plan", "FOLDER", "--tokens", "32", "--device", "abacus"], "unknown device"),
        (["plan", "FOLDER", "--tokens", "many"], "--tokens"),
        (["plan", "no/such/model/here", "--tokens", "8"], "no such model"),
        (["plan", "FOLDER"], "--tokens"),
        (["profile", "FOLDER", "--tokens", "0"], "1 or more"),
        (["profile", "FOLDER", "--tokens", "100"], "at most 64"),
        (["profile", "FOLDER", "--prompt", "words"], "no tokenizer"),
        (["profile", "FOLDER", "--tokens", "8", "--compare", "no-such-run"], "no run no-such-run"),
        (["profile", "FOLDER", "--tokens", "8", "--trace", "no/such/folder/t.json"], "cannot write"),
        (["show", "FOLDER", "--cost"], "lmtt:"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], expected: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *[folder if a == "FOLDER" else a for a in arguments])
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1


def test_a_run_that_measured_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lmtt.graph.testing import random_trace
    from lmtt.run.writer import write_run

    write_run(tmp_path / "run", random_trace(0))
    code, _, err = run(capsys, "show", str(tmp_path / "run"), "--cost")
    assert code == 2
    assert "nothing that was measured" in err
