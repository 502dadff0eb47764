"""LoRA on the linear layers of a transformers model: many adapters, one of them, or one for each row.

`LoraLayers` replaces the forward pass of the target modules, which stay where they are. The low-rank product
is added in place to the frozen one, and its backward pass is written out, so that a layer with LoRA costs
little more than the layer alone. Files are in peft's format. LoRA: Hu et al. 2021, arXiv 2106.09685;
activated LoRA: Greenewald et al. 2025, arXiv 2504.12397. Adapters of several rows in one product: Chen et al.
2023 (Punica), arXiv 2310.18547.
"""

import contextlib
import math
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ml_assets.artifacts import read_json
from ml_assets.engine.linear import FrozenLinear, linear_shape

UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "exclude_modules",
    "lora_bias",
)
"""Options of peft whose mathematics is not that of this module; an adapter that uses one is refused."""


class IncompatibleAdapter(Exception):
    """An adapter was made for another base, or its files do not fit the model; the message says how."""


SMALL_PART = 32
"""Adapters with fewer tokens than this each are multiplied together, padded, rather than one by one."""

STACKS = 4
"""Sets of adapters that a layer keeps one above the other."""


@dataclass
class Adapter:
    """One adapter. `weights` has (A, B) by module name: A is (rank, in), B is (out, rank). `invocation` are
    the tokens from which an activated LoRA works; None for LoRA, which works on every token."""

    rank: int
    scaling: float
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    invocation: list[int] | None = None
    dropout: float = 0.0

    def active_from(self, prompt: Sequence[int]) -> int:
        """The token of `prompt` from which the adapter works: an activated LoRA from its last invocation on,
        and never (the length of the prompt) without one, or without weights."""
        if not self.weights:
            return len(prompt)
        if self.invocation is None:
            return 0
        n = len(self.invocation)
        for start in range(len(prompt) - n, -1, -1):
            if list(prompt[start : start + n]) == self.invocation:
                return start
        return len(prompt)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The weights under the names that peft gives them in a file, in model order."""
        return {
            f"base_model.model.{name}.lora_{letter}.weight": tensor
            for name, pair in self.weights.items()
            for letter, tensor in zip("AB", pair, strict=True)
        }


@dataclass(frozen=True)
class Groups:
    """Few tokens for each of several adapters, padded to a batch of products: `tokens` (adapters x width)
    says which, `slots` and `targets` where the outcome that is no padding lies and where it goes."""

    tokens: torch.Tensor
    slots: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Route:
    """Which adapters a forward pass uses: each on all tokens, or, one after the other as the tokens lie in
    memory, on those that `parts` or `groups` say."""

    names: tuple[str, ...] = ()
    parts: tuple[slice | torch.Tensor, ...] | None = None
    groups: Groups | None = None
    training: bool = False


NO_ROUTE = Route()


@dataclass
class LoraLayers:
    """The adapters on one model. Each thread has a route of its own; adapters come and go while no other
    thread computes."""

    model: nn.Module
    adapters: dict[str, Adapter] = field(default_factory=dict)
    _routes: threading.local = field(default_factory=threading.local)
    _layers: dict[str, "_Layer"] = field(default_factory=dict)
    _sets: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def route(self) -> Route:
        """The adapters that this thread's forward passes use."""
        return getattr(self._routes, "route", NO_ROUTE)

    def add(self, name: str, adapter: Adapter) -> None:
        if name in self.adapters:
            raise ValueError(f"an adapter named {name!r} is attached already")
        self.adapters[name] = adapter
        for target in adapter.weights:
            if target not in self._layers:
                self._layers[target] = _Layer(self, target, self.model.get_submodule(target))

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self._sets = [names for names in self._sets if name not in names]
        used = {target for adapter in self.adapters.values() for target in adapter.weights}
        for target in list(self._layers):
            self._layers[target].stacks.clear()
            if target not in used:
                self._layers.pop(target).restore()

    @contextlib.contextmanager
    def routed(self, route: Route) -> Iterator[None]:
        """Inside, the model runs with these adapters."""
        unknown = sorted(set(route.names) - self.adapters.keys())
        if unknown:
            raise KeyError(f"no adapter named {unknown[0]!r} is attached; attached: {sorted(self.adapters)}")
        before, self._routes.route = self.route, route
        try:
            yield
        finally:
            self._routes.route = before

    def for_rows(
        self,
        names: Sequence[str | None],
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
    ) -> Route:
        """Route for rows that lie one after the other, padding included, `lengths[i]` tokens each: row i runs
        with adapter `names[i]`, None for the bare base, from its token `starts[i]` on."""
        starts = starts or [0] * len(names)
        spans: dict[str, list[tuple[int, int]]] = {}
        at = 0
        for name, length, start in zip(names, lengths, starts, strict=True):
            if name is not None and start < length:
                own = spans.setdefault(name, [])
                if own and own[-1][1] == at + start:
                    own[-1] = own[-1][0], at + length
                else:
                    own.append((at + start, at + length))
            at += length
        if not spans:
            return Route()
        if len(spans) == 1 and next(iter(spans.values())) == [(0, at)]:
            return Route(tuple(spans))
        counts = [sum(end - start for start, end in own) for own in spans.values()]
        device = next(self.model.parameters()).device
        if len(spans) > 1 and max(counts) <= SMALL_PART:
            return self._grouped(spans, device)
        parts: list[slice | torch.Tensor] = []
        for own in spans.values():
            ranges = [torch.arange(start, end) for start, end in own]
            parts.append(slice(*own[0]) if len(own) == 1 else torch.cat(ranges).to(device))
        return Route(tuple(spans), tuple(parts))

    def _grouped(self, spans: dict[str, list[tuple[int, int]]], device: torch.device) -> Route:
        # in one order, and where a set in use has all of them with that: so that stacks are seldom made
        names = tuple(sorted(spans))
        for known in self._sets:
            if len(known) <= 2 * len(names) and spans.keys() <= set(known):
                names = known
                break
        self._sets = [names, *(known for known in self._sets if known != names)][:STACKS]
        members = [[t for start, end in spans.get(name, ()) for t in range(start, end)] for name in names]
        width = max(map(len, members))
        tokens, slots, targets = [], [], []
        for i, own in enumerate(members):
            slots += range(i * width, i * width + len(own))
            targets += own
            tokens += [*own, *[0] * (width - len(own))]
        return Route(names, None, Groups(*(torch.tensor(x, device=device) for x in (tokens, slots, targets))))


