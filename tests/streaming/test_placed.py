"""A model that a device map has placed, part of it on disk, gives the resident one's bits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import lmtt
from lmtt.checkpoint.placed import at_hand, is_offloaded, is_placed, moved, named_weights
from lmtt.cli import main
from lmtt.errors import CheckpointError, InputError
from lmtt.streaming.placed import PlacedWeights
from lmtt.testing import assert_same_trace

Make = Callable[[str], Path]
IDS = np.arange(11) * 7 % 97


def spread(folder: Path, disk: Callable[[str], bool]) -> dict[str, str]:
    """A map that names every block: layers, and what lies outside them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{block}.") for block in found) or not list(module.parameters()):
            continue
        if list(module.parameters(recurse=False)) or name.split(".")[-1].isdigit():
            found[name] = "disk" if disk(name) else "cpu"
    return found


MAPS: dict[str, Callable[[str], bool]] = {
    "middle": lambda name: name.split(".")[-1] == "1",
    "layers": lambda name: name.split(".")[-1].isdigit(),
    "ends": lambda name: not name.split(".")[-1].isdigit(),
    "all": lambda name: True,
}


@pytest.mark.parametrize(
    ("name", "disk"),
    [*((name, disk) for name in ("llama", "gpt2", "qwen2_moe") for disk in MAPS), ("gemma2", "all")],
)
def test_same_bits_as_resident(checkpoint: Make, tmp_path: Path, name: str, disk: str) -> None:
    folder = checkpoint(name)
    placed = spread(folder, MAPS[disk])
    resident = lmtt.load(str(folder))
    engine = lmtt.load(str(folder), device_map=placed, offload_folder=tmp_path)
    assert isinstance(engine._weights, PlacedWeights)
    assert not engine.resident
    assert engine.info == resident.info
    off = {n for n, p in engine.model.named_parameters() if p.is_meta}
    assert off  # the map did what it says

    want, got = (e.trace(input_ids=IDS, targets=[5]) for e in (resident, engine))
    assert_same_trace(got, want)
    route, same = (t.route(-1, 0.02).to_json() | {"cost": None} for t in (got, want))
    assert route == same
    np.testing.assert_array_equal(got.contribution_map(1, 2), want.contribution_map(1, 2))
    np.testing.assert_array_equal(*(t.heads(1, source=4, destination=9) for t in (got, want)))
    np.testing.assert_array_equal(got.attention_map(2, 1), want.attention_map(2, 1))
    if name != "qwen2_moe":
        assert got.neurons(1, 3, k=3) == want.neurons(1, 3, k=3)
    assert got.lens(1, 4, "mid", k=4) == want.lens(1, 4, "mid", k=4)
    assert got.promoted(1, 4, ("head", 1)) == want.promoted(1, 4, ("head", 1))
    for target in (5, 7):  # on the way, and by another pass
        ours, theirs = (t.logit_contributions(target) for t in (got, want))
        np.testing.assert_array_equal(ours.heads, theirs.heads)
        assert np.isfinite(ours.heads).all()
        assert ours.total == theirs.total
    assert [p.closures for p in engine.structures()] == [p.closures for p in resident.structures()]

    assert {n for n, p in engine.model.named_parameters() if p.is_meta} == off  # left as it was found
    asked = [
        e.generate(input_ids=IDS[:5], max_new_tokens=3, trace=False).ids.tolist() for e in (engine, resident)
    ]
    assert asked[0] == asked[1]


def test_loaded_models_are_traced_as_they_are_placed(checkpoint: Make, tmp_path: Path) -> None:
    for name in ("llama", "gpt2"):
        folder = checkpoint(name)
        plain, placed = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
            for options in (
                {},
                {"device_map": spread(folder, MAPS["all"]), "offload_folder": tmp_path / name},
            )
        )
        want = lmtt.load(plain).trace(input_ids=IDS)
        engine = lmtt.load(placed)
        got = engine.trace(input_ids=IDS)
        assert_same_trace(got, want)  # which compares the models' fingerprints too
        got.save(tmp_path / f"{name}.lmtt")
        np.testing.assert_array_equal(
            lmtt.open(tmp_path / f"{name}.lmtt", engine=lmtt.load(plain)).contribution_map(0, 1),
            want.contribution_map(0, 1),
        )


