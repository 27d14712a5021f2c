"""`lmtt doctor MODEL` draws the layers as they are, before anything is traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lmtt
from lmtt.errors import ClosureError, StructureError
from lmtt.picture import draw
from lmtt.structure import modules
from lmtt.testing_models import tiny_model
from lmtt.testing_types import tiny_of_type


def picture(name: str, **options: Any) -> list[str]:
    return list(draw(lmtt.load(tiny_model(name, **options))))


def order(lines: list[str], *texts: str) -> None:
    """The texts stand in the picture, one below the other."""
    rows = iter(enumerate(lines))
    for text in texts:
        assert any(text in line for _, line in rows), f"{text!r} is not where it belongs in\n" + "\n".join(
            lines
        )


def test_a_sequential_block_has_two_sums() -> None:
    lines = picture("llama")
    order(
        lines,
        "layers 0 to 2",
        "resid_pre",
        "├── attention: self_attn.o_proj",
        "4 heads of 8, 2 key/value heads, and a bias",
        "q, k and v from self_attn (registry)",
        "⊕ resid_mid",
        "├── mlp: mlp.down_proj",
        "48 neurons, and a bias",
        "⊕ resid_post",
    )
    assert sum("closes to" in line for line in lines) == 4


def test_a_parallel_block_has_one() -> None:
    lines = picture("cohere")
    order(lines, "├── attention", "├── mlp", "⊕ resid_post")
    assert not any("resid_mid" in line for line in lines)


def test_layers_that_differ_are_drawn_apart() -> None:
    """Gemma 2 alternates windows; three layers are two kinds."""
    lines = picture("gemma2")
    order(lines, "layers 0, 2", "post_attention_layernorm", "a window", "layer 1", "softcap")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("granite", "self_attn.o_proj × 0.22"),
        ("qwen2_moe", "mlp.experts + mlp.shared_expert.down_proj × a factor per token"),
        ("gpt_oss", "sinks"),
        ("afmoe", "a gate"),
        ("gpt2", "and a bias"),
    ],
)
def test_what_bites_is_named(name: str, text: str) -> None:
    assert any(text in line for line in picture(name)), picture(name)


def test_what_is_seen_as_probabilities_names_no_biases() -> None:
    lines = picture("bloom")
    order(lines, "4 heads of 8", "seen as its own product")
    assert not any("position biases" in line for line in lines)


def test_widths_that_differ_are_named() -> None:
    assert any("4 heads of 8, queries and keys of 10" in line for line in picture("deepseek_v3"))


def test_what_does_not_close_is_drawn_and_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture shows where; the error ends the command."""
    own = modules.linear_weight
    monkeypatch.setattr("lmtt.structure.capture.linear_weight", lambda *given: own(*given).roll(1, 0))
    lines = draw(lmtt.load(tiny_model("llama")))
    shown: list[str] = []
    with pytest.raises(ClosureError, match="layer 0, attention"):
        shown.extend(lines)
    assert any("attention" in line and "DOES NOT CLOSE" in line for line in shown)
    assert any("resid_mid" in line and "closes to" in line for line in shown)


def test_what_is_not_a_sum_is_refused_at_once() -> None:
    with pytest.raises(StructureError, match="several streams"):
        list(draw(lmtt.load(tiny_of_type("gemma3n_text"))))


def test_a_norm_of_the_stream_is_drawn_at_the_sum() -> None:
    order(picture("opt_post_norm"), "⊕ resid_mid → self_attn_layer_norm", "⊕ resid_post → final_layer_norm")


def test_the_worst_of_alike_layers_is_shown_even_if_it_is_no_number() -> None:
    from lmtt.picture import Kind, Line

    kind = Kind()
    for layer, error in enumerate((1e-7, float("nan"), 2e-7)):
        kind.add(layer, [(error, 1e-5)])
    (line,) = kind.drawn((Line("resid_post", 0),))
    assert "DOES NOT CLOSE: nan" in line
    assert torch.isnan(torch.tensor(kind.errors[0][0]))
