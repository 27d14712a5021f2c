"""The model's own way from a final state to logits, found by watching it once.

    logits = softcap(logit_scale * (W_U @ through(final_norm(x)) + b))

`through` is whatever lies between, usually nothing, or a linear map (OPT's project_out); where it is not
linear (BERT's transform), logits are the model's own but cannot be attributed. The modules are found by
following the last layer's output through one forward with the layers passed through; what was found is
verified on that very run, so a model that does anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmtt.checkpoint.placed import run_device
from lmtt.errors import StructureError
from lmtt.structure.modules import LinearisedNorm, is_linear, linearise_norm

PROBE_TOKENS = 3
AGREEMENT = 1e-5  # of the largest logit: what the head rebuilt from its pieces may differ by (16-bit: 1e-2)


@dataclass(frozen=True)
class Head:
    """Final norm, linear maps and unembedding of a model; `V` vocabulary, `D` d_model.

    Rows are independent of each other, so any states may be passed together.
    """

    norm: nn.Module | None
    through: tuple[nn.Module, ...]
    unembed: nn.Module
    logit_scale: float
    softcap: float | None

    @property
    def weight(self) -> Tensor:
        """[V, D'] rows of the unembedding."""
        weight: Tensor = self.unembed.weight  # type: ignore[assignment] # find_head has checked it
        return weight

    @property
    def rows(self) -> Any:
        """`weight`, or what has its rows where they are not in memory: indexed alike."""
        return getattr(self.unembed, "rows", self.weight)

    @property
    def bias(self) -> Tensor | None:
        """[V] or None."""
        bias = getattr(self.unembed, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @torch.no_grad()
    def normed(self, states: Tensor) -> Tensor:
        """[N, D] final states -> [N, D'], what the unembedding multiplies."""
        x = states[None]
        for module in (self.norm, *self.through):
            if module is not None:
                x = module(x)
        return x[0]

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """[N, D] final states -> [N, V] float32 (float64 for float64), as the model itself computes them."""
        return _finish(self.unembed(self.normed(states)[None])[0], self.logit_scale, self.softcap)

    @torch.no_grad()
    def logits_before_softcap(self, states: Tensor) -> Tensor:
        """[N, D] final states -> [N, V] as `logits`, without the softcap."""
        return _finish(self.unembed(self.normed(states)[None])[0], self.logit_scale, None)

    def check_linear(self) -> None:
        """Raise StructureError if what lies between norm and unembedding is not linear."""
        for module in self.through:
            if not is_linear(module) and not isinstance(module, (nn.Identity, nn.Dropout)):
                raise StructureError(
                    f"logits cannot be attributed: {type(module).__name__} lies before the unembedding",
                    expected="linear maps between the final norm and the unembedding",
                )

    def frozen(self, state: Tensor) -> FrozenHead:
        """The head with its norm held at the statistics of one final state [D]: a linear map.

        Raises StructureError if what lies between norm and unembedding is not linear.
        """
        self.check_linear()
        if self.norm is None:
            return FrozenHead(self, None, state.new_ones(()))
        x = state[None]
        with torch.no_grad():
            y = self.norm(x[None])[0]
        x = x.to(y.device)
        norm = linearise_norm(self.norm, x, y, "the final norm")
        return FrozenHead(self, norm, norm.row[0])


@dataclass(frozen=True)
class FrozenHead:
    """Logits (before any softcap) as a linear function of the final state, at one state's norm statistics."""

    head: Head
    norm: LinearisedNorm | None
    row: Tensor  # [], 1 / rms of the state

    @torch.no_grad()
    def scores(self, updates: Tensor) -> Tensor:
        """[N, D] updates of the stream -> [N, V], what each adds to every logit."""
        x = updates if self.norm is None else self.norm.fold(updates.to(self.norm.gain.device)) * self.row
        return self.head.logit_scale * raw_scores(self.head, x)

    @torch.no_grad()
    def directions(self, tokens: Tensor, width: int) -> Directions:
        """The logits of `tokens` (int64 [n]) as inner products with a final state of `width` = D entries."""
        head = self.head
        wide = torch.float64
        w = head.rows[tokens].to(wide)  # [n, D']
        constant = w.new_zeros(len(tokens))
        if head.bias is not None:
            constant += head.bias[tokens].to(wide)
        if head.through:
            # The linear maps are asked for their matrix [D, D'], whatever form their weights are stored in.
            identity = torch.eye(width, dtype=head.rows.dtype, device=head.rows.device)
            zero = _through(head, identity.new_zeros(1, width))
            constant += w @ zero[0].to(wide)
            w = w @ (_through(head, identity) - zero).to(wide).T
        shift = torch.zeros_like(constant)
        if self.norm is not None:
            if self.norm.shift is not None:
                shift = w @ self.norm.shift.to(w.device, wide)
            w = w * self.norm.gain.to(w.device, wide)
            if self.norm.centred:
                # <fold(x), w> with fold's centring moved over to the other side, where it is done once.
                w = w - w.mean(-1, keepdim=True)
        scale = head.logit_scale
        return Directions(scale * w, scale * shift, scale * constant)


@dataclass(frozen=True)
class Directions:
    """logit[t] before the softcap = row * <x, r[t]> + final_norm[t] + head[t], at a frozen norm's `row`.

    r = logit_scale * gain * w for an RMSNorm, less its mean for a LayerNorm; w is the token's row of the
    unembedding seen through the linear maps before it. All float64.
    """

    r: Tensor  # [n, D]
    final_norm: Tensor  # [n], what the norm's shift adds
    head: Tensor  # [n], what the biases after the norm add


@torch.no_grad()
def raw_scores(head: Head, updates: Tensor) -> Tensor:
    """[N, D] -> [N, V]: the linear maps and the unembedding, without norm, biases, scale and softcap.

    Raises StructureError if they are not linear.
    """
    head.check_linear()
    x = updates
    for module in head.through:
        x = module(x[None])[0] - module(torch.zeros_like(x)[None])[0]
    if head.rows is not head.weight:
        scores: Tensor = head.unembed.product(x)  # type: ignore[operator] # a TiledUnembedding
        return scores
    plain: Tensor = x.to(head.weight.device) @ head.weight.to(x.dtype).T
    return plain


def _through(head: Head, x: Tensor) -> Tensor:
    """[N, D] -> [N, D'], by the linear maps between norm and unembedding, with their biases."""
    for module in head.through:
        x = module(x[None])[0]
    return x


def find_head(model: Any, replay: Callable[[Tensor, Tensor], Tensor]) -> Head:
    """Find a model's head. `replay(input_ids [1, N], states [1, N, D])` gives the model's logits [1, N, V]
    for states put in the place of the last layer's output.

    Raises
    ------
    StructureError
        No output embedding, or the pieces found do not give the model's own logits.
    """
    unembed = model.get_output_embeddings()
    if unembed is None or not isinstance(getattr(unembed, "weight", None), Tensor):
        raise StructureError(
            f"{type(model).__name__} has no output embedding", expected="a causal language model"
        )
    # One whose rows are on disk shows the same in a sample of them.
    with getattr(unembed, "sampled", nullcontext)():
        return _find_head(model, unembed, replay)


def _find_head(model: Any, unembed: nn.Module, replay: Callable[[Tensor, Tensor], Tensor]) -> Head:
    embedding = model.get_input_embeddings()
    device = run_device(embedding)
    generator = torch.Generator().manual_seed(0)
    width = _width(model)
    states = torch.randn(1, PROBE_TOKENS, width, generator=generator).to(device, embedding.weight.dtype)
    ids = torch.arange(PROBE_TOKENS, device=device)[None]

    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            seen.append((module, args[0], output))

    leaves = [m for m in model.modules() if not list(m.children()) or m is unembed]
    hooks = [m.register_forward_hook(note) for m in leaves]
    try:
        with torch.no_grad():
            logits = replay(ids, states)
    finally:
        for hook in hooks:
            hook.remove()

    found = _chain(seen, states, unembed)
    if found is None:
        raise StructureError(
            f"{type(model).__name__}: no way was found from the last layer's output to the output embedding"
        )
    chain, inner = found
    norm = chain[0] if chain and not is_linear(chain[0]) else None
    through = tuple(chain if norm is None else chain[1:])
    raw = next(output for module, _, output in reversed(seen) if module is unembed)
    caps = _softcaps(model.config.get_text_config())
    for cap in caps:
        scale, softcap = _after(raw[0], logits[0], cap)
        head = Head(norm, through, unembed, scale * inner, softcap)
        try:
            _verify(head, states[0], logits[0], type(model).__name__)
        except StructureError:
            if cap is caps[-1]:
                raise
        else:
            break
    return head


def _softcaps(config: Any) -> list[float | None]:
    """What the logits may be capped at, by the names that configurations use; None last: small logits
    agree with it nearly."""
    known = config.to_dict()
    named = [k for k in known if "logit" in k and "cap" in k and not k.startswith(("attn", "attention"))]
    caps = [float(known[k]) for k in named if isinstance(known[k], (int, float)) and known[k]]
    return [*caps, None]


def _width(model: Any) -> int:
    config = model.config.get_text_config()
    return int(config.hidden_size)


def _chain(
    seen: list[tuple[nn.Module, Tensor, Tensor]], states: Tensor, unembed: nn.Module
) -> tuple[list[nn.Module], float] | None:
    """The modules by which `states` became the unembedding's input, in order, and the number that what they
    return is multiplied by on the way; walked backwards."""
    place = next((n for n in range(len(seen) - 1, -1, -1) if seen[n][0] is unembed), None)
    if place is None:
        return None
    wanted, scale = seen[place][1], 1.0
    chain: list[nn.Module] = []
    while not _same(wanted, states):
        before = range(place - 1, -1, -1)
        place = next((n for n in before if _same(seen[n][2], wanted)), None)
        if place is None and not chain:  # a factor between the final norm and the unembedding
            place = next((n for n in before if _ratio(seen[n][2], wanted) is not None), None)
            scale = 1.0 if place is None else _ratio(seen[place][2], wanted) or 1.0
        if place is None:
            return None
        chain.append(seen[place][0])
        wanted = seen[place][1]
    return chain[::-1], scale


def _ratio(a: Tensor, b: Tensor) -> float | None:
    """The number by which a, times it, is b; None if there is none."""
    if a.shape[-1] != b.shape[-1] or a.numel() != b.numel():
        return None
    x, y = a.flatten().double(), b.to(a.device).flatten().double()
    energy = float(x.square().sum())
    ratio = float((x * y).sum()) / energy if energy > 0 else 0.0
    rounding = 4 * torch.finfo(b.dtype).eps * float(y.abs().max())
    return ratio if ratio != 0 and float((y - ratio * x).abs().max()) <= rounding else None


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape[-1] != b.shape[-1] or a.numel() != b.numel():
        return False
    return torch.equal(a.flatten(), b.to(a.device).flatten())


def _after(raw: Tensor, logits: Tensor, cap: float | None) -> tuple[float, float | None]:
    """(logit scale, softcap) between the unembedding's output and the logits."""
    raw, logits = raw.double(), logits.to(raw.device).double()
    inner = logits if cap is None else cap * torch.atanh((logits / cap).clamp(-1 + 1e-9, 1 - 1e-9))
    scale = float((raw * inner).sum() / raw.square().sum())
    # A scale of one is a scale of one: rounding must not leave its mark on every logit.
    return (1.0 if abs(scale - 1) < 1e-4 else scale), cap


def _finish(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = raw.to(torch.float64 if raw.dtype == torch.float64 else torch.float32)
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _verify(head: Head, states: Tensor, logits: Tensor, name: str) -> None:
    got = head.logits(states.flip(0)).flip(0)  # out of order: a head that looks at positions is found out
    want = logits.to(got)
    bound = (AGREEMENT if logits.dtype.itemsize >= 4 else 1e-2) * float(want.abs().max())
    error = float((got - want).abs().max())
    if not error <= bound:
        raise StructureError(
            f"{name}: its logits are not softcap(scale * unembedding(final_norm(x)))",
            expected=f"agreement to {bound:.1e}",
            got=f"{error:.1e}",
        )
