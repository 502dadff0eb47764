"""Norms that are recognised by what they compute give the same values, and the gradient of the plain ones."""

from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from torch import nn

from ml_assets.engine.norms import replace_rms_norms


class Named(nn.Module):
    """Looks like an RMS norm, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 16), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + self.eps)


def load(directory: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    for module in model.modules():  # fresh weights are all alike: a norm that forgets its own would pass
        if "norm" in type(module).__name__.lower():
            for parameter in module.parameters(recurse=False):
                parameter.data.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


def outcome(model: nn.Module, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = embeddings.clone().requires_grad_(True)
    logits = model(inputs_embeds=x).logits
    logits.float().pow(2).mean().backward()
    assert x.grad is not None
    return logits.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_computes_what_it_did(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load(tiny_model(architecture, tmp_path), dtype)
    embeddings = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits, gradient = outcome(model, embeddings)
    count = replace_rms_norms(model)
    uses = any("RMSNorm" in type(module).__name__ for module in model.modules())
    assert (count > 0) == uses or (architecture, dtype) == ("gemma", torch.bfloat16)
    again, other = outcome(model, embeddings)
    assert torch.equal(logits, again)
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    assert float((gradient - other).float().norm()) <= limit * float(gradient.float().norm())


def test_a_norm_that_is_given_a_gate_is_more_than_a_norm() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.5, 2, 16), requires_grad=False)
            self.eps = 1e-6

        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
            return y if gate is None else y * gate

    module, x = Gated(), torch.randn(3, 16, requires_grad=True)
    gate = torch.full((3, 16), 2.0)
    plain = module(x).detach()
    assert replace_rms_norms(module) == 1
    torch.testing.assert_close(module(x), plain)
    torch.testing.assert_close(module(x, gate), 2 * plain)
    torch.testing.assert_close(module(x, gate=gate), 2 * plain)


def test_what_is_no_rms_norm_or_is_trained_stays() -> None:
    named, trained, layer = Named(), nn.RMSNorm(16, eps=1e-6), nn.LayerNorm(16).requires_grad_(False)
    assert replace_rms_norms(nn.ModuleList([named, trained, layer])) == 0
