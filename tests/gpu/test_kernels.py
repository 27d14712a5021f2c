"""GPU kernels against the float64 reference, on a GPU or under Triton's interpreter.

What tests/numerics does for every backend with small random tasks is not repeated here: these are the shapes,
dtypes and paths that only GPU kernels know.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmtt.kernels import registry
from lmtt.kernels.directional_attention.reference import directional_attention
from lmtt.kernels.neurons.reference import neuron_contributions
from lmtt.kernels.proximity.reference import attention_contributions
from lmtt.kernels.triton_host import interpreted
from lmtt.testing import assert_topk, assert_within

pytestmark = [pytest.mark.gpu] if not interpreted() else []

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 45 if interpreted() else 70  # two tiles of rows and of sources, the last of each not full
SHARE = 1e-5  # of shares: rounding of single pairs, with pattern weights of moderate logits


def checksum_limit(dtype):
    """Of the relative defect of a task whose whole was rounded to `dtype`."""
    return 1e-5 if dtype == torch.float32 else 2e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 80, 96, 112, 128, 192, 256])
def test_heads_of_every_width(case, device, width, dtype):
    task = case.attention(35, width, 48, heads=2, kv=1, dtype=dtype)
    direction = case.direction(35, 48, dtype)
    want = directional_attention(
        case.moved(task.attention, "cpu", torch.float64), direction.double(), "heads"
    )
    on = case.moved(task.attention, device)
    got, choice = registry.run("directional_attention", on, direction.to(device), "heads", backend="triton")
    assert choice.backend == "triton"
    assert_within(got, want, 2e-5 * float(want.abs().max()), f"{width} {dtype}")


def test_sums_of_the_positive_part(case, device, triton):
    """What no backend function asks for: the epilogue alone."""
    from lmtt.kernels.directional_attention.fused import launch_tiles, row_logsumexp
    from lmtt.kernels.triton_host import operands

    attention, direction = case.attention(35, 16, 48).attention, case.direction(35, 48, torch.float32)
    want = directional_attention(case.moved(attention, "cpu", torch.float64), direction.double())
    of, rows = operands(case.moved(attention, device)), torch.arange(35, device=device)
    out = torch.full((4, 35), torch.nan, device=device)
    launch_tiles(
        of, row_logsumexp(of), rows, of.directions(direction.to(device), rows), out, "sources", positive=True
    )
    assert_within(out, want.clamp(min=0).sum(-1), 2e-5 * float(want.abs().sum(-1).max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [80, 96, 112, 192])
def test_shares_of_heads_whose_width_is_no_power_of_two(case, device, width, dtype):
    """Every kernel that runs over the width: screen, coefficients of the list, and whole tiles."""
    task = case.attention(35, width, 33, heads=2, kv=1, dtype=dtype, screen=1e-3, keep=0.0)
    want = attention_contributions(case.exact(task))
    got, choice = registry.run("attention_contributions", case.moved(task, device), backend="triton")
    assert choice.backend == "triton"
    assert 0 < got.evaluated < got.positive, "nothing was listed, or everything"
    allowed = got.certificate.cpu()[:, None] + SHARE
    assert_within(got.edges, want.edges, allowed, "edges")
    assert_within(got.per_head, want.per_head, allowed, "heads")
    assert_within(got.checksum, torch.zeros(35), checksum_limit(dtype), "checksum")
    kept = case.moved(tuple(got.kept), "cpu")
    sums = torch.zeros(35, 35).index_put(kept[:2], kept[3], accumulate=True)
    assert_within(sums, got.edges, 1e-6, "an edge's pairs, listed or not, add up to it")


@pytest.mark.parametrize(
    ("width", "group", "window", "screen", "dtype"),
    [
        (64, 2, None, 0.0, torch.bfloat16),
        (128, 1, None, 1e-3, torch.bfloat16),
        (64, 2, 97, 1e-3, torch.bfloat16),
        (64, 1, None, 1e-3, torch.float16),
    ],
    ids=["exact", "128", "window", "float16"],
)
def test_tiles_without_masks(case, device, triton, width, group, window, screen, dtype, monkeypatch):
    """Long enough for tiles in which every row sees everything, which have kernels of their own."""
    from lmtt.kernels import triton_host
    from lmtt.kernels.proximity import screen as screening

    tokens = 97 if interpreted() else 400
    task = case.attention(tokens, width, 48, heads=2, kv=2 // group, dtype=dtype, screen=screen)
    a = replace(task.attention, window=window)
    task = case.summing(replace(task, attention=a, keep=1e-2, max_certificate=0.05 if window else 1.0))
    want = attention_contributions(case.exact(task))
    task = case.moved(task, device)
    taken = []
    kernel = screening._screen_inside
    monkeypatch.setattr(screening, "_screen_inside", _Counting(kernel, taken))
    got, _ = registry.run("attention_contributions", task, backend="triton")
    assert taken, "no kernel without masks was launched"
    allowed = got.certificate.cpu()[:, None] + SHARE
    assert_within(got.edges, want.edges, allowed, "edges")
    assert_within(got.per_head, want.per_head, allowed, "heads")
    assert_within(got.checksum, torch.zeros(tokens), checksum_limit(dtype), "checksum")
    # The other kernels alone: the same numbers, and the same pairs.
    plain = triton_host.tile

    def without(*arguments):
        return replace(plain(*arguments), inside=0)

    monkeypatch.setattr(triton_host, "tile", without)
    other, _ = registry.run("attention_contributions", task, backend="triton")
    assert_within(got.edges, other.edges.cpu(), 1e-6)
    assert_within(got.certificate, other.certificate.cpu(), 1e-6)
    assert abs(got.positive - other.positive) <= 2
    assert abs(got.evaluated - other.evaluated) <= 2
    assert abs(len(got.kept.head) - len(other.kept.head)) <= 2
    direction = case.direction(tokens, 48, dtype).to(device)
    summed = registry.run("directional_attention", task.attention, direction, "heads", backend="triton")[0]
    monkeypatch.setattr(triton_host, "tile", plain)
    inside = registry.run("directional_attention", task.attention, direction, "heads", backend="triton")[0]
    assert_within(inside, summed.cpu(), 1e-5 * float(summed.abs().max()))


class _Counting:
    """A kernel that says when it is launched."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("screen", [0.0, 1e-3])
