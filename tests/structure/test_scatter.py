"""Experts that a layer's own code runs one by one are neurons too, however their matrices are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmtt.errors import StructureError
from lmtt.structure.capture import capture_layer
from lmtt.structure.discover import discover_layer
from lmtt.structure.spec import CapturedLayer, MlpWrite
from lmtt.structure.verify import check_closure

T, D, F, E, K = 7, 8, 6, 5, 2


class _Experts(nn.Module):
    """K of E experts for each token, one after the other; subclasses say where the matrices are."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.up = nn.Linear(D, F)

    def down(self, expert: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, D)
        weights, index = self.router(x).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        for expert in range(E):
            token, slot = torch.where(index == expert)
            rows = self.down(expert, torch.tanh(self.up(x[token])))
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out.reshape(1, -1, D)


class _Packed(_Experts):
    """[E, D, F], as F.linear takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D, F))

    def down(self, expert: int, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight[expert])

    def matrix(self) -> Tensor:
        return self.weight.transpose(1, 2).reshape(E * F, D)


class _Flat(_Experts):
    """[E * F, D], cut into experts by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E * F, D))

    def down(self, expert: int, x: Tensor) -> Tensor:
        return x.matmul(self.weight.view(E, F, D)[expert])

    def matrix(self) -> Tensor:
        return self.weight


class _List(_Experts):
    """A module for each, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(F, D) for _ in range(E))

    def down(self, expert: int, x: Tensor) -> Tensor:
        result: Tensor = self.each[expert](x)
        return result

    def matrix(self) -> Tensor:
        return torch.cat([one.weight.T for one in self.each])  # type: ignore[union-attr,operator,misc]


class _Passing(_Flat):
    """The last expert is none: it returns the token as it is."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        return super().forward(x) + torch.zeros_like(rows).index_add_(0, torch.arange(T), rows)[None]

    def down(self, expert: int, x: Tensor) -> Tensor:
        return super().down(expert, x) if expert else x[:, :1].expand(-1, D) * 2


class _Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = hidden + self.experts(hidden)
        return result


def captured(experts: nn.Module) -> tuple[Any, CapturedLayer, Tensor]:
    torch.manual_seed(0)
    layer, hidden = _Layer(experts), torch.randn(1, T, D)
    structure = discover_layer(layer, hidden)
    with torch.no_grad():
        own = layer(hidden)
    out, seen = capture_layer(layer, structure, 0, hidden)
    assert torch.equal(out, own)
    return layer, seen, hidden


@pytest.mark.parametrize("kind", [_Packed, _Flat, _List])
def test_neurons_are_those_of_all_experts_in_order(kind: type[Any]) -> None:
    torch.manual_seed(1)
    layer, seen, hidden = captured(kind())
    (write,) = seen.stages[0].writes
    assert isinstance(write, MlpWrite)
    assert torch.equal(write.w_down, layer.experts.matrix())
    with torch.no_grad():
        weights, index = layer.experts.router(hidden[0]).softmax(-1).topk(K)
        gates = torch.zeros(T, E).scatter(1, index, weights)
        neurons = torch.tanh(layer.experts.up(hidden[0]))
    assert torch.allclose(write.act, (gates[:, :, None] * neurons[:, None]).flatten(1), atol=1e-6)
    assert (write.bias is not None) == (kind is _List)
    assert all(closure.error <= 1e-6 for closure in check_closure(seen, full=True))


def test_an_expert_that_is_no_linear_map_is_refused_by_name() -> None:
    with pytest.raises(
        StructureError, match="experts cannot be taken apart: an expert that is not a linear map"
    ):
        captured(_Passing())


def test_experts_that_were_left_out_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert's rows are not collected: the sum is formed again and does not fit."""
    from lmtt.structure.scatter import WatchScatter

    own = WatchScatter._collect

    def forgetful(self: WatchScatter, *given: Any) -> None:
        own(self, *given)
        if len(self.collected) == 2:
            self.collected.pop()

    monkeypatch.setattr(WatchScatter, "_collect", forgetful)
    with pytest.raises(StructureError, match="do not add up"):
        captured(_Flat())


def test_hooks_are_gone_afterwards() -> None:
    layer, _, _ = captured(_Flat())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
