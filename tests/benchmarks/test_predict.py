"""The fit finds what made the numbers and is judged on other runs; the scaling page adds up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def points(share: float = 0.25, extra: float = 1e-3, **odd: float) -> list[dict[str, Any]]:
    """Runs that follow the model exactly; `odd` multiplies what the unfitted half took."""
    found = []
    for number, ideal in enumerate((0.01, 0.02, 0.1, 0.2, 1.0, 2.0)):
        calls, launch = 30.0, 1e-4
        seconds = calls * extra + launch + ideal / share
        if number % 2:
            seconds *= odd.get("factor", 1.0)
        found.append(
            {
                "name": f"T = {number}",
                "work": {"forward": [calls, ideal, launch, seconds]},
                "seconds": {"forward": seconds, "prompt": 0.1},
            }
        )
    return found


def test_the_fit_finds_what_made_the_numbers() -> None:
    import predict

    shares, extras = predict.fit(points())
    assert shares["forward"] == pytest.approx(0.25, rel=1e-6)
    assert extras["forward"] == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.2, True), (1.5, False), (0.6, False)])
def test_the_other_half_is_judged(factor: float, passes: bool) -> None:
    import predict

    rows, _, _ = predict.judge(points(factor=factor))
    assert [row["fitted"] for row in rows] == [True, False] * 3
    assert all(predict.off(row) < 1e-6 for row in rows if row["fitted"])
    judged = [predict.off(row) <= predict.ALLOWED for row in rows if not row["fitted"]]
    assert all(judged) is passes


def test_no_share_is_negative() -> None:
    import predict

    falling = points()
    for number, point in enumerate(falling):  # the more work, the less time: extra seconds only
        point["seconds"]["forward"] = 1 / (number + 1)
    shares, extras = predict.fit(falling)
    assert shares["forward"] > 0
    assert extras["forward"] >= 0


def test_the_grid_has_both_halves_of_everything() -> None:
    import predict

    grid = predict.grid(quick=False)
    for half in (grid[::2], grid[1::2]):
        assert {p.model for p in half} == {predict.DEMO, *predict.LLAMAS}
        assert {p.dtype for p in half} == {"float32", "bfloat16"}
        assert {p.streamed for p in half} == {None, 1.0, 1.5, 3.0}
        assert min(p.tokens for p in half) <= 128
        assert max(p.tokens for p in half) >= 2048


def test_efficiencies_are_written_as_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import predict

    target = tmp_path / "efficiency.py"
    target.write_text(predict.EFFICIENCY.read_text())
    monkeypatch.setattr(predict, "EFFICIENCY", target)
    predict.write_efficiency({"forward": 0.5}, {"forward": 1e-4}, "a machine")
    found: dict[str, Any] = {}
    code = compile(target.read_text(), "efficiency.py", "exec")
    eval(code, found)
    assert found["SHARE"] == {"forward": 0.5}
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
