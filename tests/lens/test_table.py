"""The logit lens over many states: what it says of each is what the model's own head says, one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lmtt.errors import InputError
from lmtt.lens.table import lens_row, ranks


class Given:
    """A head whose logits are the states themselves."""

    def logits(self, states):
        return states


def row(logits, target=None):
    return lens_row(Given(), torch.tensor(logits, dtype=torch.float32), target)


def test_of_each_state_the_first_token_its_probability_and_the_entropy():
    found = row([[0.0, math.log(3.0), 0.0], [0.0, 0.0, 0.0]])
    assert found.token_id.tolist() == [1, 0]
    assert found.probability.tolist() == pytest.approx([0.6, 1 / 3])
    assert found.entropy.tolist() == pytest.approx([-0.6 * math.log(0.6) - 0.4 * math.log(0.2), math.log(3)])
    assert found.target_rank is None
    assert found.target_probability is None


def test_a_token_that_cannot_come_has_no_part_in_the_entropy():
    found = row([[0.0, -math.inf, 0.0]])
    assert found.entropy.tolist() == pytest.approx([math.log(2)])


def test_ranks_count_from_zero_and_equal_logits_go_by_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert ranks(logits, [0, 1, 2, 3]).tolist() == [[3, 0, 1, 2], [0, 1, 2, 3]]
    assert ranks(logits, []).shape == (2, 0)


def test_ranks_are_places_in_a_stable_sort():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(0, 6, (5, 40), generator=generator).float()  # many equal ones
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    wanted = np.argsort(order, axis=1)
    assert np.array_equal(ranks(logits, list(range(40))).numpy(), wanted)


def test_the_target_has_its_probability_and_rank():
    found = row([[0.0, 1.0, 2.0], [5.0, 1.0, 0.0]], target=1)
    assert found.target_rank.tolist() == [1, 1]
    want = torch.softmax(torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 0.0]]), -1)[:, 1]
    assert found.target_probability.tolist() == pytest.approx(want.tolist())


@pytest.mark.model
def test_the_table_says_what_the_lens_says_of_each_state(demo_engine):
    trace = demo_engine.trace("The capital of France is")
    layers, positions = [0, 14, 29], [0, 4]
    table = trace.lens_table(layers, positions, " Paris")
    assert table.layers == (0, 14, 29)
    assert table.positions == (0, 4)
    paris = demo_engine.token_id(" Paris")
    for r, layer in enumerate(layers):
        for c, position in enumerate(positions):
            first = trace.lens(layer, position, k=1)[0]
            assert table.token_id[r, c] == first.id
            assert table.token[r][c] == first.token
            assert table.probability[r, c] == pytest.approx(first.probability, rel=1e-4)
            assert table.target_rank[r, c] == trace.lens_ranks(layer, position, [paris])[0]
    assert np.isfinite(table.entropy).all()
    said = trace.next_tokens(-1, 1)[0]
    assert table.token[-1][-1] == said.token, "after the last layer the lens is the prediction"
    with pytest.raises(InputError, match="is not one token"):
        trace.lens_table(layers, positions, "two words")