@pytest.mark.parametrize("measure", ["l1", "l2"])
def test_attention_shares(case, device, backend, measure, screen, dtype):
    task = case.attention(TOKENS, 16, 48, dtype=dtype, screen=screen, measure=measure, keep=1e-2)
    if backend == "cuda" and measure == "l2":
        pytest.skip("L1 only")
    want = attention_contributions(case.exact(task))
    got, choice = registry.run("attention_contributions", case.moved(task, device), backend=backend)
    assert choice.backend == backend
    allowed = got.certificate.cpu()[:, None] + SHARE
    assert_within(got.edges, want.edges, allowed, "edges")
    assert_within(got.per_head, want.per_head, allowed, "heads")
    assert_within(got.residual, want.residual, allowed[:, 0], "residual")
    assert_within(got.checksum, torch.zeros(TOKENS), checksum_limit(dtype), "checksum")
    if screen == 0:
        assert_within(got.certificate, torch.zeros(TOKENS), 0.0, "certificate")
        kept, wanted = (
            dict(zip(zip(*(x.tolist() for x in pairs[:3]), strict=True), pairs.value.tolist(), strict=True))
            for pairs in (got.kept, want.kept)
        )
        doubtful = kept.keys() ^ wanted.keys()  # kept by one of the two: as near the limit as rounding goes
        assert all(abs(wanted.get(p, 1e-2) - 1e-2) < SHARE for p in doubtful), "kept pairs"
    elif measure == "l1":
        assert got.evaluated < 0.9 * got.positive, "the screen lets nearly everything through: no test of it"


def test_mostly_listed_tiles_are_evaluated_as_a_whole(case, device, triton):
    """The same shares from `_dense` as from the list."""
    from lmtt.kernels.proximity import fused

    task = case.moved(case.attention(TOKENS, 16, 48), device)
    whole, listed = (fused.attention_contributions(task, dense=dense) for dense in (True, False))
    assert whole.evaluated == listed.evaluated
    assert_within(whole.edges, listed.edges.cpu(), 1e-6)
    bits = torch.zeros(1, 40, 2, dtype=torch.int32, device=device)
    bits[0, :16, 0] = -1
    bits[0, 20, 1] = 1
    assert fused.dense_tiles(bits).tolist() == [[0, 0, 0]], "one full tile, one with a single pair"
    assert len(fused.list_pairs(bits).row) == 16 * 32 + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("screen", [0.0, 1e-3])
