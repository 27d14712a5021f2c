"""The command line: what is printed where, exit codes, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lmtt.cli import main
from lmtt.testing_models import tiny_model

LMTT = [sys.executable, "-m", "lmtt.cli"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama on disk, with a byte-level tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("llama")
    model.save_pretrained(folder)
    size = model.get_input_embeddings().weight.shape[0]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 1]
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<unk>", *alphabet])}, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must be refused: exit code 2, one line on stderr, nothing on stdout."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(lines(err)) == 1, err
    assert err.startswith("lmtt: ")
    assert "Traceback" not in err
    return err


def test_trace_show_and_files(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page, route = tmp_path / "run", tmp_path / "route.html", tmp_path / "route.json"
    command = ["trace", model_folder, "--prompt", "abcdefg", "--out", run, "--html", page, "--json", route]
    assert main([str(c) for c in command]) == 0
    out, _ = capsys.readouterr()
    assert str(page) in out
    first = json.loads(route.read_text())
    assert first["schema"] == "lmtt.route/1"
    assert first["position"] == 6
    assert len(first["tokens"]) == 7
    assert {"model", "input_ids", "threshold", "floor", "predictions", "nodes", "edges", "cost"} <= set(first)
    assert page.read_text().startswith("<!doctype html>")
    assert main(["show", str(run), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    again = json.loads(out)
    assert again["edges"] == first["edges"]
    assert again["predictions"] == first["predictions"]
    assert err, "with --json - the summary goes to stderr"
    assert main(["show", str(run), "--position", "3", "--threshold", "0.2"]) == 0


def test_prompt_from_file_stdin_and_one_file_run(model_folder: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("abc")
    done = subprocess.run(
        [*LMTT, "trace", model_folder, "--prompt-file", "-", "--json", "-", "--out", tmp_path / "run.lmtt"],
        input="abc", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (
        main(["trace", str(model_folder), "--prompt-file", str(prompt), "--json", str(tmp_path / "r.json")])
        == 0
    )
    assert json.loads(done.stdout)["input_ids"] == json.loads((tmp_path / "r.json").read_text())["input_ids"]
    assert (tmp_path / "run.lmtt").is_file()


def test_existing_run_is_not_replaced_unasked(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["trace", str(model_folder), "--prompt", "abc", "--out", str(run)]
    assert main(command) == 0
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    capsys.readouterr()
    assert "--force" in refused(capsys, *command)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    assert main([*command, "--force"]) == 0
    after = {p.name: p.read_bytes() for p in run.iterdir() if p.name != "cost.json"}
    assert after == {name: b for name, b in before.items() if name != "cost.json"}, "a run must repeat itself"


BAD_OPTIONS = [
    (["--threshold", "1"], "threshold"),
    (["--threshold", "-0.1"], "threshold"),
    (["--threshold", "nan"], "threshold"),
    (["--floor", "1.5"], "floor"),
    (["--threshold", "0.01", "--floor", "0.02"], "floor"),
    (["--threshold", "much"], "threshold"),
    (["--position", "99"], "position"),
    (["--position", "-99"], "position"),
    (["--backend", "quantum"], "backend"),
    (["--device", "tpu"], "device"),
    (["--device", "cuda:99"], "device"),
    (["--dtype", "int8"], "dtype"),
    (["--measure", "l3"], "measure"),
    (["--html", "/nonexistent/folder/x.html"], "cannot write"),
    (["--json", "/nonexistent/folder/x.json"], "cannot write"),
    (["--out", "/nonexistent/folder/run"], "cannot write"),
    (["--html", "/"], "cannot write"),
    (["--nonsense"], "nonsense"),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS)
def test_bad_options(
    model_folder: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "trace", model_folder, "--prompt", "abc", *options)


def test_bad_options_leave_nothing_behind(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "x.html"
    refused(capsys, "trace", model_folder, "--prompt", "abc", "--html", page, "--position", "50")
    refused(
        capsys,
        "trace",
        model_folder,
        "--prompt",
        "abc",
        "--html",
        page,
        "--out",
        tmp_path / "r",
        "--backend",
        "x",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such/folder/at/all", "no such model"),
        ("/no/such/folder", "no such model"),
        ("nothing.gguf", "no such model"),
        ("what is this?", "no such model"),
    ],
)
def test_no_such_model(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, "trace", name, "--prompt", "abc")


def test_unknown_hub_id_offline(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot load nobody/nothing" in refused(capsys, "trace", "nobody/nothing", "--prompt", "abc")


def test_prompts_that_cannot_be(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "empty" in refused(capsys, "trace", model_folder, "--prompt", "")
    assert "too long" in refused(capsys, "trace", model_folder, "--prompt", "a" * 5000)
    assert "cannot read" in refused(capsys, "trace", model_folder, "--prompt-file", tmp_path / "none.txt")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused(capsys, "trace", model_folder, "--prompt-file", binary)
    chat = tmp_path / "chat.json"
    chat.write_text('{"role": "user"}')
    assert "not a chat" in refused(capsys, "trace", model_folder, "--chat", chat)
    chat.write_text("{")
    assert "not JSON" in refused(capsys, "trace", model_folder, "--chat", chat)
    chat.write_text('[{"role": "user", "content": "hi"}]')
    assert "chat template" in refused(capsys, "trace", model_folder, "--chat", chat)
    assert "required" in refused(capsys, "trace", model_folder)


def damage(folder: Path, target: Path, *, entry: float | None = None, drop: str | None = None) -> Path:
    """A copy of a model with one weight's entry changed, or one weight missing."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    name = next(n for n in weights if n.endswith("o_proj.weight"))
    if entry is not None:
        weights[name][1, 1] = entry
    if drop is not None:
        del weights[next(n for n in weights if n.endswith(drop))]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_damaged_models(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nan = damage(model_folder, tmp_path / "nan", entry=float("nan"))
    assert "o_proj.weight holds 1 NaN" in refused(capsys, "trace", nan, "--prompt", "abc")
    missing = damage(model_folder, tmp_path / "missing", drop="down_proj.weight")
    assert "lacks" in refused(capsys, "trace", missing, "--prompt", "abc")
    cut = damage(model_folder, tmp_path / "cut")
    shard = cut / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "cut short" in refused(capsys, "trace", cut, "--prompt", "abc")
    (cut / "config.json").unlink()
    assert "config.json" in refused(capsys, "trace", cut, "--prompt", "abc")
    pickled = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1)}, pickled)
    assert "pickled" in refused(capsys, "trace", pickled, "--prompt", "abc")


