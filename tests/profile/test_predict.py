"""Work is counted by the formulas' own terms, and time follows the ceilings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmtt.profile.ceilings import Ceilings
from lmtt.profile.dims import Dims, dims_of
from lmtt.profile.planning import seconds_in_words
from lmtt.profile.predict import Efficiency, bound_of, predict
from lmtt.profile.work import Survivors, Work, expected_pairs, layer_work
from lmtt.streaming.plan import WORKSPACE, Plan, Weights, estimate
from lmtt.testing_models import tiny_model


@pytest.fixture(scope="module")
def dims() -> Dims:
    return dims_of(tiny_model("llama"), torch.float32)


def planned(dims: Dims, *, resident: bool, ahead: int = 2) -> tuple[Plan, Weights]:
    """`ahead`: layers that there is room to read at a time."""
    size = dims.layer_parameters * 4
    weights = Weights(dims.parameters * 4, 1000, size, 0, size * dims.shapes.layers)
    room = estimate(dims.shapes, weights, [16], resident=resident, ring=ahead * size, workspace=WORKSPACE)
    return Plan(resident, WORKSPACE, room), weights


def test_a_mixture_multiplies_with_its_chosen_experts_only() -> None:
    model = tiny_model("mixtral")
    found = dims_of(model, torch.float32)
    experts = model.model.layers[0].mlp.experts
    packed = sum(p.numel() for p in experts.parameters())
    chosen, all_ = model.config.num_experts_per_tok, experts.gate_up_proj.shape[0]
    assert chosen < all_
    assert found.active == found.layer_parameters - packed + packed * chosen // all_


def test_forward_is_two_flops_for_each_parameter_and_token(dims: Dims) -> None:
    s = dims.shapes
    one = layer_work(dims, 16, Survivors(0, 0))["forward"].operations
    attention = 4 * 16 * 16 * s.heads * s.d_head
    assert one == 2 * 16 * dims.active + attention


def test_exact_evaluation_follows_the_survivors(dims: Dims) -> None:
    def lanes(pairs: float) -> float:
        return layer_work(dims, 64, Survivors(pairs, 0))["exact evaluation"].lanes

    assert lanes(0) == 0
    assert lanes(20_000) - lanes(10_000) == pytest.approx(10_000 * dims.shapes.d_model * 4.625)


def test_the_slowest_resource_decides(dims: Dims, machine: Ceilings) -> None:
    plan, weights = planned(dims, resident=False)
    usual = predict(dims, machine, [64], plan, weights)
    slow = predict(dims, replace(machine, disk=1e3), [64], plan, weights)
    assert slow.phases["read"].bound == "disk"
    assert slow.phases["read"].seconds > 0.9 * slow.reading
    assert slow.seconds > usual.seconds
    # Reading is beside the layers' computing where storage is fast: only the first is waited for.
    fast = predict(dims, replace(machine, disk=1e15), [64], plan, weights)
    assert fast.phases["read"].seconds == pytest.approx(fast.reading / dims.shapes.layers)
    # Where a layer computes in the only place that there is, the next one is read after it.
    alone, weights = planned(dims, resident=False, ahead=1)
    fast = predict(dims, replace(machine, disk=1e15), [64], alone, weights)
    assert fast.phases["read"].seconds == pytest.approx(fast.reading)


def test_an_unembedding_that_is_not_kept_is_read_for_each_prompt(dims: Dims, machine: Ceilings) -> None:
    plan, weights = planned(dims, resident=False)
    weights = replace(weights, head=10**8)
    ideal = Efficiency({}, {}, {})  # what is reached is another matter where weights are read
    seconds = {
        (keeps, n): predict(
            dims, machine, [16] * n, replace(plan, keeps_head=keeps), weights, efficiency=ideal
        ).phases["lens"]
        for keeps in (False, True)
        for n in (1, 3)
    }
    for n in (1, 3):
        reading = seconds[False, n].seconds - seconds[True, n].seconds
        assert reading == pytest.approx(n * 10**8 / machine.disk)
    assert seconds[False, 1].bound == "disk"
    resident, weights = planned(dims, resident=True)
    usual = predict(dims, machine, [16], resident, replace(weights, head=10**8), efficiency=ideal)
    assert usual.phases["lens"].seconds == pytest.approx(seconds[True, 1].seconds)


def test_what_is_reached_while_weights_are_read_is_for_that_only(dims: Dims, machine: Ceilings) -> None:
    reached = {"forward": 0.5, "forward, streamed": 0.25}
    seconds = {}
    for resident in (True, False):
        plan, weights = planned(dims, resident=resident)
        found = predict(dims, machine, [16], plan, weights, efficiency=Efficiency(reached, {}, {}))
        forward = found.phases["forward"]
        seconds[resident] = forward.seconds - forward.work.at(machine)["launch"]
    assert 0 < seconds[False] == pytest.approx(2 * seconds[True], rel=1e-6)


def test_prompts_share_one_read(dims: Dims, machine: Ceilings) -> None:
    plan, weights = planned(dims, resident=False)
    one, many = (predict(dims, machine, [16] * n, plan, weights) for n in (1, 5))
    assert many.reading == pytest.approx(one.reading)
    assert many.phases["forward"].seconds == pytest.approx(5 * one.phases["forward"].seconds, rel=0.2)
    resident, weights = planned(dims, resident=True)
    assert "read" not in predict(dims, machine, [16], resident, weights).phases


def test_bounds(machine: Ceilings) -> None:
    assert bound_of(Work({"float32": 1e11}), 1.5, machine) == "compute"
    assert bound_of(Work(memory=1e10), 1.0, machine) == "memory"
    assert bound_of(Work(disk=1e9), 1.0, machine) == "disk"
    assert bound_of(Work({"float32": 1e9}, memory=1e8), 1.0, machine) == "launch"
    assert bound_of(Work(), 0.0, machine) == "launch"


def test_expected_survivors_are_a_share() -> None:
    shares = [expected_pairs(T) for T in (1, 5, 64, 512, 4096)]
    assert shares == sorted(shares, reverse=True)
    assert all(0 < share <= 1 for share in shares)


def test_words() -> None:
    said = [seconds_in_words(s) for s in (0.0, 2e-5, 0.0123, 5.0, 90.0, 7200.0, 1e6)]
    assert said == ["0 us", "20 us", "12.3 ms", "5 s", "1.5 min", "2 h", "11.6 d"]
