"""A plan needs the config alone, is the engine's own, and says what would do where something does not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import lmtt
from lmtt.checkpoint.disk import PAGE
from lmtt.errors import CheckpointError, InputError
from lmtt.profile import ceilings
from lmtt.profile.ceilings import DATA_SHEETS, Ceilings, of_this_machine
from lmtt.profile.planning import Planned, plan_run
from lmtt.streaming.weights import StreamedWeights
from lmtt.testing_models import tiny_model

TYPES = ["llama", "gpt2", "gemma2", "mixtral"]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_same_plan_as_the_engine(
    name: str, stored: torch.dtype, checkpoint: Callable[..., Path], always_streamed: None
) -> None:
    folder = checkpoint(name, stored)
    engine = lmtt.load(folder, memory="110MiB")
    weights = engine._weights
    assert isinstance(weights, StreamedWeights)
    planned = plan_run(str(folder), 9, memory="110MiB", device="cpu")
    ours, theirs = planned.weights, weights.weights
    assert (ours.all, ours.rest, ours.decoded_layer) == (theirs.all, theirs.rest, theirs.decoded_layer)
    # On disk, tensors lie where they lie: each may take up to one page more in the reader's buffer.
    rounding = PAGE * len(list(engine.model.parameters()))
    assert ours.raw_total <= theirs.raw_total <= ours.raw_total + rounding
    assert ours.raw_layer <= theirs.raw_layer <= ours.raw_layer + rounding
    assert planned.dims.shapes == weights.shapes


def test_no_weight_is_read(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(checkpoint("llama") / "config.json", tmp_path / "config.json")
    planned = plan_run(str(tmp_path), 20, memory="1GiB", device="cpu")
    assert planned.plan.resident
    assert planned.plan.bytes.total < 1 << 30
    assert planned.prediction.seconds > 0
    assert planned.run_bytes > 20 * 4 * 32 * 4


def test_a_limit_too_small_names_one_that_works(checkpoint: Callable[..., Path]) -> None:
    folder = str(checkpoint("llama"))
    with pytest.raises(InputError, match="too little") as caught:
        plan_run(folder, 40, memory="2MiB", device="cpu")
    named = re.search(r"at least ([\d.]+\wiB)", str(caught.value))
    assert named is not None
    enough = plan_run(folder, 40, memory=named[1], device="cpu")
    assert not enough.plan.resident


def test_a_config_with_an_entry_for_each_layer_is_planned_by_its_largest(tmp_path: Path) -> None:
    """The peak is in the largest layer, wherever it comes."""

    def planned(mlp: list[int]) -> Planned:
        folder = tmp_path / "-".join(map(str, mlp))
        kinds = ["sliding_attention", "full_attention", "full_attention"]
        transformers.Gemma3nTextConfig(
            num_hidden_layers=3, hidden_size=32, intermediate_size=mlp, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, vocab_size=97, vocab_size_per_layer_input=97, laurel_rank=4,
            hidden_size_per_layer_input=8, num_kv_shared_layers=0, layer_types=kinds, altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 3,
        ).save_pretrained(folder)  # fmt: skip
        return plan_run(str(folder), 40, memory="1GiB", device="cpu")

    mixed, moved, even = planned([512, 1024, 256]), planned([256, 512, 1024]), planned([1024] * 3)
    assert mixed.dims.shapes == even.dims.shapes
    assert mixed.dims.shapes.d_mlp == 1024
    assert mixed.dims.kinds == 3
    assert mixed.weights == moved.weights
    assert mixed.plan.bytes == moved.plan.bytes
    assert mixed.weights.raw_layer == even.weights.raw_layer
    # Weights are counted layer by layer: gate, up and down of the two that are smaller.
    assert even.weights.all - mixed.weights.all == 3 * 32 * (512 + 768) * 4
    assert even.plan.bytes.activations == mixed.plan.bytes.activations > 0


def test_experts_in_a_plan(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """All of a layer's experts are memory; one token is multiplied with those that it is routed to."""

    def planned(experts: int, chosen: int, layers: int = 3, memory: str = "1GiB") -> Planned:
        folder = tmp_path / f"{experts}-{chosen}"
        config = json.loads((checkpoint("mixtral") / "config.json").read_text())
        config |= {"num_local_experts": experts, "num_experts_per_tok": chosen,
                   "intermediate_size": 256, "num_hidden_layers": layers}  # fmt: skip
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return plan_run(str(folder), 40, memory=memory, device="cpu")

    few, many, busy = planned(4, 2), planned(16, 2), planned(16, 8)
    D, L = few.dims.shapes.d_model, few.dims.shapes.layers
    expert = 3 * 256 * D
    # The experts and their rows of the router.
    assert many.weights.all - few.weights.all == L * (12 * expert + 12 * D) * 4
    assert many.dims.active - few.dims.active == 12 * D
    assert busy.dims.active - many.dims.active == 6 * expert
    assert few.plan.bytes.resident == few.weights.all
    work = {name: p.prediction.phases["forward"].work for name, p in (("many", many), ("busy", busy))}
    assert work["busy"].operations > work["many"].operations
    # Streamed, the room is for one layer's experts and their packing, and few are read for few tokens.
    streamed = planned(16, 2, 40, "40MiB")
    assert streamed.weights.all > streamed.limit
    assert not streamed.plan.resident
    assert streamed.plan.bytes.decoded >= 16 * expert * 4
    assert streamed.plan.bytes.ring < expert * 4


