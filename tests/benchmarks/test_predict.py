"""The fit finds what made the numbers and is judged on other runs; the scaling page adds up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtt.profile.ceilings import DATA_SHEETS, Ceilings
from lmtt.profile.dims import dims_of
from lmtt.profile.planning import Planned
from lmtt.profile.predict import Efficiency, predict
from lmtt.streaming.plan import WORKSPACE, Plan, Weights, estimate
from lmtt.testing_models import tiny_model

PHASES = ("prompt", "dry run", "read", "decode", "forward", "closure", "screening", "exact evaluation",
          "reduction", "transfer", "lens", "graph")  # fmt: skip
TRUE = Efficiency(
    {**dict.fromkeys(PHASES, 0.5), "forward": 0.25, "lens": 0.4},
    dict.fromkeys(PHASES, 0.3),
    {"forward": 1e-3, "screening": 2e-3},
)


@pytest.fixture
def machine() -> Ceilings:
    sheet = next(iter(DATA_SHEETS.values()))
    return replace(sheet, source="measured", device="cpu", bus=None, disk=1e8)


@pytest.fixture(params=[True, False], ids=["resident", "streamed"])
def cells(request: pytest.FixtureRequest, machine: Ceilings) -> list[Any]:
    """Runs that took exactly what the model says at TRUE."""
    import predict as benchmark

    dims = dims_of(tiny_model("llama"), torch.float32)
    size = dims.layer_parameters * 4
    weights = Weights(dims.parameters * 4, 1000, size, size, size * dims.shapes.layers)
    lengths = (64, 128, 512, 1024, 2048, 4096)
    group = benchmark.Group(benchmark.DEMO, "float32", None if request.param else 1.0, lengths)
    found = []
    for T in lengths:
        room = estimate(dims.shapes, weights, [T], resident=request.param, ring=size, workspace=WORKSPACE)
        plan = Plan(request.param, WORKSPACE, room)
        said = predict(dims, machine, [T], plan, weights, first=False, efficiency=TRUE)
        seconds = {name: one.seconds for name, one in said.phases.items()}
        planned = Planned("tiny", T, 1 << 40, "", dims, weights, plan, machine, said)
        found.append(benchmark.Cell(group, T, said.seconds, seconds, (0.0, 0.0), said.reading, 1.0, planned))
    return found


def test_the_fit_finds_what_made_the_numbers(cells: list[Any], machine: Ceilings) -> None:
    import predict as benchmark

    found = benchmark.fit(cells[::2], machine)
    forward = "forward" if cells[0].group.times is None else "forward, streamed"
    assert found.share[forward] == pytest.approx(0.25, rel=1e-6)
    assert found.extra[forward] == pytest.approx(1e-3, rel=1e-6)
    rows, _ = benchmark.judge(cells, machine)
    assert [row["fitted"] for row in rows] == [True, False] * 3
    assert all(abs(benchmark.off(row)) < 1e-6 for row in rows)


@pytest.mark.parametrize(("factor", "passes"), [(1.2, True), (0.85, True), (1.5, False), (0.6, False)])
def test_the_other_half_is_judged(factor: float, passes: bool, cells: list[Any], machine: Ceilings) -> None:
    import predict as benchmark

    odd = [
        replace(cell, wall=cell.wall * factor, seconds={k: v * factor for k, v in cell.seconds.items()})
        if number % 2
        else cell
        for number, cell in enumerate(cells)
    ]
    rows, _ = benchmark.judge(odd, machine)
    assert all(abs(benchmark.off(row)) < 1e-6 for row in rows if row["fitted"])
    assert benchmark.missed(rows) == ([] if passes else [cell.name for cell in odd[1::2]])
    assert ("MISSED" in "\n".join(benchmark.lines(rows))) is not passes


def test_a_prediction_that_is_no_number_is_missed(cells: list[Any], machine: Ceilings) -> None:
    import predict as benchmark

    rows, _ = benchmark.judge(cells, machine)
    rows[1]["predicted_total"] = float("nan")
    assert benchmark.missed(rows) == [rows[1]["name"]]


def test_no_share_is_negative(cells: list[Any], machine: Ceilings) -> None:
    import predict as benchmark

    # The more work, the less time: extra seconds only.
    falling = [
        replace(cell, seconds=dict.fromkeys(cell.seconds, 1 / (number + 1)))
        for number, cell in enumerate(cells)
    ]
    found = benchmark.fit(falling, machine)
    assert all(share > 0 for share in found.share.values())
    assert all(extra >= 0 for extra in found.extra.values())


def test_the_grid_has_both_halves_of_everything() -> None:
    import predict as benchmark

    groups = benchmark.grid(quick=False)
    assert {g.model for g in groups} == {benchmark.DEMO, *benchmark.LLAMAS}
    assert {g.dtype for g in groups} == {"float32", "bfloat16"}
    assert len({g.times for g in groups} - {None}) >= 3
    for half in (0, 1):
        lengths = [T for g in groups for T in g.lengths[half::2]]
        assert min(lengths) <= 128
        assert max(lengths) >= 2048
    assert all(len(g.lengths) >= 2 for g in groups)


def test_efficiencies_are_written_as_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import predict as benchmark

    target = tmp_path / "efficiency.py"
    target.write_text(benchmark.EFFICIENCY.read_text())
    monkeypatch.setattr(benchmark, "EFFICIENCY", target)
    benchmark.write_efficiency(
        Efficiency({"forward": 0.5}, {"forward": 0.25}, {"forward": 1e-4}), "a machine"
    )
    found: dict[str, Any] = {}
    code = compile(target.read_text(), "efficiency.py", "exec")
    eval(code, found)
    assert found["SHARE"] == {"forward": 0.5}
    assert found["MEMORY_SHARE"] == {"forward": 0.25}
    assert found["EXTRA"] == {"forward": 1e-4}


def test_the_scaling_page() -> None:
    import scaling

    small = scaling.Model("small", "LlamaConfig", scaling._llama(4, 256, 4, 512))
    found = list(scaling.cases([small], (512, 4096)))
    assert len(found) == 2 * len(scaling.PRICES)
    for case in found:
        assert case.plan is not None
        assert case.one is not None
        assert case.plan.resident
        assert 0 < case.each <= case.one.seconds  # nothing is discovered or proved anew
        assert case.light < case.stored
    text = scaling.page(found, None)
    assert "Predictions, none of them measured" in text
    assert text.count("| H100 |") == 2
    refused = scaling.case("small", *scaling.sizes(small), scaling.data_sheet("H100"), 10_000_000)
    assert refused.plan is None
    assert "needs" in scaling.page([refused], None)


def test_seconds_of_a_slow_moment_are_judged_at_the_ceilings_pace() -> None:
    import predict as benchmark

    assert benchmark.at_pace([1.0, 0.5, 0.8], [2.0, 4.0, 2.5]) == pytest.approx(2.0)
