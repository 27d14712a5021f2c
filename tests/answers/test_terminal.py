"""What a terminal shows: colours only where wanted, and nothing that a prompt could repaint it with."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lmtt import terminal
from lmtt.cli import main
from lmtt.graph.routes import route
from lmtt.graph.testing import random_trace
from lmtt.spans import spans_of
from lmtt.trace import Trace

if TYPE_CHECKING:
    from lmtt.engine import Engine

STYLES = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = ("\x1b[2J", "[red]x[/red]", "\u202eabc", "\n", "\ud800", "a\x07")


@pytest.fixture(scope="module")
def model_folder(tiny_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_engine.model.save_pretrained(folder)
    tiny_engine.tokenizer.save_pretrained(folder)
    return str(folder)


def shown(trace: Trace, **options: object) -> str:
    file = io.StringIO()
    terminal.show(trace, trace.route(threshold=0.05), file=file, always=True, **options)  # type: ignore[arg-type]
    return file.getvalue()


def test_hostile_prompt_is_harmless() -> None:
    data = random_trace(0, tokens=len(HOSTILE))
    names = {str(i): HOSTILE[i % len(HOSTILE)] for i in range(10)}
    data = replace(data, tokens=HOSTILE, meta={**data.meta, "prediction_tokens": names})
    for by in ("token", "word", "sentence"):
        bare = STYLES.sub("", shown(Trace(data), by=by))
        assert all(line.isprintable() for line in bare.split("\n"))
        assert "[red]" in bare, "markup in a prompt is text"


def test_shades_follow_the_shares() -> None:
    data = random_trace(3, tokens=6)
    found = route(data, threshold=0.05)
    values = np.array([0.0, 0.1, 0.5, 1.0, 0.01, 0.2])
    text = terminal.shaded(spans_of(data, "token"), values, 5)
    assert text.plain == "".join(data.tokens)
    shades = {
        text.plain[span.start : span.end]: span.style.bgcolor.triplet
        for span in text.spans
        if span.style.bgcolor  # type: ignore[union-attr]
    }
    assert set(shades) == {"t1", "t2", "t3", "t5"}, "a share near 0 has no shade"
    greens = [shades[t].green for t in ("t1", "t5", "t2", "t3")]
    assert greens == sorted(greens, reverse=True)
    assert found.position == 5


def test_model_adds_what_parts_say(tiny_engine: Engine, tmp_path: Path) -> None:
    import lmtt

    trace = tiny_engine.trace("Mary and John")
    assert "promotes" in shown(trace)
    trace.save(tmp_path / "run")
    assert "promotes" not in shown(lmtt.open(tmp_path / "run"))


def test_generation_is_shown(tiny_engine: Engine) -> None:
    found = tiny_engine.generate("Mary and John", max_new_tokens=3)
    bare = STYLES.sub("", shown(found.trace, by="word", generation=found))
    assert "the output rests on" in bare


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["trace", *arguments, "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_command_line(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Colours only when asked, as stdout is no terminal here; the same shares in both."""
    plain = run(
        capsys, model_folder, "--prompt", "Mary and John", "--by", "word", "--out", str(tmp_path / "r")
    )
    assert "\x1b" not in plain
    assert "share of each word" in plain
    assert main(["show", str(tmp_path / "r"), "--by", "word", "--color", "always"]) == 0
    colour = capsys.readouterr().out
    assert "\x1b[" in colour
    listed = re.findall(r'^ +([\d.]+%)  "', plain, flags=re.MULTILINE)
    assert listed
    assert all(share in colour for share in listed)


def test_generate_and_target(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "route.json"
    ask = [model_folder, "--prompt", "ab cd", "--generate", "4", "--json", str(document)]
    out = run(capsys, *ask, "--target", "a", "--foil", "b")
    read = json.loads(document.read_text())
    assert len(read["tokens"]) > 5, "prompt and output"
    assert read["position"] == 4, "the route starts where the output does"
    assert "output: " in out
    assert "target minus foil" in out
    again = run(capsys, *ask, "--temperature", "3", "--seed", "1")
    assert again == run(capsys, *ask, "--temperature", "3", "--seed", "1")
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": "Hi. You?"}]))
    assert 'user: "' in run(capsys, model_folder, "--chat", str(chat), "--by", "turn", "--generate", "2")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--by", "turn"], "turns"),
        (["--by", "page"], "--by"),
        (["--generate", "0"], "--generate"),
        (["--generate", "few"], "--generate"),
        (["--generate", "9999"], "too long"),
        (["--temperature", "1"], "--generate"),
        (["--generate", "2", "--temperature", "-1"], "temperature"),
        (["--generate", "2", "--temperature", "1", "--seed", "-1"], "seed"),
        (["--foil", "a"], "--target"),
        (["--target", "ab"], "one token"),
        (["--target", "ab", "--generate", "2"], "one token"),
        (["--color", "blue"], "--color"),
    ],
)
def test_bad_options(
    model_folder: str, options: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", model_folder, "--prompt", "abc", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert word in err
    assert len([line for line in err.splitlines() if line.startswith("lmtt: ")]) == 1
    assert "Traceback" not in err
