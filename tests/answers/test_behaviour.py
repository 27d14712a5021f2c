"""Heads named by what they do: scores follow from the definition, on patterns made by hand and real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import lmtt
from lmtt.errors import InputError, ModelNeededError
from lmtt.lens.behaviour import head_behaviours, source_positions
from lmtt.testing_models import tiny_model, tiny_prompt

if TYPE_CHECKING:
    from pathlib import Path

    from lmtt.engine import Engine

IDS = np.array([3, 4, 5, 6, 3, 4, 5, 6])  # every token again four places later
BEHAVIOURS = ("previous token", "first token", "current token", "duplicate token", "induction")


def pattern(at: dict[int, int]) -> np.ndarray:
    """All mass on one source for some destinations, on the token itself for the others."""
    rows = np.eye(8, dtype=np.float32)
    for i, j in at.items():
        rows[i] = np.eye(8)[j]
    return rows


HEADS = {
    "previous token": pattern({i: i - 1 for i in range(1, 8)}),
    "first token": pattern(dict.fromkeys(range(1, 8), 0)),
    "current token": pattern({}),
    "duplicate token": pattern({i: i - 4 for i in range(4, 8)}),
    "induction": pattern({i: i - 3 for i in range(4, 8)}),
}


@pytest.mark.parametrize("of", ["attention", "contribution"])
def test_heads_made_by_hand_get_their_names(of: str) -> None:
    maps = list(HEADS.values())
    scale = 1.0 if of == "attention" else 0.01  # contributions are shares of a row that is not theirs alone
    found = head_behaviours(IDS, 2, len(maps), lambda h: np.float32(scale) * maps[h], of)  # type: ignore[arg-type]
    assert [b.name for b in found] == list(HEADS)
    for head, behaviour in enumerate(found):
        assert (behaviour.layer, behaviour.head) == (2, head)
        assert behaviour.score == behaviour.scores[behaviour.name or ""] == pytest.approx(1, abs=1e-6)
        assert behaviour.chance[behaviour.name or ""] < 0.4
        assert behaviour.name is not None
        assert behaviour.name in str(behaviour)


def test_a_head_without_a_habit_has_no_name() -> None:
    even = np.tril(np.ones((8, 8))) / np.arange(1, 9)[:, None]
    (found,) = head_behaviours(IDS, 0, 1, lambda _: even.astype(np.float32), "attention")
    assert found.name is None
    assert found.scores == pytest.approx(dict(found.chance), abs=1e-6)
    assert "no name" in str(found)


def test_source_positions_are_the_table() -> None:
    ids = np.random.default_rng(1).integers(0, 4, 12)
    pairs = source_positions(ids)
    for i in range(12):
        for j in range(12):
            want = {
                "previous token": i >= 2 and j == i - 1,
                "first token": i >= 2 and j == 0,
                "current token": i >= 1 and j == i,
                "duplicate token": j < i and ids[j] == ids[i],
                "induction": 1 <= j < i and ids[j - 1] == ids[i],
            }
            assert {name: bool(pairs[name][i, j]) for name in pairs} == want, (i, j)


def test_behaviours_without_destinations_have_no_score() -> None:
    (found,) = head_behaviours(np.array([1, 2, 3]), 0, 1, lambda _: np.eye(3, dtype=np.float32), "attention")
    assert set(found.scores) == {"previous token", "first token", "current token"}
    (one,) = head_behaviours(np.array([1]), 0, 1, lambda _: np.eye(1, dtype=np.float32), "attention")
    assert (one.name, one.score, dict(one.scores)) == (None, 0.0, {})
    assert "short" in str(one)
    (silent,) = head_behaviours(IDS, 0, 1, lambda _: np.zeros((8, 8), np.float32), "contribution")
    assert not silent.scores


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scores_of_a_model(name: str) -> None:
    trace = lmtt.load(tiny_model(name)).trace(input_ids=[5, 6, 7, 5, 6, 7, 5, 6])
    pairs = source_positions(trace.input_ids)
    for layer in range(trace.n_layers):
        found = trace.head_behaviour(layer)
        assert len(found) == 4
        for b in found:
            rows = trace.attention_map(layer, b.head)
            for behaviour, score in b.scores.items():
                at = pairs[behaviour]
                assert score == pytest.approx(float((rows * at).sum(1)[at.any(1)].mean()), abs=1e-6)
        written = trace.head_behaviour(layer, of="contribution")
        assert all(0 <= s <= 1 + 1e-6 for b in written for s in b.scores.values())


def test_pairs_of_a_head() -> None:
    trace = lmtt.load(tiny_model("llama")).trace(input_ids=tiny_prompt()[0])
    shares = trace.contribution_map(1, 2)
    found = trace.head_pairs(1, 2, k=4, tokens=3)
    assert [p.contribution for p in found] == sorted(shares[1:][shares[1:] > 0].tolist(), reverse=True)[:4]
    for pair in found:
        assert shares[pair.destination, pair.source] == np.float32(pair.contribution)
        want, _ = trace.promoted(1, pair.destination, ("head", 2, pair.source), k=3)
        assert pair.promoted == want


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_of_a_neuron(name: str) -> None:
    trace = lmtt.load(tiny_model(name)).trace(input_ids=tiny_prompt()[0])
    found = trace.neuron_positions(1, 7, k=20)
    assert sorted(p.position for p in found) == list(range(11))
    assert [abs(p.activation) for p in found] == sorted((abs(p.activation) for p in found), reverse=True)
    for place in found:
        for neuron in trace.neurons(1, place.position, k=20):
            if neuron.neuron == 7:
                assert neuron.contribution == pytest.approx(place.contribution, abs=1e-7)
                assert neuron.activation == place.activation
    assert sum(p.contribution for p in found) > 0


def test_bad_input(tmp_path: Path) -> None:
    trace = lmtt.load(tiny_model("llama")).trace(input_ids=[5, 6, 7])
    for call in (
        lambda: trace.head_behaviour(3),
        lambda: trace.head_behaviour(0, of="magic"),  # type: ignore[arg-type]
        lambda: trace.head_pairs(0, 4),
        lambda: trace.head_pairs(0, 0, k=0),
        lambda: trace.neuron_positions(0, 48),
        lambda: trace.neuron_positions(0, -1),
        lambda: trace.neuron_positions(0, 0, k=0),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
    trace.save(tmp_path / "run")
    with pytest.raises(ModelNeededError):
        lmtt.open(tmp_path / "run").head_behaviour(0)


@pytest.mark.model
def test_real_heads(demo_engine: Engine) -> None:
    """On a repeated sequence SmolLM2 has a clear head of each kind."""
    trace = demo_engine.trace(" cat table red seven" * 4)
    found = [b for layer in (8, 11, 16, 17) for b in trace.head_behaviour(layer)]
    best = {name: max(found, key=lambda b, name=name: b.scores[name]) for name in BEHAVIOURS}
    for name, behaviour in best.items():
        assert behaviour.name == name
        assert behaviour.score > 4 * behaviour.chance[name]
