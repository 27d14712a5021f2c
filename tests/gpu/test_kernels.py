"""GPU kernels against the float64 reference, on a GPU or under Triton's interpreter.

What tests/numerics does for every backend with small random tasks is not repeated here: these are the shapes,
dtypes and paths that only GPU kernels know.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from lmtt.kernels import registry
from lmtt.kernels.directional_attention.reference import directional_attention
from lmtt.kernels.neurons.reference import neuron_contributions
from lmtt.kernels.proximity.reference import attention_contributions
from lmtt.kernels.unembed_topk.reference import unembed_topk
from lmtt.testing import assert_topk, assert_within

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.gpu] if not INTERPRETED else []

SHARE = 1e-5  # of shares: rounding of single pairs, with pattern weights of moderate logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 80, 96, 112, 128, 192, 256])
def test_heads_of_every_width(case, device, width, dtype):
    if INTERPRETED and (dtype == torch.float16 or width in (96, 112)):
        pytest.skip("too slow to interpret them all: 80 and 192 are no power of two either")
    task = case.attention(35, width, 48, heads=2, kv=1, dtype=dtype)
    direction = torch.randn(35, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = directional_attention(
        case.moved(task.attention, "cpu", torch.float64), direction.double(), "heads"
    )
    on = case.moved(task.attention, device)
    got, choice = registry.run("directional_attention", on, direction.to(device), "heads", backend="triton")
    assert choice.backend == "triton"
    assert_within(got, want, 2e-5 * float(want.abs().max()), f"{width} {dtype}")


@pytest.mark.parametrize(
    ("width", "group", "window", "screen"),
    [(64, 2, None, 0.0), (128, 1, None, 1e-3), (64, 2, 97, 1e-3)],
    ids=["exact", "128", "window"],
)
def test_tiles_without_masks(case, device, width, group, window, screen, monkeypatch):
    """Long enough for tiles in which every row sees everything, which have kernels of their own."""
    from lmtt.kernels.backends import triton_backend

    if (reason := triton_backend.available()) is not None:
        pytest.skip(reason)
    from lmtt.kernels import triton_host
    from lmtt.kernels.proximity import screen as screening

    tokens = 100 if INTERPRETED else 400
    task = case.attention(tokens, width, 48, heads=2, kv=2 // group, dtype=torch.bfloat16, screen=screen)
    a = replace(task.attention, window=window)
    task = case.summing(replace(task, attention=a, keep=1e-2, max_certificate=0.05 if window else 1.0))
    want = attention_contributions(replace(case.moved(task, "cpu", torch.float64), screen=0.0))
    task = case.moved(task, device)
    taken = []
    kernel = screening._screen_inside
    monkeypatch.setattr(screening, "_screen_inside", _Counting(kernel, taken))
    got, _ = registry.run("attention_contributions", task, backend="triton")
    assert taken, "no kernel without masks was launched"
    allowed = got.certificate.cpu()[:, None] + SHARE
    assert_within(got.edges, want.edges, allowed, "edges")
    assert_within(got.per_head, want.per_head, allowed, "heads")
    assert_within(got.checksum, torch.zeros(tokens), 2e-2, "checksum")
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
    direction = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("screen", [0.0, 1e-3])
@pytest.mark.parametrize("measure", ["l1", "l2"])
def test_attention_shares(case, device, backend, measure, screen, dtype):
    task = case.attention(70, 16, 48, dtype=dtype, screen=screen, measure=measure, keep=1e-2)
    if backend == "cuda" and measure == "l2":
        pytest.skip("L1 only")
    want = attention_contributions(replace(case.moved(task, "cpu", torch.float64), screen=0.0))
    got, choice = registry.run("attention_contributions", case.moved(task, device), backend=backend)
    assert choice.backend == backend
    allowed = got.certificate.cpu()[:, None] + SHARE
    assert_within(got.edges, want.edges, allowed, "edges")
    assert_within(got.per_head, want.per_head, allowed, "heads")
    assert_within(got.residual, want.residual, allowed[:, 0], "residual")
    assert_within(got.checksum, torch.zeros(70), 1e-5 if dtype == torch.float32 else 2e-2, "checksum")
    if screen == 0:
        assert_within(got.certificate, torch.zeros(70), 0.0, "certificate")
        pairs = set(zip(*(x.tolist() for x in got.kept[:3]), strict=True))
        others = set(zip(*(x.tolist() for x in want.kept[:3]), strict=True))
        edge = {
            p: float(v)
            for p, v in zip(
                zip(*(x.tolist() for x in want.kept[:3]), strict=True), want.kept.value, strict=True
            )
        }
        assert all(abs(edge.get(p, 1e-2) - 1e-2) < SHARE for p in pairs ^ others), "kept pairs"
    elif measure == "l1":
        assert got.evaluated < 0.9 * got.positive, "the screen lets nearly everything through: no test of it"


def test_mostly_listed_tiles_are_evaluated_as_a_whole(case, device):
    """The same shares from `_dense` as from the list."""
    from lmtt.kernels.backends import triton_backend

    if (reason := triton_backend.available()) is not None:
        pytest.skip(reason)
    from lmtt.kernels.proximity import fused

    task = case.moved(case.attention(70, 16, 48), device)
    whole, listed = (fused.attention_contributions(task, dense=dense) for dense in (True, False))
    assert whole.evaluated == listed.evaluated
    assert_within(whole.edges, listed.edges.cpu(), 1e-6)
    bits = torch.zeros(1, 40, 2, dtype=torch.int32, device=device)
    bits[0, :16, 0] = -1
    bits[0, 20, 1] = 1
    assert fused.dense_tiles(bits).tolist() == [[0, 0, 0]], "one full tile, one with a single pair"
    assert len(fused.list_pairs(bits).row) == 16 * 32 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("screen", [0.0, 1e-3])
def test_neurons(case, device, backend, screen, dtype):
    task = case.neurons(20, 150, 48, dtype=dtype, screen=screen, k=9)
    want = neuron_contributions(replace(case.moved(task, "cpu", torch.float64), screen=0.0, k=150))
    got, choice = registry.run("neuron_contributions", case.moved(task, device), backend=backend)
    assert choice.backend == backend
    scores = torch.zeros(20, 150, dtype=torch.float64).scatter(1, want.index, want.value)
    certificate = got.certificate.cpu().double()
    assert_topk(got.index.cpu(), got.value.cpu(), scores, certificate[:, None] + SHARE)
    assert_within(got.residual, want.residual, certificate + SHARE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unembedding(case, device, dtype):
    random = torch.Generator().manual_seed(0)
    x, w_u = torch.randn(33, 48, generator=random).to(dtype), torch.randn(300, 48, generator=random).to(dtype)
    want = unembed_topk(x.double(), w_u.double(), 300, softcap=5.0, scale=0.5)
    got, choice = registry.run(
        "unembed_topk",
        x.to(device),
        w_u.to(device),
        10,
        softcap=5.0,
        scale=0.5,
        workspace=20_000,
        backend="triton",
    )
    assert choice.backend == "triton"
    scores = torch.zeros(33, 300, dtype=torch.float64).scatter(1, want.indices, want.values)
    assert_topk(got.indices.cpu(), got.values.cpu(), scores, 2e-5)
    assert_within(got.logsumexp, want.logsumexp, 2e-5)


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
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(RuntimeWarning):
        chunks(torch.arange(8), 8, lambda rows: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")))


@pytest.mark.skipif(INTERPRETED, reason="one run after another is deterministic on the CPU")
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
