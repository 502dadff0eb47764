"""Sequences one after the other in one forward pass, without padding in the linear layers.

A `Packing` holds a prefix that all sequences share (computed once) and the sequences, each of which sees the
prefix, keys and values of its own past if it has one, and itself. Models take part through transformers'
attention interface, so that this works for every architecture that uses it; `packs` finds out by comparing.
Packing with block-diagonal attention: Krell et al. 2021, arXiv 2107.02027. Shared prefix: Juravsky et al.
2024, arXiv 2402.05099.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

INTERFACE = "evergreen"
"""Name under which `attend` is registered with transformers."""

GROUP_WASTE = 1.2
"""Sequences are padded together for attention while that takes at most this many times their own tokens."""

KeyValues = dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]
"""Keys (with positions applied) and values by attention module: (rows, heads, tokens, size) each."""

_passes: "dict[int, _Pass]" = {}
"""The pass of each thread."""


def _current() -> "_Pass | None":
    """The pass that this thread computes; in autograd's own threads, the one whose gradient they compute."""
    found = _passes.get(threading.get_ident())
    if found is None and _passes and torch._C._current_graph_task_id() != -1:
        found = next(iter(_passes.values()))
    return found


def current_packing() -> "Packing | None":
    """The packing that this thread computes."""
    found = _current()
    return found if isinstance(found, Packing) else None


WANTED = object()
"""See `Packing.entering`."""


@dataclass
class Past:
    """Keys and values before each sequence: `lengths[i]` tokens of row i of `values` count, from the left."""

    values: KeyValues
    lengths: list[int]


@dataclass(frozen=True)
class Branches:
    """A tree of tokens that is tried after every sequence: `parents[i]` is the token before token i, an
    earlier one of the tree, or -1 for the end of the sequence."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def depths(self) -> list[int]:
        """How many tokens of the tree lie before each."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    def seen(self) -> torch.Tensor:
        """(tokens, tokens) bool: which tokens of the tree each one sees: itself and those before it."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                seen[i] |= seen[parent]
        return seen


class _Pass:
    """One forward pass whose attention is computed here."""

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, models whose attention is `attend` compute this. Keep it open for the backward
        pass of a checkpointed forward."""
        thread = threading.get_ident()
        before = _passes.get(thread)
        _passes[thread] = self
        try:
            yield
        finally:
            if before is None:
                del _passes[thread]
            else:
                _passes[thread] = before

    def attend(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int | None,
        options: "_Options",
    ) -> torch.Tensor:
        """(heads, tokens, size) each; returns (heads, tokens, size)."""
        raise NotImplementedError


