"""Linear layers whose weights are frozen, and lie in memory as the processor multiplies them.

oneDNN, which multiplies on CPUs, rearranges a weight for its kernels in every call. For the few rows of a
decoding step that takes as long as the product itself. Here each weight is rearranged once, with what torch's
own compiler uses for frozen weights; the sums stay the same, in bfloat16 to the bit.
"""

import threading
from typing import Any

import torch
from torch import nn

PACKED_BYTES = 4 * 2**30
"""Models with more weights than this are not held a second time (a third time in training)."""


def linear_shape(module: nn.Module) -> tuple[int, int, bool]:
    """(in, out, transposed) of a linear module: torch's, or GPT-2's Conv1D, which keeps (in, out) weights.
    Raises TypeError for another kind of module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        inner, outer = module.weight.shape
        return inner, outer, True
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    raise TypeError(f"LoRA needs a linear layer, found {type(module).__name__}")


class FrozenLinear:
    """What a linear module with a frozen weight computes, and the gradient for its input. As the module's
    `forward` it is the module. Any thread may compute with it. A weight that somebody changes all the same is
    rearranged again."""

    def __init__(self, module: nn.Module, packed: bool):
        weight = _weight(module).detach()
        self._weight = weight.T if linear_shape(module)[2] else weight
        self._bias: torch.Tensor | None = module.bias.detach() if module.bias is not None else None  # type: ignore[operator,assignment]
        self._packs = packed
        self._lock = threading.Lock()
        self._version = -1
        self._packed: torch.Tensor | None = None
        self._transposed: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return _WithGradient.apply(x, self)  # type: ignore[return-value]
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) to (..., out), without a gradient."""
        if not self._packs:
            return torch.nn.functional.linear(x, self._weight, self._bias)
        return _multiply(x, self._arranged(transposed=False), self._bias)

    def gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """Gradient of the input, (..., in), from that of the output, (..., out)."""
        if not self._packs:
            return dy @ self._weight
        return _multiply(dy, self._arranged(transposed=True), None)

    def _arranged(self, transposed: bool) -> torch.Tensor:
        with self._lock:
            if self._version != self._weight._version:
                self._packed, self._transposed, self._version = None, None, self._weight._version
            if transposed:
                if self._transposed is None:
                    self._transposed = _pack(self._weight.T)
                return self._transposed
            if self._packed is None:
                self._packed = _pack(self._weight)
            return self._packed


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: FrozenLinear) -> torch.Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.linear.gradient(gradients[0]), None


def pack_linear_layers(model: nn.Module) -> int:
    """Rearrange the weights of a frozen model's linear layers; how many they are. 0 where this device or
    build of torch has no such products, or the model is too large to be held twice."""
    found = [module for module in model.modules() if _can_pack(module)]
    if sum(weight.numel() * weight.element_size() for weight in map(_weight, found)) > PACKED_BYTES:
        return 0
    for module in found:
        module.forward = FrozenLinear(module, packed=True)
    return len(found)


def _weight(module: nn.Module) -> torch.Tensor:
    return module.get_parameter("weight")


def _can_pack(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # a subclass with a forward pass of its own computes something else
    if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
        return False
    weight = _weight(module)
    usable = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return usable and not weight.requires_grad and _available(weight.dtype)


_known: dict[torch.dtype, bool] = {}


def _available(dtype: torch.dtype) -> bool:
    if dtype not in _known:
        weight = torch.linspace(-1, 1, 48 * 32).view(48, 32).to(dtype)
        x = torch.linspace(1, -1, 5 * 32).view(5, 32).to(dtype)
        try:
            found = _multiply(x, _pack(weight), None).float()
            expected = torch.nn.functional.linear(x, weight).float()
            _known[dtype] = torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
        except (AttributeError, NotImplementedError, RuntimeError):
            _known[dtype] = False
    return _known[dtype]


@torch.no_grad()
def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def _multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
