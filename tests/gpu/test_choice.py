"""Which GPU engine `auto` takes and why, and what kernels tell beside their results."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import lmtt
from lmtt.errors import InputError
from lmtt.kernels import crossover, notices, registry
from lmtt.kernels.backends import reference_backend
from lmtt.loop import Log
from lmtt.testing_models import tiny_model


@pytest.fixture
def task(case):
    return case.attention(20, 16, 48)


def test_without_measurements_a_model_says_which_and_why(task, monkeypatch):
    monkeypatch.delenv("LMTT_CROSSOVER", raising=False)
    chosen = crossover.preference("attention_contributions", task, chip="a chip nobody measured")
    assert chosen.order == ("cuda", "triton")
    assert "instruction counts" in chosen.why
    assert crossover.preference("attention_contributions", task) is None, "a task of the CPU"


@pytest.mark.parametrize(("tokens", "first"), [(10, "triton"), (9000, "cuda")])
def test_the_nearest_measurement_decides(case, tokens, first, tmp_path, monkeypatch):
    entries = [
        {"op": "attention_contributions", "tokens": 16, "width": 48, "cuda": 2.0, "triton": 1.0},
        {"op": "attention_contributions", "tokens": 4096, "width": 48, "cuda": 5.0, "triton": 9.0},
        {"op": "neuron_contributions", "tokens": 10, "width": 48, "cuda": 1.0, "triton": 9.0},
    ]
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"crossover": entries}))
    monkeypatch.setenv("LMTT_CROSSOVER", str(path))
    task = case.neurons(4, 8, 48)
    whole = SimpleNamespace(shape=(tokens, 48), is_cuda=True)
    object.__setattr__(task, "whole", whole)
    chosen = crossover.preference("attention_contributions", task, chip="any")
    assert chosen.order[0] == first
    assert "measured at" in chosen.why
    names = registry._order(chosen)
    assert sorted(names) == sorted(registry.BACKENDS)
    assert names.index(first) == 1, "after cpp, before the reference, as without measurements"


def test_a_broken_file_of_measurements_is_named(task, tmp_path, monkeypatch):
    path = tmp_path / "broken.json"
    path.write_text('{"crossover": [{"op": "attention_contributions"}]}')
    monkeypatch.setenv("LMTT_CROSSOVER", str(path))
    with pytest.raises(InputError, match="crossover measurements"):
        crossover.preference("attention_contributions", task, chip="any")


def test_what_a_kernel_says_reaches_the_cost_of_a_run(task, monkeypatch):
    plain = reference_backend.attention_contributions

    def short_of_memory(task):
        notices.say("out of device memory; going on with less")
        return plain(task)

    monkeypatch.setattr(reference_backend, "attention_contributions", short_of_memory)
    with pytest.warns(RuntimeWarning, match="lmtt: out of device memory"):
        _, choice = registry.run("attention_contributions", task, backend="reference")
    assert choice.notes == ("out of device memory; going on with less",)
    log = Log()
    counted = dict.fromkeys(("pairs_evaluated", "pairs_positive", "neurons_evaluated", "rows_reevaluated"), 0)
    log.add(7, SimpleNamespace(checksum=0.0, choices=[choice], **counted), 1e-5)
    whole = Log()
    whole.merge(log)
    assert whole.notices == ["layer 7: attention_contributions: out of device memory; going on with less"]
    assert torch.is_tensor(task.whole)


def test_what_was_said_before_an_interruption_is_in_the_cost_of_the_resumed_run(tmp_path, monkeypatch):
    engine, ids = lmtt.load(tiny_model("llama")), list(range(3, 12))
    engine.trace(input_ids=ids, out=tmp_path / "quiet", keep="light")

    def aloud(plain):
        def said(*args, **options):
            notices.say("out of device memory; going on with less")
            return plain(*args, **options)

        return said

    def stop(done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for name, reason in registry.availability().items():
            if reason is None:
                module = registry.load(name)
                patch.setattr(module, "attention_contributions", aloud(module.attention_contributions))
        with pytest.warns(RuntimeWarning, match="out of device memory"), pytest.raises(KeyboardInterrupt):
            engine.trace(input_ids=ids, out=tmp_path / "run", keep="light", progress=stop)
    monkeypatch.setattr(reference_backend, "unembed_topk", aloud(reference_backend.unembed_topk))
    with pytest.warns(RuntimeWarning, match="out of device memory"):
        trace = engine.trace(input_ids=ids, out=tmp_path / "run", keep="light", resume=True)
    said = "out of device memory; going on with less"
    layers = [f"layer {layer}: attention_contributions: {said}" for layer in (0, 1)]
    assert trace.cost["notices"] == [*layers, f"unembed_topk: {said}"]
    assert lmtt.open(tmp_path / "run").cost["notices"] == trace.cost["notices"]
    resumed, quiet = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.name != "cost.json"}
        for name in ("run", "quiet")
    )
    assert resumed == quiet, "what was said is in no other file"
