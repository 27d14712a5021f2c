"""Times the GPU engine against its peers on layers of real shapes, and writes JSON and a table.

    python benchmarks/gpu_bench.py [--shapes NAME ...] [--tokens T ...] [--seconds S] [--json FILE]

For each shape and length: SDPA's flash forward and the layer's own forward (the price to be at), the tile
pass given W_O r and the log-sum-exp, these two alone, attention and neurons of one layer screened
and at screen 0, and where they fit a materialised torch decomposition and a chunked one. Attention patterns
have a sink, a local band and a few far heads, never noise alone; peak memory beyond the inputs is measured
too. Each figure is the median of repetitions timed with device events after a warm-up; shapes that time does
not allow are listed as such.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from lmtt.kernels import registry
from lmtt.kernels.directional_attention.fused import launch_tiles, row_logsumexp
from lmtt.kernels.triton_host import operands
from lmtt.kernels.types import Attention, AttentionTask, NeuronTask

DEVICE = "cuda"
WORKSPACE = 1 << 30
FLASH_LIMIT = 1.6  # of the flash forward's time, for the tile pass at T >= 2048


@dataclass(frozen=True)
class Shape:
    """One layer."""

    heads: int
    kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int


SHAPES = {
    "smollm2-135m": Shape(9, 3, 64, 576, 1536),
    "llama-3-8b": Shape(32, 8, 128, 4096, 14336),
    "llama-3-70b": Shape(64, 8, 128, 8192, 28672),
}


def milliseconds(work: Callable[[], Any], seconds: float) -> float:
    """Median time of one call, by device events."""
    work()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 3 or (time.monotonic() < end and len(times) < 50):
        begin, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(begin.elapsed_time(stop))
    return statistics.median(times)


def layer(shape: Shape, tokens: int) -> tuple[AttentionTask, NeuronTask, Callable[[], Tensor]]:
    """Tasks of one bf16 layer whose parts add up to its wholes, and the layer's forward from q, k, v on."""
    torch.manual_seed(0)
    s, dtype, device = shape, torch.bfloat16, DEVICE

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype).mul_(scale)

    x = draw(tokens, s.d_model)
    w_q, w_k, w_v = (
        draw(s.d_model, n * s.d_head, scale=s.d_model**-0.5) for n in (s.heads, s.kv_heads, s.kv_heads)
    )
    q, k, v = ((x @ w).view(tokens, -1, s.d_head).transpose(0, 1).contiguous() for w in (w_q, w_k, w_v))
    # A sink at the first token; positions make near tokens alike (a local band) but for every eighth head.
    steps = torch.arange(tokens, device=device, dtype=torch.float32)
    angle = steps[:, None] / torch.logspace(0.3, 2.5, s.d_head // 4, device=device)
    local = torch.cat([angle.cos(), angle.sin()], 1).to(dtype) * 1.6
    near = torch.arange(s.heads, device=device) % 8 != 0
    q[near, :, : s.d_head // 2] += local
    k[:, :, : s.d_head // 2] += local
    q[..., -1], k[..., -1] = 4.0, 0.0
    k[:, 0, -1] = 0.6 * s.d_head**0.5
    w_o = draw(s.heads, s.d_head, s.d_model, scale=(s.heads * s.d_head) ** -0.5)
    attention = Attention(q, k, v, w_o, scale=s.d_head**-0.5)
    w_gate, w_up = (draw(s.d_model, s.d_mlp, scale=s.d_model**-0.5) for _ in range(2))
    w_down = draw(s.d_mlp, s.d_model, scale=s.d_mlp**-0.5)

    def attend() -> Tensor:
        out = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        return out.transpose(0, 1).reshape(tokens, -1) @ w_o.view(-1, s.d_model)

    def forward() -> Tensor:
        for w in (w_q, w_k, w_v):
            x @ w
        mid = x + attend()
        return mid + (silu(mid @ w_gate) * (mid @ w_up)) @ w_down

    mid = x + attend()
    act = silu(mid @ w_gate) * (mid @ w_up)
    post = mid + act @ w_down
    return (
        AttentionTask(attention, x, mid, screen=1e-4, max_certificate=0.05, keep=1e-3, workspace=WORKSPACE),
        NeuronTask(act, w_down, mid, post, k=20, screen=1e-3, workspace=WORKSPACE),
        forward,
    )


def materialised(task: AttentionTask) -> Tensor:
    """Every part written out and measured, as published tools do; proximities [T, H, T]."""
    a = task.attention
    v = a.v.repeat_interleave(a.group, 0)
    logits = (a.q @ a.k.repeat_interleave(a.group, 0).mT).float() * a.scale
    logits.masked_fill_(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf)
    parts = torch.einsum("hij,hjd->ihjd", logits.softmax(-1).to(v.dtype), v @ a.w_o)
    y = task.whole[:, None, None, :]
    return (y.float().abs().sum(-1) - (y - parts).float().abs().sum(-1)).clamp(min=0)


def chunked(task: AttentionTask, rows: int = 128) -> Tensor:
    """One head and a few destinations at a time, nothing of size [T, T, D] held; edges [T, T]."""
    a, tokens = task.attention, task.whole.shape[0]
    edges = torch.zeros(tokens, tokens, device=task.whole.device)
    step = max(1, rows * 4096 // tokens // 16)
    for h in range(a.heads):
        u = a.v[h // a.group] @ a.w_o[h]
        for i in range(0, tokens, step):
            last = min(tokens, i + step)
            logits = (a.q[h, i:last] @ a.k[h // a.group, :last].T).float() * a.scale
            seen = torch.arange(last, device=u.device) <= torch.arange(i, last, device=u.device)[:, None]
            weight = logits.masked_fill_(~seen, -torch.inf).softmax(-1)
            y = task.whole[i:last].float()[:, None]
            near = y.abs().sum(-1) - (y - weight[..., None] * u[:last].float()).abs().sum(-1)
            edges[i:last, :last] += near.clamp_(min=0)
    return edges


def measure_kernels(
    attention: AttentionTask, forward: Callable[[], Tensor], shape: Shape, seconds: float
) -> dict[str, Any]:
    """The regular kernels and their peers; nothing outlives this function."""
    a, tokens = attention.attention, attention.whole.shape[0]
    of = operands(a)
    rows = torch.arange(tokens, device=DEVICE)
    signs = torch.where(attention.whole < 0, -1.0, 1.0).to(a.w_o.dtype)
    towards, lse = of.directions(signs, rows), row_logsumexp(of)
    edges = torch.zeros(tokens, tokens, device=DEVICE)
    flat = a.w_o.reshape(-1, shape.d_model)
    run: dict[str, Callable[[], Any]] = {
        "flash_forward": lambda: scaled_dot_product_attention(
            a.q[None], a.k[None], a.v[None], is_causal=True, enable_gqa=True
        ),
        "layer_forward": forward,
        "tile_pass": lambda: launch_tiles(of, lse, rows, towards, edges, "heads"),
        "row_sums": lambda: (
            launch_tiles(of, lse, rows, towards, edges[: shape.heads], "sources")
            if tokens >= shape.heads
            else None
        ),
        "log_sum_exp": lambda: row_logsumexp(of),
        "projection": lambda: torch.mm(signs, flat.T, out_dtype=torch.float32),
    }
    result: dict[str, Any] = {}
    for label, work in run.items():
        result[label] = milliseconds(work, seconds)
    result["tile_pass_over_flash"] = result["tile_pass"] / result["flash_forward"]
    flops = 2.0 * tokens * flat.numel()
    square = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    dense = 2 * 8192.0**3 / milliseconds(lambda: square @ square, seconds)
    result["projection_rate_over_gemm"] = flops / result["projection"] / dense
    return result


def measure(name: str, shape: Shape, tokens: int, seconds: float) -> dict[str, Any]:
    """All figures of one shape and length, in milliseconds unless named otherwise."""
    attention, neurons, forward = layer(shape, tokens)
    result = {"shape": name, "tokens": tokens, **measure_kernels(attention, forward, shape, seconds)}
    for backend in ("cuda", "triton"):
        if registry.availability()[backend] is not None:
            result[backend] = registry.availability()[backend]
            continue
        for label, task in (
            ("attention", attention),
            ("neurons", neurons),
            *(
                [("attention_exact", replace(attention, screen=0.0))]
                if backend == "cuda" or tokens <= 1024
                else []
            ),
        ):
            op = "neuron_contributions" if isinstance(task, NeuronTask) else "attention_contributions"
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outcome = registry.run(op, task, backend=backend)[0]
            result[f"{backend}_{label}_bytes"] = torch.cuda.max_memory_allocated() - before
            result[f"{backend}_{label}_evaluated"] = outcome.evaluated
            result[f"{backend}_{label}"] = milliseconds(
                lambda op=op, task=task, backend=backend: registry.run(op, task, backend=backend), seconds
            )
        total = result[f"{backend}_attention"] + result[f"{backend}_neurons"]
        result[f"{backend}_over_layer"] = total / result["layer_forward"]
    for label, peer, bytes_needed in (
        ("materialised", materialised, 6.0 * shape.heads * tokens**2 * shape.d_model),
        ("chunked", chunked, 0.0),
    ):
        work = tokens**2 * shape.heads * shape.d_model
        if bytes_needed > 0.6 * torch.cuda.mem_get_info()[0]:
            result[label] = f"not run: needs {bytes_needed / 2**30:.0f} GiB"
        elif work > 3e12:
            result[label] = "not run: more than the time given"
        else:
            result[label] = milliseconds(lambda peer=peer: peer(attention), 0.0)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 4096, 8192])
    parser.add_argument("--seconds", type=float, default=0.15, help="per figure")
    parser.add_argument("--limit", type=float, default=220.0, help="seconds for everything")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin, results = time.monotonic(), []
    asked = [(name, tokens) for tokens in options.tokens for name in options.shapes]
    if "llama-3-8b" in options.shapes:
        asked.append(("llama-3-8b", 10_000))  # where the peers run out of memory
    for name, tokens in asked:
        if time.monotonic() - begin > options.limit:
            results.append({"shape": name, "tokens": tokens, "not run": "the time given was spent"})
            continue
        try:
            results.append(measure(name, SHAPES[name], tokens, options.seconds))
        except torch.OutOfMemoryError as error:
            results.append({"shape": name, "tokens": tokens, "not run": f"out of memory: {error}"[:200]})
        torch.cuda.empty_cache()
        r = results[-1]
        shown = {
            k: round(v, 3) if isinstance(v, float) else v for k, v in r.items() if not k.endswith("_bytes")
        }
        print(json.dumps(shown), flush=True)
    device = torch.cuda.get_device_properties(0)
    record = {
        "device": device.name,
        "torch": torch.__version__,
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
        "results": results,
    }
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"\n{'shape':14} {'T':>6} {'tile/flash':>10} {'layer ms':>9} {'cuda/layer':>10} {'triton/layer':>12}"
    )
    for r in results:
        cells = [
            r.get(k)
            for k in ("tile_pass_over_flash", "layer_forward", "cuda_over_layer", "triton_over_layer")
        ]
        shown_cells = " ".join(f"{c:10.2f}" if isinstance(c, float) else f"{'-':>10}" for c in cells)
        late = r["tokens"] >= 2048 and r.get("tile_pass_over_flash", 0) > FLASH_LIMIT
        print(f"{r['shape']:14} {r['tokens']:6} {shown_cells}{'  slower than its limit' if late else ''}")


if __name__ == "__main__":
    main()
