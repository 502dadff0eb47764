"""An adapter of one base as a start on another: copied, or mapped where the shapes are others.

Same shapes: the weights as they are (PortLLM: Khan et al. 2024, arXiv 2410.10870), or scaled module by module
with the part of the old weight that is left in the new one. Other numbers of layers: each layer takes the
adapter of the old layer that it resembles. Other sizes: the input and the output of each module are mapped
by ridge regression between what both bases compute for the same tokens, so that the new module changes its
output as the old one did (subspace maps and layers matched by centered kernel alignment: LoRASuite, Li et al.
2025, arXiv 2505.13515; alignment: Kornblith et al. 2019, arXiv 1905.00414).

A start can be worse than none: `ml_assets.adapters.ladder` measures each before it is used.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ml_assets.engine.linear import linear_shape
from ml_assets.engine.loading import Base
from ml_assets.engine.lora import Adapter, new_adapter, place, target_modules
from ml_assets.engine.packing import body

Tensor = torch.Tensor
TOKENS = 512
"""Positions at which the two bases are compared."""
GRAM_TOKENS = 256
"""Of these, those from which layers are matched."""
RIDGE = 0.01
"""Of the mean square of what is regressed on."""


class NoStart(ValueError):
    """The old adapter can't be a start on this base; the message says why."""


