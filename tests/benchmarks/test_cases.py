"""Activations handed on through a file, and cut, are those that the model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmtt.engine import load
from lmtt.kernels import registry
from lmtt.testing_models import tiny_model

TOKENS = 24


def capture(tokens: int) -> Any:
    import cases

    engine = load(tiny_model("llama"))
    (case,) = cases.capture(engine, cases.token_ids(engine, TOKENS)[:, :tokens], (1,))
    return case


def test_a_cut_case_is_what_a_shorter_prompt_gives(tmp_path: Path) -> None:
    import cases

    cases.save(capture(TOKENS), tmp_path / "case.safetensors")
    got, want = cases.load(tmp_path / "case.safetensors", 9), capture(9)
    assert got.layer == 1
    for op in ("attention", "neurons"):
        mine, theirs = (
            registry.run(f"{op.removesuffix('s')}_contributions", getattr(c, op))[0] for c in (got, want)
        )
        assert float(mine.checksum.max()) <= 1e-5
        for name in ("residual", "bias", "normaliser"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-4, atol=1e-6)
        shares = ("edges", "per_head") if op == "attention" else ("value",)
        for name in shares:
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=0, atol=1e-5)


def test_nothing_to_skip_leaves_a_zero_in_every_block() -> None:
    import cases

    case = capture(8)
    whole = cases.nothing_to_skip(case.attention).whole
    assert bool((whole.view(8, -1, 16).abs().amin(-1) == 0).all())
    assert bool((case.attention.whole != 0).all()), "the case itself was changed"


def test_the_text_is_long_varied_and_the_same_each_time() -> None:
    import cases

    text = cases.text(8000)
    words = text.split()
    assert len(words) >= 8000
    assert text == cases.text(8000)
    assert text != cases.text(8000, seed=1)
    assert len(set(words)) > 300
    assert "{" not in text.replace("{'", "")
    windows = {" ".join(words[n : n + 12]) for n in range(len(words) - 12)}
    assert len(windows) > 0.9 * (len(words) - 12), "the text repeats itself"
