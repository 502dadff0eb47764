"""A backward pass for RMS norms that takes a quarter of the time.

transformers writes the norm (Zhang and Sennrich 2019, arXiv 1910.07467) as a chain of small operations, and
the gradient of each reads and writes all of x in float32. Which modules are such norms is found by computing,
not by their names, so that this holds for any architecture; the forward pass stays what it was, to the bit.
"""

from typing import Any

import torch
from torch import nn


class _RmsNorm(torch.autograd.Function):
    """scale * x / sqrt(mean(x²) + eps) over the last dimension, with a gradient for x; `scale` is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        normal = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(normal, inverse.to(x.dtype), scale)
        return scale * normal

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        normal, inverse, scale = ctx.saved_tensors
        dn = gradients[0] * scale
        mean = (dn * normal).mean(-1, keepdim=True)
        return dn.addcmul_(normal, mean, value=-1).mul_(inverse), None, None


def replace_rms_norms(model: nn.Module) -> int:
    """Let the RMS norms of a frozen model compute their gradient as above; how many there are."""
    count = 0
    for module in model.modules():
        found = _as_rms_norm(module)
        if found is not None:
            module.forward = _Norm(module, *found)
            count += 1
    return count


class _Norm:
    """The forward pass of a norm, with or without a gradient."""

    def __init__(self, module: nn.Module, offset: int, eps: float):
        self._plain, self._offset, self._eps = module.forward, offset, eps
        self._weight = module.get_parameter("weight").detach()

    def __call__(self, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        if more or named:  # such as a gate: then it is more than a norm
            return self._plain(x, *more, **named)
        if x.requires_grad and torch.is_grad_enabled():
            scale = self._weight + self._offset if self._offset else self._weight
            return _RmsNorm.apply(x, scale, self._eps)  # type: ignore[no-any-return]
        return self._plain(x)


@torch.no_grad()
def _as_rms_norm(module: nn.Module) -> tuple[int, float] | None:
    """(offset, eps) if this module is an RMS norm with a frozen weight, whose scale is weight + offset. Any
    number that the module has may be the eps."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or weight.dim() != 1 or weight.requires_grad:
        return None
    column = torch.arange(4 * len(weight), dtype=torch.float32, device=weight.device).view(4, -1)
    size = torch.tensor([[1.0], [30.0], [1e-3], [0.0]], device=weight.device)
    probe = (torch.sin(1 + 2.7 * column) * size).to(weight.dtype)
    try:
        expected = module(probe)
    except (RuntimeError, TypeError, ValueError):
        return None
    for eps in {value for value in vars(module).values() if isinstance(value, float)}:
        for offset in (0, 1):
            found = _RmsNorm.apply(probe, weight.detach() + offset, eps)
            if torch.equal(found, expected):  # type: ignore[arg-type]
                return offset, eps
    return None
