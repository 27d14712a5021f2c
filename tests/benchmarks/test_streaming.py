"""The random Llamas are sane and have something to attribute; streaming is measured and judged as it says."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

KINDS = ("Q4_0", "Q4_1", "Q4_K", "BF16")
TOKENS = 48


def written(folder: Path, kind: str, seed: int = 0) -> Path:
    import llama_file

    path = folder / (kind if kind == "BF16" else f"{kind}.gguf")
    llama_file.write(path, llama_file.SHAPES["small"], kind, seed, leave=0)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_as_large_as_asked_and_balanced(tmp_path: Path, kind: str) -> None:
    import llama_file

    import lmtt

    path = written(tmp_path, kind)
    model = lmtt.load(str(path)).model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for entry in llama_file.entries(llama_file.SHAPES["small"]):
        values = parameters[entry.hf].detach()
        assert torch.isfinite(values).all()
        assert tuple(values.shape) == entry.shape
        if entry.vector is not None:
            np.testing.assert_allclose(values.numpy(), entry.vector, rtol=0.01)
            continue
        if entry.embedding:
            values = values[:, llama_file.RESERVED :]
        assert abs(float(values.std()) / entry.std - 1) < 0.03, entry.hf
        assert abs(float(values.mean())) < 0.02 * entry.std, entry.hf
    usual, special = llama_file.planted(llama_file.SHAPES["small"])
    rows = parameters["model.embed_tokens.weight"][:2, : llama_file.RESERVED].detach().numpy()
    np.testing.assert_allclose(rows, [special, usual], rtol=0.01)


@pytest.mark.parametrize("kind", ["Q4_0", "BF16"])
def test_attribution_finds_something(tmp_path: Path, kind: str) -> None:
    import streaming
    import streaming_measure

    import lmtt

    engine = lmtt.load(str(written(tmp_path, kind)))
    trace = engine.trace(input_ids=streaming_measure.prompt(TOKENS, engine.info.d_vocab))
    rms = np.sqrt(np.mean(np.square(trace.data.resid_pre), axis=(1, 2)))
    assert np.all((rms > 0.5) & (rms < 5))
    pairs = engine.info.n_layers * engine.info.n_heads * TOKENS * (TOKENS + 1) / 2
    assert trace.cost["pairs"]["evaluated"] / pairs >= streaming.SURVIVORS
    assert streaming_measure._rows_off_by(trace.data) < 1e-5
    strongest = max(trace.attention(layer)[:, 0].mean() for layer in range(engine.info.n_layers))
    assert strongest > 2 / TOKENS  # the sink
    assert len(trace.route(threshold=streaming_measure.ROUTE_THRESHOLD).edges) > 0


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    first = written(tmp_path, "Q4_0").read_bytes()
    again = written(tmp_path, "Q4_0").read_bytes()
    other = written(tmp_path, "Q4_0", seed=1).read_bytes()
    assert first == again
    assert first != other


def test_too_little_room_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import llama_file

    usage = namedtuple("usage", "total used free")  # as shutil's
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(2e12, 1e12, 50e9))
    with pytest.raises(SystemExit) as ended:
        llama_file.write(tmp_path / "m.gguf", llama_file.SHAPES["70b"], "Q4_0")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "expected 59.7 GB free (39.7 to write, 20.0 to leave), got 50.0" in said
    assert not list(tmp_path.iterdir())


def test_the_three_ways_are_measured(tmp_path: Path) -> None:
    import streaming
    import streaming_measure

    path = written(tmp_path, "BF16")
    for what in ("ours", "disk", "plain"):
        streaming.warm(path)
        figure = streaming_measure.Figure(what, str(path), TOKENS, 1, "1GiB" if what == "ours" else "")
        got = streaming_measure.FIGURES[what](figure)
        assert all(0 < seconds < 60 for seconds in got["seconds"].values())
        assert got["seconds"]["total"] == pytest.approx(got["seconds"]["load"] + got["seconds"]["run"])
        assert 0 <= got["peak_above_load"] < 1 << 30
        assert got["peak_rss"] > 1 << 26
    assert streaming.nbytes(path) == (path / "model.safetensors").stat().st_size


def test_the_large_one_and_its_parts_are_measured(tmp_path: Path) -> None:
    import streaming
    import streaming_measure

    path = written(tmp_path, "Q4_0")
    result: dict[str, Any] = {"checkpoint_bytes": streaming.nbytes(path)}
    for what in ("rates", "read", "large"):
        figure = streaming_measure.Figure(what, str(path), TOKENS, 1, "300MiB")
        result[what] = {"status": "ok", **streaming_measure.FIGURES[what](figure)}
    large = result["large"]
    assert large["finite"]
    assert len(large["layer_seconds"]) == large["layers"] == 4
    assert result["read"]["bytes"] == path.stat().st_size
    seconds = result["rates"]["seconds"]
    assert all(value > 0 for value in seconds.values())
    layers = 4 * (seconds["dequantise"] + seconds["multiply"])
    assert streaming.compute_seconds(result) > layers
    gates = {gate.name: gate for gate in streaming.large_gates(result)}
    assert gates["survivors"].passed
    assert gates["rows whose shares miss 1, by"].passed
    assert gates["largest closure error"].passed
    result["large"] = {"status": "failed: out of memory"}
    assert streaming.large_gates(result) == []


@pytest.mark.parametrize(("got", "passed"), [(1.0, True), (1.2, False), (math.nan, False)])
def test_a_gate_is_judged(got: float, passed: bool) -> None:
    import streaming

    assert streaming.Gate("time", got, 1.1).passed is passed
    assert streaming.Gate("share", -got, -1.1, least=True).passed is passed
