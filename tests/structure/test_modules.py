"""Linear maps and norms, known only by calling them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmtt.errors import StructureError
from lmtt.structure.modules import is_linear, linear_bias, linear_weight, linearise_norm


class _OnePlusWeight(nn.Module):
    def __init__(self, width: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width, dtype=torch.float64) - 0.5)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def _norms(width: int) -> dict[str, nn.Module]:
    layer_norm = nn.LayerNorm(width, dtype=torch.float64)
    rms_norm = nn.RMSNorm(width, eps=1e-2, dtype=torch.float64)
    for parameter in (*layer_norm.parameters(), *rms_norm.parameters()):
        nn.init.normal_(parameter)
    return {"LayerNorm": layer_norm, "RMSNorm": rms_norm, "1 + weight": _OnePlusWeight(width)}


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "1 + weight"])
@pytest.mark.parametrize("width", [8, 9])
def test_norms_are_linear_at_a_runs_statistics(name: str, width: int) -> None:
    torch.manual_seed(0)
    norm = _norms(width)[name]
    parts = torch.randn(3, 5, width, dtype=torch.float64)
    x = parts.sum(0)
    with torch.no_grad():
        y = norm(x)
    held = linearise_norm(norm, x, y, "norm")
    total = (held.row[:, None] * held.fold(parts)).sum(0)
    total = total if held.shift is None else total + held.shift
    assert held.centred == (name == "LayerNorm")
    assert float((total - y).abs().max()) <= 1e-8


def test_a_zero_row_is_carried() -> None:
    norm = nn.RMSNorm(8, eps=1e-5)
    x = torch.randn(4, 8)
    x[1] = 0
    held = linearise_norm(norm, x, norm(x).detach(), "norm")
    assert torch.isfinite(held.row).all()


def test_what_is_not_a_norm_is_refused() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(StructureError, match=r"mlp\.act is not a norm"):
        linearise_norm(nn.Tanh(), x, x.tanh(), "mlp.act")


class _Packed(nn.Linear):
    """Stands for a quantised linear map: its weight is stored as integers of another shape."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(*matrix.shape)
        self.matrix = matrix
        self.weight = nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)
        nn.init.normal_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.matrix + self.bias


class _Adapted(nn.Module):
    """Stands for an adapter of low rank around a linear map."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.in_features = base, 6
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x) + 0.5 * self.up(self.down(x))
        return result


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "packed", "adapted"])
def test_matrix_of_a_linear_map(kind: str) -> None:
    torch.manual_seed(0)
    module = {
        "Linear": nn.Linear(6, 4),
        "Conv1D": Conv1D(4, 6),
        "packed": _Packed(torch.randn(6, 4)),
        "adapted": _Adapted(nn.Linear(6, 4)),
    }[kind]
    x = torch.randn(5, 6)
    assert is_linear(module)
    weight = linear_weight(module, torch.float32, x.device, 6)
    bias = linear_bias(module)
    assert weight.shape == (6, 4)
    assert bias is not None
    assert torch.allclose(x @ weight + bias, module(x), atol=1e-6)