class Packing(_Pass):
    """Sequences in one forward pass.

    Args:
        sequences: token ids, at least one each.
        prefix: tokens before every sequence.
        past: what each sequence sees between the prefix and itself.
        branches: a tree of tokens behind every sequence; it counts as the sequence's last tokens.
        capture: keep keys and values of prefix and sequences: see `captured`.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        device: torch.device,
        *,
        prefix: Sequence[int] = (),
        past: Past | None = None,
        branches: Branches | None = None,
        capture: bool = False,
    ):
        if past is not None and prefix:
            raise ValueError("expected a prefix or a past, found both")
        if branches is not None:
            sequences = [[*sequence, *branches.tokens] for sequence in sequences]
        tree = len(branches.tokens) if branches is not None else 0
        depths = branches.depths() if branches is not None else []
        self.lengths = [len(sequence) for sequence in sequences]
        self.prefix = len(prefix)
        self.past = past
        offsets = past.lengths if past is not None else [self.prefix] * len(sequences)
        ids = [*prefix, *(token for sequence in sequences for token in sequence)]
        positions = list(range(self.prefix))
        for offset, length in zip(offsets, self.lengths, strict=True):
            own = offset + length - tree
            positions += [*range(offset, own), *(own + depth for depth in depths)]
        self.input_ids = torch.tensor([ids], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.starts = [self.prefix]
        for length in self.lengths[:-1]:
            self.starts.append(self.starts[-1] + length)
        self.groups = _groups(self.lengths, self.starts, offsets, device, branches)
        self.captured: KeyValues | None = {} if capture else None
        """With `capture`, keys and values of all tokens, (1, heads, tokens, size), after the forward pass."""
        self.entering: torch.Tensor | object | None = None
        """Hidden states (1, tokens, size) that `frozen.FrozenLayers` begin with, or WANTED of them."""

    def attend(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int | None,
        options: "_Options",
    ) -> torch.Tensor:
        """(heads, tokens, size) each; returns (heads, tokens, size)."""
        prefix = self.prefix
        if self.captured is not None:
            self.captured[module] = k[None], v[None]
        parts: list[torch.Tensor] = []
        # one split instead of slices: the gradient of each slice would be as large as all of x
        lengths = [prefix, *(group.tokens for group in self.groups)]
        (qp, *qs), (kp, *ks), (vp, *vs) = (x.split(lengths, dim=1) for x in (q, k, v))
        if prefix:
            whole = _Group(range(1), [prefix], 0, [0], q.device)
            plain = window is None and _too_many(qp[None], kp[None], options)
            mask = None if plain else whole.mask(0, None, window, q.dtype)
            parts.append(_scores(qp[None], kp[None], vp[None], mask, options)[0])
        for group, qi, ki, vi in zip(self.groups, qs, ks, vs, strict=True):
            qg, kg, vg = _gather(qi, group), _gather(ki, group), _gather(vi, group)
            before, counts = 0, None
            if prefix:
                before = prefix
                n = len(group.rows)
                kg = torch.cat([kp[None].expand(n, -1, -1, -1), kg], dim=2)
                vg = torch.cat([vp[None].expand(n, -1, -1, -1), vg], dim=2)
            elif self.past is not None:
                counts = group.offsets
                before = max(self.past.lengths[group.rows.start : group.rows.stop])
                pk, pv = self.past.values[module]
                rows = slice(group.rows.start, group.rows.stop)
                kg = torch.cat([pk[rows, :, :before], kg], dim=2)
                vg = torch.cat([pv[rows, :, :before], vg], dim=2)
            # the mask of one long sequence would be as large as the square of its length
            plain = not before and window is None and group.alone and _too_many(qg, kg, options)
            mask = None if plain else group.mask(before, counts, window, q.dtype)
            parts.append(_scatter(_scores(qg, kg, vg, mask, options), group))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _Group:
    """Neighbouring sequences whose attention is computed together: `rows` x `width` tokens with padding."""

    def __init__(
        self,
        rows: range,
        lengths: list[int],
        start: int,
        offsets: list[int],
        device: torch.device,
        branches: Branches | None = None,
    ):
        self.rows, self.start, self.tokens = rows, start, sum(lengths)
        self.width = max(lengths)
        self.even = self.tokens == self.width * len(rows)
        self.device = device
        self.offsets = torch.tensor(offsets, device=device)
        length = torch.tensor(lengths, device=device)
        column = torch.arange(self.width, device=device)
        inside = column < length[:, None]
        first = torch.cumsum(length, 0) - length
        self._tokens = torch.where(inside, first[:, None] + column, 0)  # (rows, width) -> token
        self._slots = inside.flatten().nonzero()[:, 0]  # token -> row x width
        self._index: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[Any, torch.Tensor] = {}
        self._branches = branches
        self._length = length
        self.alone = len(rows) == 1 and branches is None

    def index(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where (rows, heads, width) comes from in (heads, tokens), and the way back."""
        if heads not in self._index:
            head = torch.arange(heads, device=self.device)
            there = head[None, :, None] * self.tokens + self._tokens[:, None]
            row, column = self._slots // self.width, self._slots % self.width
            back = (row * heads)[None] * self.width + head[:, None] * self.width + column[None]
            self._index[heads] = there.flatten(), back.flatten()
        return self._index[heads]

    def mask(self, before: int, past: torch.Tensor | None, window: int | None, dtype: torch.dtype) -> Any:
        """0 or -inf, (rows, 1, width, before + width): `before` tokens of prefix or past, then the row
        itself. `past` (rows,) says how many of a padded past count."""
        key = (before, window, dtype)
        if key not in self._masks:
            column = torch.arange(self.width, device=self.device)
            query = self.offsets[:, None] + column  # positions (rows, width)
            own = (column <= column[:, None]).expand(len(self.rows), -1, -1)
            if self._branches is not None:
                tree = len(self._branches.tokens)
                node = column - (self._length - tree)[:, None]  # (rows, width): number in the tree, if in it
                inside, node = (node >= 0) & (node < tree), node.clamp(0, tree - 1)
                depths = torch.tensor(self._branches.depths(), device=self.device)
                query = torch.where(
                    inside, self.offsets[:, None] + (self._length - tree)[:, None] + depths[node], query
                )
                seen = self._branches.seen().to(self.device)[node[:, :, None], node[:, None]]
                own = own & (seen | ~(inside[:, :, None] & inside[:, None]))
            early = torch.arange(before, device=self.device).expand(len(self.rows), -1)
            known = early < past[:, None] if past is not None else torch.ones_like(early, dtype=torch.bool)
            visible = torch.cat(
                [
                    known[:, None].expand(-1, self.width, -1),
                    own,
                ],
                dim=-1,
            )
            if window is not None:
                position = torch.cat([early, query], dim=-1)
                visible = visible & (query[:, :, None] - position[:, None] < window)
            blocked = torch.zeros(visible.shape, dtype=dtype, device=self.device)
            self._masks[key] = blocked.masked_fill_(~visible, float("-inf"))[:, None]
        return self._masks[key]


