"""Groups of tokens: every token in one, where a reader would put it, and shares that still add up."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lmtt.errors import InputError, RunError
from lmtt.graph.rollout import rollout, rollouts
from lmtt.graph.testing import random_trace
from lmtt.run.data import TraceData
from lmtt.spans import UNITS, PromptText, from_decoding, from_offsets, spans_of

if TYPE_CHECKING:
    from pathlib import Path

    from lmtt.engine import Engine

CHAT = [
    {"role": "user", "content": "Who? 😀"},
    {"role": "assistant", "content": "Mary."},
    {"role": "user", "content": "When?"},
]


def data_of(text: str, offsets: list[tuple[int, int]]) -> TraceData:
    prompt = from_offsets(text, offsets)
    assert prompt is not None
    data = random_trace(0, tokens=len(offsets))
    return replace(data, meta={**data.meta, "prompt": prompt.to_meta()})


def characters(text: str) -> TraceData:
    return data_of(text, [(n, n + 1) for n in range(len(text))])


def texts(data: TraceData, unit: str) -> list[str]:
    return [span.text for span in spans_of(data, unit)]


def test_words() -> None:
    assert texts(characters("I don't, é 3.5!"), "word") == [
        "I", " ", "don't", ",", " ", "é", " ", "3.5", "!",
    ]  # fmt: skip
    tokens = [(0, 2), (2, 8), (8, 12)]
    assert texts(data_of("Unbeatable, he", [(0, 2), (2, 10), (10, 11), (11, 14)]), "word") == [
        "Unbeatable", ",", " he",
    ]  # fmt: skip
    assert texts(data_of("one two, six", tokens), "word") == ["one two,", " six"], "a token is never cut"


def test_combining_marks_and_scripts() -> None:
    assert texts(characters("हिन्दी में"), "word") == ["हिन्दी", " ", "में"]
    assert texts(characters("東京"), "word") == ["東", "京"]


def test_sentences() -> None:
    text = 'He said "Stop." Then he left. e.g. this one!\nNew line? 東京。大阪。'
    found = [part.strip() for part in texts(characters(text), "sentence")]
    assert [part for part in found if part] == [
        'He said "Stop."', "Then he left. e.g. this one!", "New line?", "東京。", "大阪。",
    ]  # fmt: skip


def test_tokens_without_text_stand_alone() -> None:
    data = data_of("ab cd", [(0, 0), (0, 1), (1, 2), (2, 5), (0, 0)])
    spans = spans_of(data, "word")
    assert [(s.first, s.last) for s in spans] == [(0, 1), (1, 3), (3, 4), (4, 5)]
    assert [s.text for s in spans[1:3]] == ["ab", " cd"]


def test_parts_of_one_character_stay_together() -> None:
    raw = "a 😀é b"
    data = raw.encode()
    prompt = from_decoding(list(data), lambda ids: bytes(ids).decode(errors="replace"))
    assert prompt.text == raw
    for n, (start, end) in enumerate(zip(prompt.start, prompt.end, strict=True)):
        assert data[n] in raw[start:end].encode()
    assert (prompt.start[2], prompt.end[2]) == (prompt.start[5], prompt.end[5]) == (2, 3)
    cut = from_decoding(list(data[:4]), lambda ids: bytes(ids).decode(errors="replace"))
    assert len(cut.start) == 4, "an output may end inside a character"


def test_decoding_that_depends_on_what_comes_before() -> None:
    """Some tokenizers drop the blank of a text's first word: tokens decoded alone would lose theirs."""
    words = ["▁Mary", "▁and", "▁Jo", "hn"]
    prompt = from_decoding(
        range(4), lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")
    )
    assert prompt.text == "Mary and John"
    assert [prompt.text[a:b] for a, b in zip(prompt.start, prompt.end, strict=True)] == [
        "Mary", " and", " Jo", "hn",
    ]  # fmt: skip


