"""A model's layers as pictures: the stream runs down, every addition is a branch, every sum a node.

layers 0 to 29
  resid_pre
  │
  ├── attention: self_attn.o_proj   closes to 3.1e-07
  │     9 heads of 64, 3 key/value heads
  │     q, k and v from self_attn (registry)
  │
  ⊕ resid_mid                       closes to 0.0e+00
  │
  ├── mlp: mlp.down_proj            closes to 2.4e-07
  │     1536 neurons
  │
  ⊕ resid_post                      closes to 0.0e+00
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from lmtt.engine import Engine
from lmtt.errors import ClosureError
from lmtt.structure.spec import (
    AttentionWrite,
    CapturedLayer,
    CapturedWrite,
    LayerStructure,
    MlpWrite,
    Norm,
    OpaqueWrite,
    Write,
)
from lmtt.structure.verify import measure_closure


def draw(engine: Engine) -> Iterator[str]:
    """A picture of every kind of layer, with what its sums close to, from a run over a few tokens.

    Raises `LmttError` after the pictures if a layer does not close, and at once if one is not a sum.
    """
    pictures: dict[tuple[Line, ...], Kind] = {}

    def look(known: LayerStructure, captured: CapturedLayer) -> None:
        lines, errors = _picture(known, captured)
        pictures.setdefault(tuple(lines), Kind()).add(captured.index, errors)

    refusal: ClosureError | None = None
    try:
        engine.structures(look)
    except ClosureError as error:
        refusal = error
    for lines, kind in pictures.items():
        yield f"{'layers' if len(kind.members) > 1 else 'layer'} {_ranges(kind.members)}"
        yield from kind.drawn(lines)
    if refusal is not None:
        raise refusal


@dataclass(frozen=True)
class Line:
    """One line of a layer's picture; `number` says which of its errors stands at the end, if any does."""

    text: str
    number: int | None = None


@dataclass
class Kind:
    """Layers that look alike, and the largest error of each of their sums."""

    members: list[int] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)  # (error, bound)

    def add(self, layer: int, errors: list[tuple[float, float]]) -> None:
        """One more layer of this kind."""
        self.members.append(layer)
        pairs = zip(self.errors or errors, errors, strict=True)
        self.errors = [max(pair, key=lambda e: (math.isnan(e[0]), e[0])) for pair in pairs]

    def drawn(self, lines: tuple[Line, ...]) -> Iterator[str]:
        """The picture's lines with their errors in one column."""
        width = max(len(line.text) for line in lines if line.number is not None)
        for line in lines:
            if line.number is None:
                yield f"  {line.text}"
                continue
            error, bound = self.errors[line.number]
            verdict = (
                f"closes to {error:.1e}" if error <= bound else f"DOES NOT CLOSE: {error:.1e} > {bound:.0e}"
            )
            yield f"  {line.text:<{width}}   {verdict}"


def _picture(known: LayerStructure, captured: CapturedLayer) -> tuple[list[Line], list[tuple[float, float]]]:
    """A layer as its stream runs down: each addition a branch, each sum that something reads a node."""
    lines: list[Line] = [Line("resid_pre")]
    errors: list[tuple[float, float]] = []
    for number, (stage, sums) in enumerate(
        zip(captured.stages, measure_closure(captured, full=True), strict=True)
    ):
        *sublayers, whole = [(closure.error, closure.bound) for closure in sums]
        branches = [w for w in known.writes if w.stage == number]
        for write in stage.writes:
            modules = [b for b in branches if _takes(write, b)]
            branches = [b for b in branches if b not in modules]
            lines.append(Line("│"))
            apart = not isinstance(write, OpaqueWrite)
            lines.append(Line(f"├── {_name(write, modules)}", len(errors) if apart else None))
            errors += [sublayers.pop(0)] if apart else []
            lines += [Line(f"│     {text}") for text in _facts(write, modules, known)]
        last = number == len(captured.stages) - 1
        name = "⊕ resid_post" if last else "⊕ resid_mid"
        carry = known.carries[number] if known.carries else ()
        name += "".join(f" → {step.module}" for step in carry if isinstance(step, Norm))
        lines += [Line("│"), Line(name, len(errors))]
        errors.append(whole)
    return lines, errors


def _takes(write: CapturedWrite, branch: Write) -> bool:
    """Experts and shared experts are captured as one MLP, so a write may come from several modules."""
    if isinstance(write, AttentionWrite):
        return branch.kind == "attention"
    if isinstance(write, MlpWrite):
        return branch.kind in ("mlp", "experts")
    return branch.kind == write.kind


def _name(write: CapturedWrite, modules: list[Write]) -> str:
    kind = "attention" if isinstance(write, AttentionWrite) else "mlp"
    if isinstance(write, OpaqueWrite):
        kind = f"{write.kind} (one part)"
    return f"{kind}: {' + '.join(_path(m) for m in modules)}"


def _path(write: Write) -> str:
    text = write.module or "?"
    if write.factor:
        text += " × a factor per token"
    if write.inner_scale != 1:
        text += f" × {write.inner_scale:g}"
    if write.post_norm:
        text += f" → {write.post_norm}"
    return text + (f" × {write.scale:g}" if write.scale != 1 else "")


def _facts(write: CapturedWrite, modules: list[Write], known: LayerStructure) -> Iterator[str]:
    if isinstance(write, OpaqueWrite):
        yield f"not taken apart: {write.reason}"
        return
    bias = "" if write.bias is None else ", and a bias"
    if isinstance(write, MlpWrite):
        experts = any(m.kind == "experts" for m in modules)
        yield f"{write.act.shape[1]} neurons{' of all experts' if experts else ''}{bias}"
        return
    a = write.attention
    own, width, seen = a.v.shape[0], a.q.shape[-1], known.attention_source == "product"
    text = f"{a.heads} heads of {a.v.shape[-1]}" + (f", {own} key/value heads" if own != a.heads else "")
    text += f", queries and keys of {width}" if width != a.v.shape[-1] and not seen else ""
    extras = {
        "a window": a.window, "softcap": a.softcap, "sinks": a.sinks, "a gate": a.gate,
        "position biases": None if seen else _floating(a.mask),
    }  # fmt: skip
    named = [name for name, value in extras.items() if value is not None]
    yield text + (", with " + " and ".join(named) if named else "") + bias
    if seen:
        yield "seen as its own product softmax(...) @ v"
    else:
        yield f"q, k and v from {known.attention_module or 'the layer itself'} ({known.attention_source})"


def _floating(mask: Tensor | None) -> Tensor | None:
    return mask if mask is not None and mask.is_floating_point() else None


def _ranges(numbers: list[int]) -> str:
    """0 to 3, 5, 7 to 9"""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)
