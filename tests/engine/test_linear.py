"""Weights that were rearranged multiply as before, forwards and backwards, in both kinds of linear layers."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ml_assets.engine import linear
from ml_assets.engine.linear import FrozenLinear, pack_linear_layers

KINDS = {
    "with bias": lambda: nn.Linear(48, 80),
    "without": lambda: nn.Linear(48, 80, bias=False),
    "Conv1D": lambda: Conv1D(80, 48),
}


def frozen(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    module = KINDS[kind]().to(dtype).requires_grad_(False)
    if module.bias is not None:
        module.bias.data.normal_()
    return module


def outcome(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    given = x.clone().requires_grad_(True)
    y = module(given)
    (y.float() * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    assert given.grad is not None
    return y.detach(), given.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_plain(kind: str, dtype: torch.dtype) -> None:
    module = frozen(kind, dtype)
    if dtype == torch.bfloat16 and not linear._available(dtype):
        assert pack_linear_layers(module) == 0  # as in the test of missing products below
        pytest.skip("oneDNN has no bfloat16 products for this processor (it has no AVX-512)")
    inputs = {rows: torch.randn(1, rows, 48).to(dtype) for rows in (1, 7, 300)}
    plain = {rows: outcome(module, x) for rows, x in inputs.items()}
    assert pack_linear_layers(module) == 1 and isinstance(module.forward, FrozenLinear)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for rows, x in inputs.items():
        for found, expected in zip(outcome(module, x), plain[rows], strict=True):
            torch.testing.assert_close(found, expected, **close)
        with torch.inference_mode():
            torch.testing.assert_close(module(x), plain[rows][0], **close)


def test_a_weight_that_is_changed_is_rearranged() -> None:
    module = frozen("without", torch.float32)
    assert pack_linear_layers(module) == 1
    x = torch.randn(3, 48)
    before, gradient = outcome(module, x)
    module.weight.mul_(2)  # type: ignore[operator,union-attr]
    after, other = outcome(module, x)
    torch.testing.assert_close(after, 2 * before)
    torch.testing.assert_close(other, 2 * gradient)


def test_what_is_trained_or_too_large_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8).requires_grad_(False))
    assert pack_linear_layers(model) == 1
    assert not isinstance(model[0].forward, FrozenLinear) and isinstance(model[2].forward, FrozenLinear)
    monkeypatch.setattr(linear, "PACKED_BYTES", 100)
    assert pack_linear_layers(nn.Linear(8, 8).requires_grad_(False)) == 0


def test_a_subclass_with_a_forward_pass_of_its_own_stays() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    assert pack_linear_layers(Doubled(8, 8).requires_grad_(False)) == 0


def test_without_such_products_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(linear, "_multiply", missing)
    monkeypatch.setattr(linear, "_known", {})
    assert pack_linear_layers(nn.Linear(8, 8).requires_grad_(False)) == 0