def test_models_that_are_not_sums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several streams that are mixed are not one that is added to."""
    import lmtt
    from lmtt.errors import StructureError
    from lmtt.testing_types import tiny_of_type

    engine_model = tiny_of_type("gemma3n_text")

    with pytest.raises(StructureError, match="not a sum onto the residual stream"):
        lmtt.load(engine_model).trace(input_ids=[1, 2, 3])
    engine_model.save_pretrained(tmp_path / "several")
    # Without a tokenizer text cannot be traced; the structure is refused by `doctor` all the same.
    assert main(["doctor", str(tmp_path / "several")]) == 2
    assert "not a sum onto the residual stream" in capsys.readouterr().err


def test_runs_that_are_not(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refused(capsys, "show", tmp_path / "none")
    text = tmp_path / "text.lmtt"
    text.write_text("hello")
    refused(capsys, "show", text)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(capsys, "show", empty)
    run = tmp_path / "run.lmtt"
    assert main(["trace", str(model_folder), "--prompt", "abc", "--out", str(run)]) == 0
    capsys.readouterr()
    whole = run.read_bytes()
    run.write_bytes(whole[: len(whole) // 2])
    refused(capsys, "show", run)
    newer = whole.replace(b"lmtt.run/1", b"lmtt.run/9")
    assert newer != whole
    run.write_bytes(newer)
    assert "newer" in refused(capsys, "show", run)
    run.write_bytes(whole)
    assert "floor" in refused(capsys, "show", run, "--threshold", "1e-5")


def test_doctor(capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    assert main(["doctor", str(model_folder)]) == 0
    out, _ = capsys.readouterr()
    assert "backend reference: yes" in out
    assert "├── attention: self_attn.o_proj" in out
    assert "⊕ resid_mid" in out


def test_version_and_help() -> None:
    done = subprocess.run([*LMTT, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lmtt 0.")
    assert subprocess.run([*LMTT, "trace", "--help"], capture_output=True, check=True).returncode == 0


def test_progress_is_for_terminals_only(model_folder: Path) -> None:
    done = subprocess.run(
        [*LMTT, "trace", model_folder, "--prompt", "abc"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(model_folder: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    """Stopped while it waits for the prompt on stdin: the documented exit code, and nothing written."""
    child = subprocess.Popen(
        [*LMTT, "trace", model_folder, "--prompt-file", "-", "--out", tmp_path / "run"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    time.sleep(1.5)
    child.send_signal(sent)
    _, err = child.communicate(timeout=20)
    assert child.returncode == code
    assert b"Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_closed_pipe_is_no_error(model_folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*LMTT, "trace", model_folder, "--prompt", "abc", "--json", "-"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