def _groups(
    lengths: list[int],
    starts: list[int],
    offsets: list[int],
    device: torch.device,
    branches: Branches | None,
) -> list[_Group]:
    groups: list[_Group] = []
    first = 0
    for i in range(1, len(lengths) + 1):
        part = lengths[first : i + 1]
        if i == len(lengths) or max(part) * len(part) > GROUP_WASTE * sum(part) + 16:
            rows = range(first, i)
            groups.append(_Group(rows, lengths[first:i], starts[first], offsets[first:i], device, branches))
            first = i
    return groups


# -- token by token ------------------------------------------------------------------------------------


class Slots:
    """Keys and values of rows that are decoded, row i in slot i: `values` has (slots, heads, capacity, size)
    by attention module. Room grows by doubling."""

    def __init__(self) -> None:
        self.values: KeyValues = {}
        self.slots = 0
        self.capacity = 0

    def room(self, rows: int, tokens: int) -> tuple[int, int]:
        """(slots, capacity) that `reserve` would make of what there is."""
        slots = self.slots if rows <= self.slots else max(rows, self.slots + self.slots // 2)
        fitting = -(-tokens // 32) * 32
        capacity = self.capacity if tokens <= self.capacity else max(fitting, 2 * self.capacity)
        return slots, capacity

    def reserve(self, like: KeyValues, rows: int, tokens: int) -> None:
        """Make room for so many rows and tokens of each. `like` has the shapes of heads."""
        if rows <= self.slots and tokens <= self.capacity:
            return
        before = self.slots
        self.slots, self.capacity = self.room(rows, tokens)
        for module, pair in like.items():
            old = self.values.get(module)
            new = [x.new_zeros(self.slots, x.shape[1], self.capacity, x.shape[3]) for x in pair]
            if old is not None:
                for a, b in zip(new, old, strict=True):
                    a[:before, :, : b.shape[2]] = b
            self.values[module] = new[0], new[1]

    def write(self, added: KeyValues, tokens: torch.Tensor, rows: torch.Tensor, at: torch.Tensor) -> None:
        """Keep tokens `tokens` of `added` (1, heads, tokens, size) as tokens `at` of slots `rows`."""
        for module, pair in added.items():
            for mine, new in zip(self.values[module], pair, strict=True):
                mine[rows, :, at] = new[0].transpose(0, 1)[tokens]

    def copy(self, past: KeyValues, row: int, tokens: int) -> None:
        """Begin a row with the first `tokens` of `past` (1, heads, tokens, size)."""
        for module, pair in past.items():
            for mine, new in zip(self.values[module], pair, strict=True):
                mine[row, :, :tokens] = new[0, :, :tokens]

    def move(self, sources: list[int], targets: list[int], tokens: int) -> None:
        """Put rows elsewhere; at most `tokens` of each count."""
        for pair in self.values.values():
            for mine in pair:
                for source, target in zip(sources, targets, strict=True):
                    mine[target, :, :tokens] = mine[source, :, :tokens]

    def of_row(self, row: int, tokens: int) -> KeyValues:
        """A copy of the first `tokens` of one row."""
        here = (slice(row, row + 1), slice(None), slice(tokens))
        return {module: (k[here].clone(), v[here].clone()) for module, (k, v) in self.values.items()}

    def past(self, first: int, lengths: list[int]) -> Past:
        """What neighbouring rows hold, as the past of a packing; no copy."""
        here = slice(first, first + len(lengths))
        return Past({module: (k[here], v[here]) for module, (k, v) in self.values.items()}, lengths)


@dataclass(frozen=True)
class Segment:
    """The first rows of `slots`: `lengths` (rows,) tokens each, `longest` at most."""

    slots: Slots
    lengths: torch.Tensor
    longest: int


class Step(_Pass):
    """One more token for each row of some segments, which take in its keys and values.

    Args:
        tokens: token ids of all rows, segment after segment.
        prefix, shared: keys and values (1, heads, shared, size) of tokens before every row, kept once.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        segments: Sequence[Segment],
        prefix: KeyValues | None = None,
        shared: int = 0,
    ):
        self.input_ids = tokens[None]
        self.position_ids = torch.cat([segment.lengths for segment in segments])[None] + shared
        self._segments, self._prefix, self._shared = segments, prefix, shared
        self._rows = [torch.arange(len(segment.lengths), device=tokens.device) for segment in segments]
        self._masks: dict[Any, torch.Tensor] = {}

    def attend(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int | None,
        options: "_Options",
    ) -> torch.Tensor:
        """(heads, rows, size) each; returns (heads, rows, size)."""
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        parts, at = [], 0
        for number, segment in enumerate(self._segments):
            here = slice(at, at + len(segment.lengths))
            at = here.stop
            keys, values = segment.slots.values[module]
            keys[self._rows[number], :, segment.lengths] = k[here]
            values[self._rows[number], :, segment.lengths] = v[here]
            mask = self._mask(number, window, q.dtype)
            parts.append(self._rows_of(module, q[here], keys, values, segment.longest + 1, mask, options))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)

    def _rows_of(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        span: int,
        mask: torch.Tensor,
        options: "_Options",
    ) -> torch.Tensor:
        """One query (n, heads, size) each to the first `span` tokens of its slot, after the prefix."""
        n, heads, size = q.shape
        shared = k.shape[1]
        k, v = (x[:n, :, :span].reshape(n * shared, span, -1) for x in (k, v))  # a view: no copy
        q = q * options.scale
        scores = torch.bmm(q.reshape(n * shared, -1, size), k.transpose(1, 2)).view(n, heads, 1, span)
        if self._prefix is None:
            weights = _weights(scores, mask, options)
            return torch.bmm(weights.view(n * shared, -1, span), v).view(n, heads, -1)
        pk, pv = self._prefix[module]

        def by_head(x: torch.Tensor) -> torch.Tensor:
            """The rows' queries of one head, one below the other, for the one copy of the prefix."""
            return x.reshape(n, shared, -1, x.shape[-1]).transpose(0, 1).reshape(shared, -1, x.shape[-1])

        def by_row(x: torch.Tensor) -> torch.Tensor:
            return x.view(shared, n, -1, x.shape[-1]).transpose(0, 1).reshape(n, heads, 1, x.shape[-1])

        early = by_row(torch.bmm(by_head(q), pk[0].transpose(1, 2)))
        weights = _weights(torch.cat([early, scores], dim=-1), mask, options)
        early, late = weights.split([self._shared, span], dim=-1)
        out = torch.bmm(late.reshape(n * shared, -1, span), v).view(n, heads, 1, -1)
        return (out + by_row(torch.bmm(by_head(early), pv[0])))[:, :, 0]

    def _mask(self, number: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """0 or -inf, (rows, 1, 1, shared + span)."""
        key = (number, window, dtype)
        if key not in self._masks:
            segment = self._segments[number]
            position = torch.arange(self._shared + segment.longest + 1, device=segment.lengths.device)
            distance = self._shared + segment.lengths[:, None] - position
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._masks[key] = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
        return self._masks[key]


# -- attention -----------------------------------------------------------------------------------------


@dataclass
class _Windows:
    """Sliding windows that a model asked for: of its masks, and of its attention layers in a packing."""

    masks: set[int | None] = field(default_factory=set)
    layers: set[int | None] = field(default_factory=set)


_watched = threading.local()
"""`windows`: what `packs` looks at in this thread."""


def register() -> None:
    """Make `attend` known to transformers; `model.set_attn_implementation(INTERFACE)` uses it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def no_mask_when_packed(*args: Any, **kwargs: Any) -> Any:
        if (seen := getattr(_watched, "windows", None)) is not None:
            seen.masks.add(kwargs.get("local_size"))
        return None if _current() is not None else sdpa_mask(*args, **kwargs)

    AttentionInterface.register(INTERFACE, attend)
    AttentionMaskInterface.register(INTERFACE, no_mask_when_packed)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the packing in use: query (1, heads, tokens, size), key and value with heads or a divisor
    of them; returns (1, tokens, heads, size). Without a packing, what transformers' own functions compute."""
    current = _current()
    if current is None:
        return _usual(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling,
            dropout,
            sliding_window,
            softcap,
            s_aux,
            kwargs,
        )
    if (seen := getattr(_watched, "windows", None)) is not None:
        seen.layers.add(sliding_window)
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("position bias in packed attention")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    options = _Options(scale, dropout if module.training else 0.0, softcap, s_aux)
    out = current.attend(module, query[0], key[0], value[0], sliding_window, options)
    return out.transpose(0, 1)[None].contiguous(), None


MOST_SCORES = 2**25
"""Products of queries and keys that are computed as one tensor; more are not kept, which takes longer."""


@dataclass(frozen=True)
class _Options:
    scale: float
    dropout: float
    softcap: float | None
    sinks: torch.Tensor | None


def _too_many(q: torch.Tensor, k: torch.Tensor, o: _Options) -> bool:
    """Whether the products of these are not kept."""
    n, heads, width, _ = q.shape
    many = n * heads * width * k.shape[2] > MOST_SCORES
    return many and o.softcap is None and o.sinks is None and not o.dropout


def _scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, o: _Options
) -> torch.Tensor:
    """Attention of q (n, H, L, D) to k, v (n, H or a divisor, S, D) under mask (n, 1, L, S); None, where
    there are too many products to keep, for L = S tokens that each see those before."""
    n, heads, width, size = q.shape
    shared = k.shape[1]
    if _too_many(q, k, o):
        k, v = (x.repeat_interleave(heads // shared, dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=o.scale
        )
    assert mask is not None
    q = (q * o.scale).reshape(n * shared, heads // shared * width, size)
    scores = torch.bmm(q, k.reshape(n * shared, -1, size).transpose(1, 2))
    weights = _weights(scores.view(n, heads, width, -1), mask, o)
    out = torch.bmm(weights.view(n * shared, -1, weights.shape[-1]), v.reshape(n * shared, -1, v.shape[-1]))
    return out.view(n, heads, width, -1)


def _weights(scores: torch.Tensor, mask: torch.Tensor, o: _Options) -> torch.Tensor:
    """Attention weights (n, H, L, S) from scaled products, which are overwritten."""
    if o.softcap is not None:
        scores = torch.tanh(scores / o.softcap) * o.softcap
    scores += mask
    if o.sinks is not None:
        n, _, width, _ = scores.shape
        scores = torch.cat([scores, o.sinks.reshape(1, -1, 1, 1).expand(n, -1, width, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if o.sinks is not None:
        weights = weights[..., :-1]
    if o.dropout:
        weights = torch.nn.functional.dropout(weights, o.dropout)
    return weights


class _Permute(torch.autograd.Function):
    """Rows of x by index; the backward pass takes rows by the inverse, so that nothing is added up."""

    @staticmethod
    def forward(ctx: Any, x: Any, there: Any, back: Any) -> Any:
        ctx.save_for_backward(back)
        return x[there]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0][ctx.saved_tensors[0]], None, None


def _gather(x: torch.Tensor, group: _Group) -> torch.Tensor:
    """(heads, tokens, size) to (rows, heads, width, size); padding repeats some token."""
    heads, tokens, size = x.shape
    if group.even:
        return x.reshape(heads, len(group.rows), group.width, size).transpose(0, 1)
    there, back = group.index(heads)
    out = _Permute.apply(x.reshape(heads * tokens, size), there, back)
    return out.view(len(group.rows), heads, group.width, size)  # type: ignore[union-attr]


def _scatter(x: torch.Tensor, group: _Group) -> torch.Tensor:
    """(rows, heads, width, size) to (heads, tokens, size)."""
    rows, heads, width, size = x.shape
    if group.even:
        return x.transpose(0, 1).reshape(heads, rows * width, size)
    there, back = group.index(heads)
    return _Unpad.apply(x.reshape(-1, size), there, back).view(heads, group.tokens, size)  # type: ignore[union-attr]


class _Unpad(torch.autograd.Function):
    """Drops padding; the backward pass puts zeros there."""

    @staticmethod
    def forward(ctx: Any, x: Any, there: Any, back: Any) -> Any:
        ctx.save_for_backward(back)
        ctx.shape = x.shape
        return x[back]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        full = gradients[0].new_zeros(ctx.shape)
        full[ctx.saved_tensors[0]] = gradients[0]
        return full, None, None


def _usual(
    module: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    scaling: Any,
    dropout: Any,
    window: Any,
    softcap: Any,
    s_aux: Any,
    extra: dict[str, Any],
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is None and s_aux is None:
        extra = {**extra, "sliding_window": window}
        return sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, **extra)
    visible = mask if mask is not None else _causal(q.shape[2], k.shape[2], q.device)
    blocked = torch.zeros(visible.shape, dtype=q.dtype, device=q.device)
    blocked = blocked.masked_fill_(~visible, torch.finfo(q.dtype).min)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    options = _Options(scale, dropout if module.training else 0.0, softcap, s_aux)
    return _scores(q, k, v, blocked, options).transpose(1, 2).contiguous(), None


def _causal(width: int, total: int, device: torch.device) -> torch.Tensor:
    column = torch.arange(total, device=device)
    return (column <= column[total - width :, None])[None, None]


# -- models --------------------------------------------------------------------------------------------


def body(model: Any) -> Any:
    """The part of a causal language model that ends with hidden states."""
    return getattr(model, model.base_model_prefix)


def hidden_states(model: Any, packing: Packing | Step) -> torch.Tensor:
    """Last hidden states (tokens, size) of the packing's tokens, prefix first, or of a step's rows."""
    with packing.applied():
        return body(model)(
            input_ids=packing.input_ids, position_ids=packing.position_ids, use_cache=False
        ).last_hidden_state[0]


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) of hidden states (N, size): the model's own head and whatever it does behind it."""
    inner = body(model)
    if not isinstance(inner.forward, _Body):
        inner.forward = _Body(inner.forward)
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    _Body.known.hidden = hidden
    try:
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        _Body.known.hidden = None


class _Body:
    """A body's forward pass, but for a thread that has its hidden states already."""

    known = threading.local()

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward
        self.__signature__ = inspect.signature(forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = getattr(_Body.known, "hidden", None)
        return self.forward(*args, **kwargs) if hidden is None else _BodyOutput(hidden[None])


class _BodyOutput:
    """What a body returns, to the head behind it: nothing but hidden states."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


@torch.inference_mode()
def packs(model: Any) -> bool:
    """Whether this model computes the same packed as alone: found by computing, in its own number format."""
    register()
    model.set_attn_implementation(INTERFACE)
    try:
        if "position_ids" not in inspect.signature(type(body(model)).forward).parameters:
            return False
    except AttributeError:
        return False
    _watched.windows = windows = _Windows()
    try:
        return _computes_the_same(model) and windows.masks <= windows.layers | {None}
    finally:
        _watched.windows = None


def _computes_the_same(model: Any) -> bool:
    """On a few short sequences. A window that only the mask knows, which a packing has none of, would not be
    seen here: they are shorter than any."""
    size = model.get_input_embeddings().weight.shape[0]
    prefix, *rows = [
        [(7 * i * i + 3 * i + start) % size for i in range(n)] for start, n in ((5, 4), (11, 6), (2, 3))
    ]
    device = model.device
    try:
        alone = [model(input_ids=torch.tensor([prefix + row], device=device)).logits[0, 4:] for row in rows]
        packing = Packing(rows, device, prefix=prefix, capture=True)
        hidden = hidden_states(model, packing)[4:]
        with_past = Packing([row[2:] for row in rows], device, past=_past_of(packing, 2))
        again = hidden_states(model, with_past)
        last = hidden_states(model, _last_step(packing, device))
        found = [logits_of(model, hidden), logits_of(model, again), logits_of(model, last)]
    except (AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    expected = [
        torch.cat(alone),
        torch.cat([part[2:] for part in alone]),
        torch.stack([part[-1] for part in alone]),
    ]
    limit = 1e-3 if model.dtype == torch.float32 else 3e-2
    return all(
        a.shape == b.shape and float((a.float() - b.float()).norm()) <= limit * float(a.float().norm())
        for a, b in zip(expected, found, strict=True)
    )


def _past_of(packing: Packing, tokens: int) -> Past:
    """The prefix and the first `tokens` of each sequence as a past."""
    assert packing.captured is not None
    values: KeyValues = {}
    for module, pair in packing.captured.items():
        k, v = (
            torch.stack(
                [
                    torch.cat([x[0, :, : packing.prefix], x[0, :, start : start + tokens]], dim=1)
                    for start in packing.starts
                ]
            )
            for x in pair
        )
        values[module] = k, v
    return Past(values, [packing.prefix + tokens] * len(packing.starts))


def _last_step(packing: Packing, device: torch.device) -> Step:
    """The last token of each sequence as a step after the others, with the prefix kept once."""
    assert packing.captured is not None
    slots, n = Slots(), packing.prefix
    slots.reserve(packing.captured, len(packing.lengths), max(packing.lengths))
    for row, (start, length) in enumerate(zip(packing.starts, packing.lengths, strict=True)):
        here = slice(start, start + length - 1)
        own = {module: (k[:, :, here], v[:, :, here]) for module, (k, v) in packing.captured.items()}
        slots.copy(own, row, length - 1)
    ends = [start + length - 1 for start, length in zip(packing.starts, packing.lengths, strict=True)]
    longest = max(packing.lengths) - 1
    prefix = {module: (k[:, :, :n], v[:, :, :n]) for module, (k, v) in packing.captured.items()}
    segment = Segment(slots, torch.tensor(packing.lengths, device=device) - 1, longest)
    return Step(packing.input_ids[0, ends], [segment], prefix, n)