def test_neurons(case, device, backend, screen, dtype):
    task = case.neurons(20, 150, 48, dtype=dtype, screen=screen, k=9)
    want = neuron_contributions(replace(case.exact(task), k=150))
    got, choice = registry.run("neuron_contributions", case.moved(task, device), backend=backend)
    assert choice.backend == backend
    scores = torch.zeros(20, 150, dtype=torch.float64).scatter(1, want.index, want.value)
    certificate = got.certificate.cpu().double()
    assert_topk(got.index.cpu(), got.value.cpu(), scores, certificate[:, None] + SHARE)
    assert_within(got.residual, want.residual, certificate + SHARE)


def test_out_of_memory_goes_on_with_fewer_rows_and_says_so():
    from lmtt.kernels.triton_host import chunks

    done, sizes = [], []

    def work(rows):
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("planted")
        done.extend(rows.tolist())

    with pytest.warns(RuntimeWarning, match="out of device memory with 8 rows at a time; going on with 4"):
        chunks(torch.arange(8), 8, work)
    assert done == list(range(8))
    assert sizes == [8, 4, 2, 2, 2, 2]
    done.clear()
    sizes.clear()
    with pytest.warns(RuntimeWarning, match="out of device memory with 8 rows at a time; going on with 6"):
        chunks(torch.arange(8), 100, work)
    assert done == list(range(8))
    assert sizes == [8, 6, 3, 3, 2], "not tried again with as many rows"
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(RuntimeWarning):
        chunks(torch.arange(8), 8, lambda rows: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")))


@pytest.mark.skipif(interpreted(), reason="one run after another is deterministic on the CPU")
def test_twenty_runs_give_the_same_bits(case, device, backend):
    task = case.moved(case.attention(300, 64, 256, dtype=torch.bfloat16, screen=1e-4, keep=1e-3), device)
    mlp = case.moved(case.neurons(64, 1000, 256, dtype=torch.bfloat16, screen=1e-3), device)
    first = None
    for _ in range(20):
        poison = torch.full((1 << 24,), torch.nan, device=device)  # what later results may be allocated over
        del poison
        a = registry.run("attention_contributions", task, backend=backend)[0]
        n = registry.run("neuron_contributions", mlp, backend=backend)[0]
        now = [a.edges, a.per_head, a.normaliser, *a.kept, n.index, n.value, n.normaliser]
        assert all(bool(x.isfinite().all()) for x in now), "an element that nobody wrote"
        first = first or now
        assert all(torch.equal(x, y) for x, y in zip(first, now, strict=True))


def test_rows_done_again_after_running_out_of_memory_count_once(case, device, triton, monkeypatch):
    """Out of memory in the very last step of a chunk, in the first pass and in that of uncertified rows."""
    from lmtt.kernels.proximity import fused

    task = case.attention(45, 16, 48, screen=1e-3, keep=0.0, max_certificate=0.0)
    task = case.moved(task, device)
    monkeypatch.setattr(fused, "_rows_at_once", lambda *_: 22)
    want = fused.attention_contributions(task)
    assert want.reevaluated > 0
    assert want.evaluated > 0
    monkeypatch.setattr(fused, "_rows_at_once", lambda *_: 45)
    keep, calls = fused._keep, []

    def failing(*arguments):
        calls.append(len(arguments[3]))
        if calls[-1] > 22:
            raise torch.OutOfMemoryError("planted")
        return keep(*arguments)

    monkeypatch.setattr(fused, "_keep", failing)
    with pytest.warns(RuntimeWarning, match="out of device memory with 45 rows at a time; going on with 22"):
        got = fused.attention_contributions(task)
    assert sum(rows > 22 for rows in calls) == 2, "both passes failed once"
    for name, expected in vars(want).items():
        found = getattr(got, name)
        pairs = zip(found, expected, strict=True) if name == "kept" else [(found, expected)]
        for x, y in pairs:
            if isinstance(y, torch.Tensor):
                assert bool(y.isfinite().all()), name
                assert torch.equal(x, y), name
            else:
                assert x == y, name
