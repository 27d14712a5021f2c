"""The GPU kernel of the k largest logits, on a GPU or under Triton's interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lmtt import ops
from lmtt.kernels.triton_host import interpreted
from lmtt.kernels.unembed_topk.reference import unembed_topk
from lmtt.testing import assert_topk, assert_within

pytestmark = [pytest.mark.gpu] if not interpreted() else []

ROWS, VOCABULARY = (17, 75) if interpreted() else (131, 700)  # neither a multiple of a tile
MORE = 40 if interpreted() else 200  # than a tile has columns, and than one pass finds


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What nobody wrote is NaN, or the largest integer."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=[True, False], ids=["strips", "one strip"])
def fused(request, device, triton, monkeypatch):
    """The op, with strips of one tile, or with all tiles in one strip."""
    from lmtt.kernels.unembed_topk import fused

    monkeypatch.setattr(fused, "PROGRAMS", 1 << 30 if request.param else 1)

    def run(x, w_u, k, **options):
        bias = options.pop("bias", None)
        got = fused.unembed_topk(
            x.to(device), w_u.to(device), k, bias=None if bias is None else bias.to(device), **options
        )
        return type(got)(*(t.cpu() for t in (got.values, got.indices, got.logsumexp)))

    return run


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("states", "weights", "k", "options"),
    [
        (torch.float32, torch.float32, 10, {"softcap": 5.0, "scale": 0.5}),
        (torch.bfloat16, torch.bfloat16, MORE, {"scale": -2.0}),
        (torch.float16, torch.float16, 3, {}),
        (torch.float32, torch.bfloat16, 5, {"softcap": 3.0}),
    ],
    ids=["float32", "bfloat16 in passes", "float16", "mixed"],
)
@pytest.mark.parametrize("offset", [0.0, -60.0], ids=["", "all negative"])
def test_against_the_oracle(fused, states, weights, k, options, offset):
    x, w_u = draw(ROWS, 48, dtype=states), draw(VOCABULARY, 48, dtype=weights, seed=1)
    bias = (draw(VOCABULARY, seed=2) + offset / options.get("scale", 1.0)).to(weights)
    want = unembed_topk(x.double(), w_u.double(), VOCABULARY, bias=bias.double(), **options)
    got = fused(x, w_u, k, bias=bias, **options)
    scores = torch.zeros(ROWS, VOCABULARY, dtype=torch.float64).scatter(1, want.indices, want.values)
    assert_topk(got.indices, got.values, scores, 5e-5)
    assert_within(got.logsumexp, want.logsumexp, 5e-5)
    assert bool((want.values[:, 0] < 0).all()) == (offset < 0), "the case has the sign that it is named for"


def test_ties_go_to_the_lower_token(fused):
    """Within a tile, across tiles, and where a pass ends in the midst of equal logits; -0 equals 0."""
    w_u = torch.ones(VOCABULARY, 16)
    w_u[[7, 33, 66]] = 2
    got = fused(torch.ones(2, 16), w_u, MORE)
    rest = [t for t in range(VOCABULARY) if t not in (7, 33, 66)]
    assert got.indices.tolist() == [[7, 33, 66, *rest][:MORE]] * 2
    small = torch.full((VOCABULARY, 16), 1e-20)
    small[::2] *= -1
    got = fused(torch.ones(1, 16), small, 6, scale=1e-30)  # 0 and -0 in turns
    assert got.indices.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_what_is_not_finite(fused):
    """-inf is a logit like others, also where k reaches it; NaN is the largest, as in the reference."""
    x, w_u, bias = draw(3, 16), draw(VOCABULARY, 16, seed=1), torch.zeros(VOCABULARY)
    bias[5:] = -torch.inf
    w_u[3, 2] = torch.nan
    got, want = fused(x, w_u, 9, bias=bias), unembed_topk(x, w_u, 9, bias=bias)
    assert got.indices.tolist() == want.indices.tolist()
    assert torch.equal(got.values.isnan(), want.values.isnan())
    assert bool((got.indices[:, 0] == 3).all())
    assert_within(got.values[:, 1:5], want.values[:, 1:5], 2e-5)
    assert bool((got.values[:, 5:] == -torch.inf).all())
    w_u[3, 2] = 0.0
    assert_within(fused(x, w_u, 1, bias=bias).logsumexp, unembed_topk(x, w_u, 1, bias=bias).logsumexp, 2e-5)


def test_weights_that_are_a_part_of_wider_rows(fused):
    wide = draw(VOCABULARY, 40, seed=1)
    x = draw(4, 16)
    got, want = fused(x, wide[:, 8:24], 4), unembed_topk(x, wide[:, 8:24], 4)
    assert got.indices.tolist() == want.indices.tolist()
    assert_within(got.values, want.values, 2e-5)


def test_out_of_memory_in_the_public_op_goes_on_and_says_so(device, triton, monkeypatch):
    """The kernel of more than 20 rows does not fit: the op gives the same numbers, and a notice."""
    from lmtt.kernels.unembed_topk import fused

    x, w_u = draw(48, 16).to(device), draw(40, 16, seed=1).to(device)
    want = ops.unembed_topk(x, w_u, 4, backend="triton")
    kernel, sizes = fused._best_logits, []

    class Scarce:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                sizes.append(len(arguments[0]))
                if sizes[-1] > 20:
                    raise torch.OutOfMemoryError("planted")
                return kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(fused, "_best_logits", Scarce())
    with pytest.warns(RuntimeWarning, match="out of device memory with 48 rows at a time; going on with"):
        got = ops.unembed_topk(x, w_u, 4, backend="triton")
    assert sizes[0] == 48
    assert sizes[1] < 48, "tried with fewer rows than there are"
    assert sum(size for size in sizes if size <= 20) == 48, "each row once"
    assert torch.equal(got.indices, want.indices)
    assert_within(got.values, want.values, 2e-5)
    assert_within(got.logsumexp, want.logsumexp, 2e-5)