@dataclass
class OldModules:
    """What is kept of the base that an adapter comes from, by module: its weight (out, in), and where the two
    bases read the same tokens, how it computes them: the Gram matrix of its inputs, its inputs through A and
    its outputs through B (tokens, rank each), the latter also solved for the regression, and what of B the
    outputs do not span (out, rank)."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    through_a: dict[str, Tensor] = field(default_factory=dict)
    through_b: dict[str, Tensor] = field(default_factory=dict)
    solved_b: dict[str, Tensor] = field(default_factory=dict)
    rest_b: dict[str, Tensor] = field(default_factory=dict)


def read_old(base: Base, adapter: Adapter, texts: Sequence[Sequence[int]]) -> OldModules:
    """What `starts` needs to know of the base that `adapter` sits on. `texts` are token ids that the new base
    will read as well; none where its tokenizer is another one."""
    old = OldModules({name: _weight(base.model.get_submodule(name)).cpu() for name in adapter.weights})
    if texts:

        def keep(name: str, x: Tensor, y: Tensor) -> None:
            a, b = (part.float() for part in adapter.weights[name])
            old.grams[name] = _gram(x)
            old.through_a[name] = x @ a.T
            old.through_b[name] = y @ b
            old.solved_b[name] = _solve(y, y @ b)
            old.rest_b[name] = b - y.T @ old.solved_b[name]

        _watch(base, list(adapter.weights), texts, keep)
    return old


def fits(base: Base, targets: Sequence[str], old: Base, adapter: Adapter) -> bool:
    """Whether all that `adapter` adapts in `old` has the same shapes in `base`, whatever the number of
    layers: then its weights are copied, and `read_old` needs no texts."""
    shapes = {name: _shape(base.model.get_submodule(name)) for name in target_modules(base.model, targets)}
    before = {name: _shape(old.model.get_submodule(name)) for name in adapter.weights}
    return shapes == before or _same_roles(_by_role(shapes), _by_role(before))


def starts(
    base: Base,
    targets: Sequence[str],
    adapter: Adapter,
    old: OldModules,
    texts: Sequence[Sequence[int]],
    seed: int = 0,
) -> dict[str, Adapter]:
    """Adapters for `base`, by the way in which they came from `adapter`: `copy` and `rescaled copy` where
    modules and shapes are the same, `layer copy` and `rescaled layer copy` where only the number of layers
    differs, else `mapped`. `targets` are the suffixes of the modules to adapt.

    Raises NoStart that says what does not fit.
    """
    names = target_modules(base.model, targets)
    torch.manual_seed(seed)
    fresh = new_adapter(base.model, targets, adapter.rank, adapter.scaling * adapter.rank, 0.0, torch.float32)
    if adapter.invocation is not None:
        fresh.invocation = base.chat.invocation_ids()
    modules = {name: base.model.get_submodule(name) for name in names}
    shapes = {name: _shape(module) for name, module in modules.items()}
    old_shapes = {name: tuple(weight.shape) for name, weight in old.weights.items()}
    if shapes == old_shapes:
        return _copied(fresh, adapter, old, modules, {name: name for name in names}, "")
    roles, old_roles = _by_role(shapes), _by_role(old_shapes)
    common = sorted(roles.keys() & old_roles.keys())
    if not common:
        raise NoStart(
            f"no module here is named like one there: {', '.join(sorted(roles))} against "
            f"{', '.join(sorted(old_roles))}"
        )
    if _same_roles(roles, old_roles):

        def alike(new: str, before: str) -> float:
            weight, other = _weight(modules[new]).float(), old.weights[before].float()
            return float((weight * other).sum() / (weight.norm() * other.norm()).clamp(min=1e-9))

        match = _matched(roles, old_roles, common, alike)
        return _copied(fresh, adapter, old, modules, match, "layer ")
    if not texts:
        raise NoStart("other shapes, and another tokenizer: there are no tokens that both bases read")
    return {"mapped": _mapped(base, fresh, adapter, old, texts, roles, old_roles, common)}


def _copied(
    fresh: Adapter,
    adapter: Adapter,
    old: OldModules,
    modules: dict[str, torch.nn.Module],
    match: dict[str, str],
    prefix: str,
) -> dict[str, Adapter]:
    plain, scaled = dict(fresh.weights), dict(fresh.weights)
    for name, before in match.items():
        a, b = (part.float() for part in adapter.weights[before])
        weight, other = _weight(modules[name]).float(), old.weights[before].float().to(a.device)
        left = float((weight.to(a.device) * other).sum() / (other * other).sum().clamp(min=1e-9))
        plain[name], scaled[name] = (a, b), (a, b * left)
    return {
        f"{prefix}copy": _with(fresh, plain),
        f"rescaled {prefix}copy": _with(fresh, scaled),
    }


def _mapped(
    base: Base,
    fresh: Adapter,
    adapter: Adapter,
    old: OldModules,
    texts: Sequence[Sequence[int]],
    roles: dict[str, dict[int, tuple[str, Any]]],
    old_roles: dict[str, dict[int, tuple[str, Any]]],
    common: Sequence[str],
) -> Adapter:
    grams: dict[str, Tensor] = {}
    names = [name for role in common for name, _ in roles[role].values()]
    _watch(base, names, texts, lambda name, x, _: grams.__setitem__(name, _gram(x)))
    # texts need not pass through every module of either base
    roles, old_roles = _among(roles, grams), _among(old_roles, old.grams)
    common = [role for role in common if role in roles and role in old_roles]
    if not common:
        raise NoStart("the texts pass through no modules that both bases have")

    def alike(new: str, before: str) -> float:
        k, m = grams[new], old.grams[before].to(grams[new].device)
        return float((k * m).sum() / (k.norm() * m.norm()).clamp(min=1e-9))

    match = _matched(roles, old_roles, common, alike)
    weights = dict(fresh.weights)

    def map_module(name: str, x: Tensor, y: Tensor) -> None:
        before = match[name]
        old_a, old_b = (part.float() for part in adapter.weights[before])
        through_a, through_b = (known[before].to(x.device) for known in (old.through_a, old.through_b))
        # Where the sizes are the same and the tokens say that the coordinates are, too, what the regression
        # knows nothing about stays as it was.
        if old_a.shape[1] == x.shape[1] and _nearer(x @ old_a.T, through_a):
            a = old_a + (x.T @ _solve(x, through_a - x @ old_a.T)).T
        else:
            a = (x.T @ _solve(x, through_a)).T
        b = y.T @ old.solved_b[before].to(x.device)
        if old_b.shape[0] == y.shape[1] and _nearer(y @ old_b, through_b):
            b = b + old.rest_b[before].to(x.device)
        weights[name] = a.contiguous(), b.contiguous()

    # the old layer that a layer resembles may lack one of its modules: that one stays without effect
    _watch(base, list(match), texts, map_module)
    return _with(fresh, weights)


def _with(fresh: Adapter, weights: dict[str, tuple[Tensor, Tensor]]) -> Adapter:
    return Adapter(fresh.rank, fresh.scaling, weights, fresh.invocation)


# -- names and layers ----------------------------------------------------------------------------------


def _by_role(shapes: dict[str, Any]) -> dict[str, dict[int, tuple[str, Any]]]:
    """{role: {layer: (name, shape)}}."""
    found: dict[str, dict[int, tuple[str, Any]]] = {}
    for name, shape in shapes.items():
        role, layer = place(name)
        found.setdefault(role, {})[layer] = name, shape
    return found


def _among(
    roles: dict[str, dict[int, tuple[str, Any]]], names: Container[str]
) -> dict[str, dict[int, tuple[str, Any]]]:
    """Roles with those of their modules that are among the names, if any."""
    kept = {role: {at: one for at, one in by.items() if one[0] in names} for role, by in roles.items()}
    return {role: members for role, members in kept.items() if members}


def _one(members: dict[int, tuple[str, Any]]) -> Any:
    """The shape of a role's modules; None where they differ, which equals no other."""
    shapes = {shape for _, shape in members.values()}
    return shapes.pop() if len(shapes) == 1 else object()


