"""Softcap, sinks, masks, windows, ALiBi, gates and given log-sum-exps on the device.

Against the float64 reference. tests/numerics draws many more of their combinations, but on the CPU alone. A
few sets that between them have every feature are enough here: each is compiled anew.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmtt.kernels import registry
from lmtt.kernels.directional_attention.reference import directional_attention
from lmtt.kernels.proximity.reference import attention_contributions
from lmtt.kernels.triton_host import interpreted
from lmtt.testing import assert_within

pytestmark = [pytest.mark.gpu] if not interpreted() else []

TOKENS = 37  # two tiles under the interpreter, the last not full
HEADS, WIDTH, D_MODEL = 4, 16, 33
SHARE = 1e-5


def features(names, draw):
    """Of an `Attention`: those named, with random contents."""
    seen = torch.rand(HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3)) < 0.7
    seen[:, TOKENS // 2] = False  # a row with nothing to attend to
    all_of_them = {
        "softcap": lambda: 1.5,
        "window": lambda: 11,
        "sinks": lambda: draw(HEADS),
        "mask": lambda: seen[:1],
        "head mask": lambda: draw(HEADS, TOKENS, TOKENS).masked_fill(~seen, -torch.inf),
        "alibi": lambda: draw(HEADS).abs(),
        "lse": lambda: draw(HEADS, TOKENS).float().abs() + 3,
        "gate": lambda: draw(TOKENS, HEADS, WIDTH),
    }
    return {name.removeprefix("head "): all_of_them[name]() for name in names}


@pytest.fixture(
    params=[
        ("softcap", "sinks", "gate"),
        ("window", "sinks"),
        ("mask", "alibi"),
        ("head mask", "softcap", "window"),
        ("lse", "alibi", "gate"),
    ],
    ids=" and ".join,
)
def task(request, case, dtype):
    random = torch.Generator().manual_seed(5)
    plain = case.attention(TOKENS, WIDTH, D_MODEL, dtype=dtype)
    named = features(request.param, lambda *size: torch.randn(*size, generator=random).to(dtype))
    got = replace(plain, attention=replace(plain.attention, **named))
    changed = directional_attention(got.attention, plain.whole, "sources")
    was = directional_attention(plain.attention, plain.whole, "sources")
    assert not torch.allclose(changed, was, rtol=1e-2), "the features change the result"
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_heads_wrote_along_a_direction(task, case, device, dtype):
    direction = case.direction(TOKENS, D_MODEL, dtype)
    on = case.moved(task.attention, device)
    for reduce in (None, "heads", "sources"):
        want = directional_attention(
            case.moved(task.attention, "cpu", torch.float64), direction.double(), reduce
        )
        got, choice = registry.run(
            "directional_attention", on, direction.to(device), reduce, backend="triton"
        )
        assert choice.backend == "triton"
        assert_within(got, want, 5e-5 * float(want.abs().max()), f"reduce={reduce}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shares(task, case, device, backend, dtype):
    task = replace(task, screen=1e-3, keep=0.0, max_certificate=1.0)
    want = attention_contributions(case.exact(task))
    got, choice = registry.run("attention_contributions", case.moved(task, device), backend=backend)
    assert choice.backend == backend
    assert got.evaluated > 0
    allowed = got.certificate.cpu()[:, None] + SHARE
    assert_within(got.edges, want.edges, allowed, "edges")
    assert_within(got.per_head, want.per_head, allowed, "heads")
    assert_within(got.residual, want.residual, allowed[:, 0], "residual")
