"""A streamed model gives what the resident one gives, to the last bit, and reads its layers once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmtt
from lmtt.errors import InputError
from lmtt.streaming.plan import parse_bytes
from lmtt.streaming.weights import ResidentWeights, StreamedWeights
from lmtt.testing import assert_same_trace

Make = Callable[[str], Path]
PROMPTS = [np.arange(11) * 7 % 97, np.arange(5) + 3, np.arange(8) * 5 % 97]


@pytest.mark.usefixtures("always_streamed")
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe", "gemma2"])
def test_same_bits_within_three_limits(checkpoint: Make, name: str) -> None:
    folder = checkpoint(name)
    resident = lmtt.load(str(folder))
    want = [resident.trace(input_ids=ids) for ids in PROMPTS]
    for limit in ("101MiB", "110MiB", "2GiB"):
        engine = lmtt.load(str(folder), memory=limit)
        assert isinstance(engine._weights, StreamedWeights)
        for ids, trace in zip(PROMPTS, want, strict=True):
            got = engine.trace(input_ids=ids)
            assert_same_trace(got, trace)
        route, same = (t.route(-1, 0.04).to_json() | {"cost": None} for t in (got, trace))
        assert route == same
    assert np.array_equal(got.contribution_map(1, 2), trace.contribution_map(1, 2))
    assert got.neurons(1, 3, k=3) == trace.neurons(1, 3, k=3)


@pytest.mark.model
def test_smollm2_from_gguf_within_three_limits(demo_engine: Any) -> None:
    ids = np.arange(12) * 37 + 5
    want = demo_engine.trace(input_ids=ids)
    for limit in ("128MiB", "160MiB", "2GiB"):
        engine = lmtt.load(device="cpu", memory=limit)
        assert engine.resident == (limit == "2GiB")
        got = engine.trace(input_ids=ids)
        assert_same_trace(got, want)
        assert got.cost["measured"]["limit"] == parse_bytes(limit)
    route, same = (t.route(-1, 0.04).to_json() | {"cost": None} for t in (got, want))
    assert route == same


@pytest.mark.usefixtures("always_streamed")
def test_targets_are_attributed_while_a_run_is_stored(checkpoint: Make, tmp_path: Path) -> None:
    engine = lmtt.load(str(checkpoint("llama")), memory="101MiB")
    ids = PROMPTS[1]
    want = engine.trace(input_ids=ids, targets=[7]).logit_contributions(7)
    stored = engine.trace(input_ids=ids, targets=[7], out=tmp_path / "run")
    read = engine._weights.bytes_read
    got = stored.logit_contributions(7)
    assert engine._weights.bytes_read == read
    again = lmtt.open(tmp_path / "run", engine=engine).logit_contributions(7)  # another pass
    assert engine._weights.bytes_read > read
    for one in (got, again):
        np.testing.assert_array_equal(one.heads, want.heads)
        assert np.isfinite(one.heads).all()
        assert one.total == want.total


@pytest.mark.usefixtures("always_streamed")
def test_prompts_of_a_list_share_each_read(checkpoint: Make) -> None:
    folder = checkpoint("llama")
    engine = lmtt.load(str(folder), memory="101MiB")
    alone = [engine.trace(input_ids=ids) for ids in (PROMPTS[1], PROMPTS[2][:5])]
    before = engine._weights.bytes_read
    together = engine.trace(input_ids=np.stack([PROMPTS[1], PROMPTS[2][:5]]))
    layers = sum(sum(engine._weights._source.tensors[t].nbytes for t in unit.tensors)
                 for unit in engine._weights._assignment.layers)  # fmt: skip
    assert engine._weights.bytes_read - before == layers
    for got, want in zip(together, alone, strict=True):
        assert_same_trace(got, want)


def test_too_little_memory_says_what_would_do(checkpoint: Make) -> None:
    folder = checkpoint("llama")
    with pytest.raises(InputError, match=r"at least ([\d.]+MiB)") as error:
        lmtt.load(str(folder), memory="1MiB")
    enough = str(error.value).split("at least ")[1].split(";")[0]
    lmtt.load(str(folder), memory=enough).trace(input_ids=[5])


def test_what_fits_stays(checkpoint: Make) -> None:
    engine = lmtt.load(str(checkpoint("llama")), memory="2GiB")
    assert not isinstance(engine._weights, StreamedWeights)
    assert len(engine.generate(input_ids=[3, 4], max_new_tokens=2, trace=False).ids) == 2


@pytest.mark.usefixtures("always_streamed")
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe", "gemma2"])
def test_generates_what_the_resident_model_does(checkpoint: Make, name: str) -> None:
    folder = checkpoint(name)
    resident, engine = lmtt.load(str(folder)), lmtt.load(str(folder), memory="110MiB")
    assert isinstance(engine._weights, StreamedWeights)
    read, new = engine._weights.bytes_read, 6
    for sampled in (False, True):
        options = {"input_ids": PROMPTS[1], "max_new_tokens": new, "do_sample": sampled, "seed": 3}
        got, want = (each.generate(**options) for each in (engine, resident))
        np.testing.assert_array_equal(got.ids, want.ids)
        assert_same_trace(got.trace, want.trace)
        np.testing.assert_array_equal(got.shares, want.shares)
    assert len(got.ids) == new
    if name == "llama":  # each token one reading of the layers, and one for each trace
        layers = sum(place.nbytes for place in engine._weights._placements)
        assert 0 < engine._weights.bytes_read - read <= 2 * (new + 1) * layers
    assert not any("forward" in layer.__dict__ for layer in engine._layers)


@pytest.mark.usefixtures("always_streamed")
def test_generating_keeps_the_limit(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = lmtt.load(str(checkpoint("llama")), memory="101MiB")
    weights = engine._weights
    assert isinstance(weights, StreamedWeights)
    with monkeypatch.context() as patch:  # keys and values of many more heads, and no byte to spare
        patch.setattr(weights, "shapes", replace(weights.shapes, kv_heads=512))
        patch.setattr(weights, "_limit", weights.plan([60]).bytes.total)
        with pytest.raises(InputError, match="too little to generate up to 60 tokens, expected at least"):
            engine.generate(input_ids=PROMPTS[1], max_new_tokens=55)
    broken = RuntimeError("broken off")

    def fail(*_: object) -> None:
        raise broken

    hook = engine._layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"):
        engine.generate(input_ids=PROMPTS[1], max_new_tokens=2)
    hook.remove()
    assert len(engine.generate(input_ids=PROMPTS[1], max_new_tokens=2, trace=False).ids) == 2


def test_from_a_prompt_on_that_resident_weights_leave_no_room_for_layers_are_read(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(checkpoint("llama"))
    resident, engine = lmtt.load(folder), lmtt.load(folder, memory="110MiB")
    real = ResidentWeights.workspace

    def for_short(self: ResidentWeights, tokens: Sequence[int], *, full: bool = True) -> int:
        if sum(tokens) > len(PROMPTS[1]):
            raise InputError("too little")
        return real(self, tokens, full=full)

    want = [resident.trace(input_ids=ids) for ids in PROMPTS]
    monkeypatch.setattr(ResidentWeights, "workspace", for_short)
    short = engine.trace(input_ids=PROMPTS[1])
    assert engine.resident
    before = weakref.ref(engine.model)
    assert_same_trace(engine.trace(input_ids=PROMPTS[0]), want[0])
    assert not engine.resident
    gc.collect()
    assert before() is None  # it made room
    assert_same_trace(short, want[1])  # with details from the weights that there are now
    assert_same_trace(engine.trace(input_ids=PROMPTS[1]), want[1])


def test_a_prompt_too_long_for_streaming_too_is_refused_and_the_weights_stay(checkpoint: Make) -> None:
    engine = lmtt.load(str(checkpoint("llama")), memory="48MiB")
    assert engine.resident
    with pytest.raises(InputError, match="too little for 60000 tokens, expected at least"):
        engine._make_room([60000], full=True)
    assert engine.resident
    assert engine.trace(input_ids=[3, 4, 5]).data.edges.weight.size