def test_chat_turns(tiny_engine: Engine) -> None:
    trace = tiny_engine.trace(chat=CHAT)
    turns = trace.tokens_by("turn")
    assert [t.role for t in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [t.text for t in turns] == [
        "<|im_start|>system\nBe good.<|im_end|>\n",
        "<|im_start|>user\nWho? 😀<|im_end|>\n",
        "<|im_start|>assistant\nMary.<|im_end|>\n",
        "<|im_start|>user\nWhen?<|im_end|>\n",
        "<|im_start|>assistant\n",
    ]
    own = tiny_engine.trace(
        chat=[{"role": "system", "content": "x"}, *CHAT, {"role": "assistant", "content": "On"}]
    )
    turns = own.tokens_by("turn")
    assert [t.role for t in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[-1].text == "<|im_start|>assistant\nOn"


@pytest.mark.parametrize("unit", UNITS)
def test_groups_partition_the_tokens_and_shares_add_up(tiny_engine: Engine, unit: str) -> None:
    trace = tiny_engine.trace(chat=CHAT)
    T = len(trace.tokens)
    for position in (-1, 5):
        found = trace.rollout(position, by=unit)
        assert [s.first for s in found.spans] == [0, *(s.last for s in found.spans[:-1])]
        assert found.spans[-1].last == T
        assert found.direct is None
        assert np.isfinite(found.shares).all()
        assert abs(found.shares.sum() + found.bias + found.unattributed - 1) <= 1e-12
        alone = rollout(trace.data, position % T).tokens
        for span, share in zip(found.spans, found.shares, strict=True):
            assert abs(share - alone[span.first : span.last].sum()) <= 1e-12


def test_direct_effect_beside_it(tiny_engine: Engine) -> None:
    """Its sum is what heads and embedding write to the logit."""
    trace = tiny_engine.trace("Mary and John")
    parts = trace.logit_contributions(7, 9)
    found = trace.rollout(by="word", target=7, foil=9)
    assert found.direct is not None
    assert len(found.direct) == len(found.spans) == 5
    want = parts.heads.sum(dtype=np.float64) + parts.embed
    assert abs(found.direct.sum() - want) <= 1e-5 * np.abs(parts.heads).sum()
    with pytest.raises(InputError, match="foil"):
        trace.rollout(foil=9)


@pytest.mark.parametrize("seed", range(4))
def test_many_rollouts_are_single_ones(seed: int) -> None:
    data = random_trace(seed, tokens=7, parallel=(False, True, False, False), floor=1 / 16)
    many = rollouts(data, range(7))
    for position in range(7):
        one = rollout(data, position)
        assert np.abs(many.tokens[position] - one.tokens).max() <= 1e-14
        assert not one.tokens[position + 1 :].any(), "nothing comes from later tokens"
        assert abs(one.tokens.sum() + one.bias + one.unattributed - 1) <= 1e-12


def test_groups_survive_storage(tiny_engine: Engine, tmp_path: Path) -> None:
    import lmtt

    trace = tiny_engine.trace(chat=CHAT)
    trace.save(tmp_path / "run")
    trace.save(tmp_path / "run.lmtt")
    for name in ("run", "run.lmtt"):
        stored = lmtt.open(tmp_path / name)
        for unit in UNITS:
            assert stored.tokens_by(unit) == trace.tokens_by(unit)


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": [0, 1]},
        {"end": [9] * 5},
        {"start": [4, 3, 2, 1, 0]},
        {"text": None},
        {"start": "abcde"},
        {"turns": [7], "roles": ["user"]},
        {"turns": [1], "roles": []},
        {"start": [0.0, 1, 2, 3, 4]},
    ],
)
def test_damaged_notes_are_refused(wrong: dict[str, object]) -> None:
    prompt = PromptText("abcde", (0, 1, 2, 3, 4), (1, 2, 3, 4, 5)).to_meta()
    data = random_trace(0, tokens=5)
    data = replace(data, meta={**data.meta, "prompt": prompt | wrong})
    with pytest.raises(RunError) as caught:
        spans_of(data, "word")
    assert len(str(caught.value).splitlines()) == 1


def test_bad_input(tiny_engine: Engine) -> None:
    trace = tiny_engine.trace("abc")
    with pytest.raises(InputError, match="turn"):
        trace.tokens_by("turn")
    with pytest.raises(InputError, match="unit"):
        trace.tokens_by("paragraph")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty"):
        tiny_engine.trace(chat=[])
    with pytest.raises(InputError, match="position"):
        trace.rollout(3)


def test_model_without_tokenizer() -> None:
    import lmtt
    from lmtt.testing_models import tiny_model

    trace = lmtt.load(tiny_model("gpt2")).trace(input_ids=[5, 6, 7])
    assert [s.text for s in trace.tokens_by("token")] == ["<5>", "<6>", "<7>"]


@pytest.mark.model
def test_real_tokenizer(demo_engine: Engine) -> None:
    trace = demo_engine.trace("Don't un-happy 😀 people. They know!")
    words = [span.text.strip() for span in trace.tokens_by("word")]
    assert words == ["Don't", "un", "-", "happy", "😀", "people", ".", "They", "know", "!"]
    assert [s.text.strip() for s in trace.tokens_by("sentence")] == [
        "Don't un-happy 😀 people.",
        "They know!",
    ]