def test_each_layer_is_brought_once(checkpoint: Make, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    engine = lmtt.load(str(folder), device_map=spread(folder, MAPS["layers"]), offload_folder=tmp_path)
    engine.trace(input_ids=IDS)
    layers = sum(p.nbytes for layer in engine.model.model.layers for p in layer.parameters())
    assert engine._weights.traffic.bytes_taken == layers
    engine.trace(input_ids=np.stack([IDS, IDS + 1]))
    assert engine._weights.traffic.bytes_taken == 2 * layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto would take the GPU")
def test_single_devices_stay_plain(checkpoint: Make) -> None:
    want = lmtt.load(str(checkpoint("llama"))).trace(input_ids=IDS)
    for placed in ({"": "cpu"}, "auto"):
        engine = lmtt.load(str(checkpoint("llama")), device_map=placed)
        assert engine.resident
        assert not is_placed(engine.model)
        assert_same_trace(engine.trace(input_ids=IDS), want)


def test_stored_runs_are_the_same_files(checkpoint: Make, tmp_path: Path) -> None:
    folder = checkpoint("gpt2")
    resident = lmtt.load(str(folder))
    engine = lmtt.load(str(folder), device_map=spread(folder, MAPS["all"]), offload_folder=tmp_path / "off")
    resident.trace(input_ids=IDS, out=tmp_path / "want")

    def stop(done: int, _all: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.trace(input_ids=IDS, out=tmp_path / "got", progress=stop)
    assert all(parameter.is_meta for parameter in engine.model.parameters())  # nothing was left behind
    engine.trace(input_ids=IDS, out=tmp_path / "got", resume=True)
    want, got = (
        {p.name: p.read_bytes() for p in (tmp_path / run).iterdir() if p.name != "cost.json"}
        for run in ("want", "got")
    )
    assert len(got) > 3
    assert got == want


def test_damage_is_named(checkpoint: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    model.save_pretrained(folder)
    placed = spread(folder, MAPS["all"])
    weights = load_file(folder / "model.safetensors")
    for hurt in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        broken = {n: w.clone() for n, w in weights.items()}
        broken[hurt][3, 2] = float("nan")
        save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{hurt} holds 1 NaN"):
            lmtt.load(str(folder), device_map=placed, offload_folder=tmp_path / "off").trace(input_ids=IDS)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for disk in ("layers", "ends"):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        engine = lmtt.load(
            str(folder), device_map=spread(folder, MAPS[disk]), offload_folder=tmp_path / "off"
        )
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="cannot be brought from where they are offloaded") as error:
            engine.trace(input_ids=IDS)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device_map": "auto", "memory": "1GiB"}, "device_map excludes memory"),
        ({"device_map": "auto", "device": "cpu"}, "device_map excludes device"),
        ({"device_map": "somewhere"}, "unknown device map"),
        ({"device_map": "{"}, "not JSON"),
        ({"device_map": {}}, "maps no modules"),
        ({"device_map": {"": "gpu"}}, "unknown device"),
        ({"device_map": {"": "auto"}}, "unknown device"),
        ({"device_map": {"model.embed_tokens": "cpu", "model.layers.0": "disk"}}, "does not give any device"),
        ({"offload_folder": "x"}, "without device_map"),
    ],
)
def test_refusals_are_one_line(checkpoint: Make, options: dict[str, Any], says: str) -> None:
    with pytest.raises((InputError, CheckpointError), match=says) as error:
        lmtt.load(str(checkpoint("llama")), **options)
    assert "\n" not in str(error.value)


def test_without_accelerate(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else find(name, *rest)
    )
    with pytest.raises(InputError, match="needs accelerate, which is missing; pip install accelerate"):
        lmtt.load(str(checkpoint("llama")), device_map="auto")


def test_from_the_command_line(checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint("llama")
    from tokenizers import Tokenizer, models

    ids = {f"t{n}": n for n in range(97)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token="t0"))
    )
    copy = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    common = ["trace", str(copy), "--prompt", "t5"]
    placed = json.dumps(spread(copy, MAPS["layers"]))
    for extra in ([], ["--device-map", placed, "--offload-folder", str(tmp_path / "off")]):
        assert main([*common, *extra, "--json", str(tmp_path / f"{len(extra)}.json")]) == 0
    whole, part = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 4))
    assert whole["edges"] == part["edges"]
    assert len(whole["edges"]) > 0
    capsys.readouterr()
    assert main([*common, "--device-map", "auto", "--memory", "1GiB"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_only_tensors_move() -> None:
    shared = object()
    a = torch.ones(2)
    got = moved((a, {"x": a, "past": a}, [shared], None), torch.device("meta"), ("past",))
    assert got[0].is_meta
    assert got[1]["x"].is_meta
    assert not got[1]["past"].is_meta
    assert got[2][0] is shared
    assert got[3] is None
    assert moved(a, torch.device("cpu")) is a


def test_weights_that_nothing_brings_are_named() -> None:
    module = nn.Sequential(nn.Linear(2, 3, device="meta"))
    assert is_offloaded(module)
    with pytest.raises(CheckpointError, match=r"weight 0\.weight is on the meta device"), at_hand(module):
        pass
    with pytest.raises(CheckpointError, match=r"weight 0\.weight is on the meta device"):
        list(named_weights(module))