def test_a_limit_on_a_device_that_is_not_here(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Planning needs no device: the limit is the GPU's, and what the host holds is not counted in it."""
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    large = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "vocab_size": 32000,
             "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "dtype": "bfloat16",
             "max_position_embeddings": 4096}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | large))
    folder = str(tmp_path)
    whole, less = (plan_run(folder, 1024, device="RTX 4090", memory=m) for m in ("20GiB", "1GiB"))
    assert (whole.plan.resident, less.plan.resident) == (True, False)
    assert (whole.limit, less.limit) == (20 * 2**30, 2**30)
    assert less.plan.bytes.total <= less.limit < whole.weights.all
    assert less.prediction.phases["read"].seconds > 0
    assert whole.dims.shapes.device == "cuda"
    with pytest.raises(InputError, match="too little") as caught:
        plan_run(folder, 1024, device="RTX 4090", memory="100MiB")
    named = re.search(r"at least ([\d.]+\wiB)", str(caught.value))
    assert named is not None
    assert not plan_run(folder, 1024, device="RTX 4090", memory=named[1]).plan.resident
    with pytest.raises(
        InputError, match="25GiB is more than there is, expected at most the 24GiB of RTX 4090"
    ):
        plan_run(folder, 1024, device="RTX 4090", memory="25GiB")


def test_more_tokens_take_more(checkpoint: Callable[..., Path]) -> None:
    folder = str(checkpoint("llama"))
    short, long = (plan_run(folder, T, memory="1GiB", device="cpu") for T in (8, 64))
    assert long.plan.bytes.total > short.plan.bytes.total
    assert long.prediction.seconds > short.prediction.seconds
    assert long.run_bytes > short.run_bytes
    assert long.browser_bytes > short.browser_bytes


@pytest.mark.parametrize("name", ["H100", "rtx 4090", "RTX4060"])
def test_a_device_that_is_not_here(name: str, checkpoint: Callable[..., Path]) -> None:
    planned = plan_run(str(checkpoint("llama")), 16, device=name)
    assert planned.ceilings.source == "data sheet"
    assert planned.limit == pytest.approx(0.9 * (planned.ceilings.capacity or 0))
    assert planned.dims.dtype == "float32"  # the checkpoint's own
    text = "\n".join(planned.lines())
    assert "data sheet" in text
    assert "assumed" in text


def test_what_no_plan_can_be_made_for(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = str(checkpoint("llama"))
    with pytest.raises(InputError, match="at most 64 tokens"):
        plan_run(folder, 65)
    with pytest.raises(InputError, match="1 or more"):
        plan_run(folder, 0)
    with pytest.raises(InputError, match=r"unknown device.*H100"):
        plan_run(folder, 8, device="H900")
    with pytest.raises(InputError, match="amount of memory"):
        plan_run(folder, 8, memory="lots")
    with pytest.raises(InputError, match="dtype"):
        plan_run(folder, 8, dtype="int4")
    with pytest.raises(CheckpointError, match="no such model"):
        plan_run(str(tmp_path / "nothing"), 8)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(CheckpointError):
        plan_run(str(tmp_path), 8)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"is not there.*RTX 4090"):
            plan_run(folder, 8, device="cuda")


def test_a_run_stores_its_plan_beside_what_was_measured() -> None:
    engine = lmtt.load(tiny_model("llama"))
    before = engine.trace(input_ids=range(9)).cost
    assert before["plan"]["resident"]
    assert before["plan"]["bytes"]["total"] > before["plan"]["bytes"]["resident"] > 0
    assert (
        "seconds" not in before["plan"]
    )  # this machine's ceilings were not measured, and no run stops for that
    of_this_machine("cpu")
    after = engine.trace(input_ids=range(9)).cost
    planned, measured = after["plan"]["seconds"], after["seconds"]
    assert set(planned) <= set(measured) | {"closure", "store"}
    assert sum(planned.values()) == pytest.approx(2 * planned["total"])


def test_ceilings_are_remembered(monkeypatch: pytest.MonkeyPatch, machine: Ceilings) -> None:
    calls = []
    monkeypatch.setattr(ceilings, "measure", lambda *_: calls.append(1) or machine)
    assert of_this_machine("cpu") == machine
    assert of_this_machine("cpu") == machine
    assert len(calls) == 1
    of_this_machine("cpu", remeasure=True)
    assert len(calls) == 2
    path = ceilings.cache_path("cpu")
    for spoilt in ("", "{", "[]", '{"schema": 99}', path.read_text().replace("20000000000.0", "-1.0")):
        path.write_text(spoilt)
        assert of_this_machine("cpu") == machine, spoilt
    assert len(calls) == 7


def test_data_sheets_are_sane() -> None:
    for sheet in DATA_SHEETS.values():
        assert sheet.flops["bfloat16"] > sheet.flops["float32"] > sheet.flops["float64"]
        assert 1e11 < sheet.memory < 1e13
        assert sheet.bus is not None
        assert sheet.bus < sheet.memory
        assert sheet.capacity is not None