def _same_roles(
    roles: dict[str, dict[int, tuple[str, Any]]], old_roles: dict[str, dict[int, tuple[str, Any]]]
) -> bool:
    return roles.keys() == old_roles.keys() and all(_one(roles[r]) == _one(old_roles[r]) for r in roles)


def _matched(
    roles: dict[str, dict[int, tuple[str, Any]]],
    old_roles: dict[str, dict[int, tuple[str, Any]]],
    common: Sequence[str],
    alike: Callable[[str, str], float],
) -> dict[str, str]:
    """For each new module the old one of the same role in the layer that its layer resembles most, by the
    mean over roles; a later layer never takes an earlier one's."""
    layers = sorted({layer for role in common for layer in roles[role]})
    old_layers = sorted({layer for role in common for layer in old_roles[role]})
    table: list[list[float]] = []
    for layer in layers:
        row = []
        for before in old_layers:
            values = [
                alike(roles[role][layer][0], old_roles[role][before][0])
                for role in common
                if layer in roles[role] and before in old_roles[role]
            ]
            row.append(sum(values) / len(values) if values else -1.0)
        table.append(row)
    chosen = monotone(table)
    match = {}
    for layer, i in zip(layers, chosen, strict=True):
        for role in common:
            if layer in roles[role] and old_layers[i] in old_roles[role]:
                match[roles[role][layer][0]] = old_roles[role][old_layers[i]][0]
    return match


def monotone(table: Sequence[Sequence[float]]) -> list[int]:
    """For each row a column, none before that of the row above, with the largest sum; of equals the first."""
    width = len(table[0])
    best: list[list[tuple[float, int]]] = []
    for i, row in enumerate(table):
        line, running = [], (float("-inf"), 0)
        for j in range(width):
            if i and best[i - 1][j][0] > running[0]:
                running = best[i - 1][j][0], j
            line.append((row[j] + (running[0] if i else 0.0), running[1]))
        best.append(line)
    column = max(range(width), key=lambda j: (best[-1][j][0], -j))
    chosen = [column]
    for i in range(len(table) - 1, 0, -1):
        column = best[i][column][1]
        chosen.append(column)
    return chosen[::-1]


# -- what modules compute ------------------------------------------------------------------------------


def _weight(module: torch.nn.Module) -> Tensor:
    """The weight of a linear module as (out, in)."""
    weight: Tensor = module.weight.detach()  # type: ignore[assignment,operator]
    return weight.T if linear_shape(module)[2] else weight


def _shape(module: torch.nn.Module) -> tuple[int, int]:
    inner, outer, _ = linear_shape(module)
    return outer, inner


def _watch(
    base: Base,
    names: Sequence[str],
    texts: Sequence[Sequence[int]],
    see: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Call `see(module name, inputs, outputs)`, float32 of shape (tokens, size), for one pass of the bare
    base over texts, at the same tokens whatever the base."""
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), base.pad_id)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(list(text))
    places = [i * width + j for i, text in enumerate(texts) for j in range(len(text))]
    step = max(1, len(places) / TOKENS)
    chosen = torch.tensor(places)[(torch.arange(min(TOKENS, len(places))) * step).long()].to(base.device)

    def hook(name: str) -> Callable[..., None]:
        def keep(_: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            flat = [part.reshape(-1, part.shape[-1]) for part in (args[0], output)]
            if any(len(part) != ids.numel() for part in flat):  # routed to some of the tokens
                raise NoStart(f"{name} does not compute every token")
            see(name, *(part[chosen].float() for part in flat))

        return keep

    handles = [base.model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        # padding on the right: causal attention keeps it out of what comes before
        with torch.inference_mode(), base.active(None):
            body(base.model)(input_ids=ids.to(base.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _gram(x: Tensor) -> Tensor:
    """The centered Gram matrix of some of the rows."""
    some = x[:: max(1, len(x) // GRAM_TOKENS)][:GRAM_TOKENS]
    some = some - some.mean(0)
    return some @ some.T


def _nearer(found: Tensor, wanted: Tensor) -> bool:
    """Whether `found` tells more about `wanted` than nothing would."""
    return float((found - wanted).norm()) < float(wanted.norm())


def _solve(x: Tensor, y: Tensor) -> Tensor:
    """(x x' + ridge)^-1 y: x' times it is the ridge regression of y on x, for fewer tokens than sizes too."""
    kernel = x @ x.T
    kernel.diagonal().add_(RIDGE * kernel.diagonal().mean().clamp(min=1e-6))
    return torch.linalg.solve(kernel, y)