class _Layer:
    """One linear module with LoRA."""

    def __init__(self, layers: LoraLayers, name: str, module: nn.Module):
        self.layers, self.name, self.module = layers, name, module
        self.in_features, self.out_features, _ = linear_shape(module)
        self.stacks: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.plain = module.forward
        self.frozen = (
            self.plain if isinstance(self.plain, FrozenLinear) else FrozenLinear(module, packed=False)
        )
        module.forward = self.forward

    def restore(self) -> None:
        self.module.forward = self.plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        route = self.layers.route
        if not route.names:
            return self.plain(x)
        adapters = self.layers.adapters
        if route.training:
            return self._train(x, adapters[route.names[0]])
        y = self.plain(x)
        flat, out = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
        if route.groups is not None:
            self._add_grouped(flat, out, route.names, route.groups)
            return y
        for name, part in zip(route.names, route.parts or [slice(None)] * len(route.names), strict=True):
            adapter = adapters[name]
            pair = adapter.weights.get(self.name)
            if pair is None:
                continue
            a, b = pair[0].detach(), pair[1].detach()
            h = torch.nn.functional.linear(flat[part], a)
            if isinstance(part, slice):
                out[part].addmm_(h, b.T, alpha=adapter.scaling)
            else:
                out.index_add_(0, part, torch.nn.functional.linear(h, b), alpha=adapter.scaling)
        return y

    def _add_grouped(self, x: torch.Tensor, y: torch.Tensor, names: tuple[str, ...], groups: Groups) -> None:
        stack = self._stack(names)
        if stack is None:
            return
        a, b = stack
        parts = x.index_select(0, groups.tokens).view(len(names), -1, self.in_features)
        added = torch.bmm(torch.bmm(parts, a), b).view(-1, self.out_features)
        if len(groups.slots) < len(added):
            added = added.index_select(0, groups.slots)
        y.index_add_(0, groups.targets, added)

    def _stack(self, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (adapters, in, rank) and scaled B (adapters, rank, out), the highest rank for all."""
        if names not in self.stacks:
            adapters = [self.layers.adapters[name] for name in names]
            found = [adapter.weights.get(self.name) for adapter in adapters]
            some = next((pair[0] for pair in found if pair is not None), None)
            if some is None:
                return None
            if len(self.stacks) >= STACKS:
                self.stacks.pop(next(iter(self.stacks)))
            rank = max(adapter.rank for adapter in adapters)
            a = some.new_zeros(len(names), rank, self.in_features)
            b = some.new_zeros(len(names), rank, self.out_features)
            for i, (adapter, pair) in enumerate(zip(adapters, found, strict=True)):
                if pair is not None:
                    a[i, : adapter.rank] = pair[0].detach()
                    b[i, : adapter.rank] = pair[1].detach().T * adapter.scaling
            self.stacks[names] = a.transpose(1, 2), b
        return self.stacks[names]

    def _train(self, x: torch.Tensor, adapter: Adapter) -> torch.Tensor:
        pair = adapter.weights.get(self.name)
        if pair is None:
            return self.plain(x)
        if adapter.dropout:
            dropped = torch.nn.functional.dropout(x, adapter.dropout)
            h = torch.nn.functional.linear(dropped, pair[0]) * adapter.scaling
            return self.plain(x) + torch.nn.functional.linear(h, pair[1])
        # the view is made out here: some models add to a layer's output in place, which autograd refuses for
        # a view that a function of our own returns
        y = _TrainedLinear.apply(x.reshape(-1, x.shape[-1]), self.frozen, *pair, adapter.scaling)
        return y.view(*x.shape[:-1], -1)  # type: ignore[union-attr]


class _TrainedLinear(torch.autograd.Function):
    """x W' + bias + scaling x A' B' for x (tokens, in), with gradients for x, A and B; W and bias are
    frozen."""

    @staticmethod
    def forward(ctx: Any, x: Any, frozen: FrozenLinear, a: Any, b: Any, scaling: float) -> Any:
        h = x @ a.T
        y = frozen.product(x).addmm_(h, b.T, alpha=scaling)
        ctx.save_for_backward(x, a, b, h)
        ctx.frozen, ctx.scaling = frozen, scaling
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, a, b, h = ctx.saved_tensors
        dy = gradients[0]
        dh = (dy @ b).mul_(ctx.scaling)
        da = dh.T @ x
        db = (dy.T @ h).mul_(ctx.scaling)
        dx = ctx.frozen.gradient(dy).addmm_(dh, a) if ctx.needs_input_grad[0] else None
        return dx, None, da, db, None


def target_modules(model: nn.Module, targets: Iterable[str] | str) -> list[str]:
    """Names of the modules that these suffixes, or this regular expression, select by peft's rule, in model
    order."""
    if isinstance(targets, str):
        return [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    wanted = tuple(targets)
    dotted = tuple(f".{target}" for target in wanted)
    return [name for name, _ in model.named_modules() if name in wanted or name.endswith(dotted)]


def place(name: str) -> tuple[str, int]:
    """(role, layer) of a module: its name with `*` for the first number in it, and that number, or -1."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join([*parts[:i], "*", *parts[i + 1 :]]), int(part)
    return name, -1


def new_adapter(
    model: nn.Module, targets: Iterable[str], rank: int, alpha: float, dropout: float, dtype: torch.dtype
) -> Adapter:
    """A fresh adapter as peft initializes it (A from Kaiming's uniform distribution, B zero), drawn from
    torch's global generator. Raises IncompatibleAdapter when no module has one of the names."""
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    names = target_modules(model, targets)
    if not names:
        raise IncompatibleAdapter(f"the model has no module named {sorted(targets)}")
    for name in names:
        module = model.get_submodule(name)
        inner, outer, _ = linear_shape(module)
        a = torch.empty(rank, inner)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        device = module.weight.device
        weights[name] = (a.to(device, dtype), torch.zeros(outer, rank, device=device, dtype=dtype))  # type: ignore[call-overload]
    return Adapter(rank, alpha / rank, weights, dropout=dropout)


def read_adapter(model: nn.Module, directory: Path, dtype: torch.dtype, device: torch.device) -> Adapter:
    """Read `adapter_config.json` and `adapter_model.safetensors` (peft's format) for this model.

    Raises IncompatibleAdapter when the configuration asks for more than LoRA, or a weight is missing,
    unexpected, of another shape, or not a finite number.
    """
    from safetensors.torch import load_file

    config = read_json(directory / "adapter_config.json")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise IncompatibleAdapter(f"{directory}: expected peft_type LORA without bias, found another kind")
    for option in UNSUPPORTED:
        if config.get(option):
            raise IncompatibleAdapter(f"{directory}: {option} is set, which is not supported")
    rank = config["r"]
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in target_modules(model, config["target_modules"]):
        inner, outer, _ = linear_shape(model.get_submodule(name))
        weights[name] = (torch.empty(rank, inner), torch.empty(outer, rank))
    adapter = Adapter(rank, config["lora_alpha"] / divisor, weights, config.get("alora_invocation_tokens"))
    found, wanted = load_file(directory / "adapter_model.safetensors"), adapter.named_tensors()
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        raise IncompatibleAdapter(
            f"{directory}: weights do not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    for key, expected in wanted.items():
        tensor = found[key]
        if tensor.shape != expected.shape:
            raise IncompatibleAdapter(
                f"{directory}: {key} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise IncompatibleAdapter(f"{directory}: {key} holds values that are not finite numbers")
    for name in adapter.weights:
        a, b = (found[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        adapter.weights[name] = (a.to(device, dtype), b.to(device, dtype))
    return adapter


def adapter_config(
    model: nn.Module, adapter: Adapter, targets: Iterable[str], revision: str
) -> dict[str, Any]:
    """What peft's `LoraConfig.from_pretrained` reads. `revision` is noted as the base's name."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": revision,
        "r": adapter.rank,
        "lora_alpha": adapter.scaling * adapter.rank,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": all(linear_shape(model.get_submodule(name))[2] for name in adapter.weights),
        "inference_mode": True,
    }
    if adapter.invocation is not None:
        config["alora_invocation_tokens"] = list(adapter.invocation)
    return config
