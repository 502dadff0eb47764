"""Answers to many prompts at once: rows join a batch at any step and leave it at any step.

Newcomers are computed as one packed sequence, then every row takes one token per step, each with its own
adapter, limit and sampling. What prompts have in common is computed once. Continuous batching: Yu et al. 2022
(Orca); greedy answers are those of transformers' `generate`, one by one.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ml_assets.engine.forward import accepts, only_positions, shared_prefix
from ml_assets.engine.loading import Base
from ml_assets.engine.lora import Route
from ml_assets.engine.packing import (
    KeyValues,
    Packing,
    Past,
    Segment,
    Slots,
    Step,
    hidden_states,
    logits_of,
)

FinishReason = Literal["stop", "length"]

PREFILL_TOKENS = 2048
"""Prompt tokens computed in one pass, so that a long prompt does not hold up the rows that are answering."""

BUCKET = 256
"""Rows of at most this many tokens lie together, then those of 4 times as many, and so on: padding in the
attention of short rows beside long ones is bounded."""

KEPT = 16
"""A prefix is kept when it is this much longer than what is kept already."""


@dataclass(frozen=True)
class Completion:
    """One answer. `token_ids` are without the token that ended it; `seconds` is from the time that its row
    joined the batch to its last token."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    seconds: float


@dataclass(eq=False)
class Row:
    """One request. `adapter` None is the bare base; `temperature` 0 is greedy, else a generator of the row's
    own, with `seed`, draws from the tokens within `top_p`."""

    prompt: Sequence[int]
    max_new_tokens: int
    adapter: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    produced: int = 0
    cancelled: bool = False
    active_from: int = 0
    """The token of the prompt from which its adapter works."""
    generator: torch.Generator | None = None
    scored: bool = False
    """Whether the log-probability of its tokens is wanted."""
    logprob: float | None = None
    """Of its latest token, the one that ended it included, nats; before temperature and `top_p`."""
    past: tuple[KeyValues, int] | None = None
    """Keys and values of the first tokens of its prompt that are known before it is computed."""


MIN_TEMPERATURE = 1e-6
"""Below this, sampling is greedy to the last bit of float32."""

Event = tuple[Row, int | None, FinishReason | None]
"""(row, token, None), (row, token, "length") for the last that fits, or (row, None, "stop")."""


class PrefixCache:
    """Keys and values of beginnings that prompts share, found by comparing each prompt with the one before.

    Those of an activated LoRA's prompts are the base's, for all adapters. At most `max_bytes`, least recently
    used first out. Not thread-safe.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self._entries: OrderedDict[tuple[str | None, tuple[int, ...]], KeyValues] = OrderedDict()
        self._before: dict[str | None, list[int]] = {}

    def longest(self, scope: str | None, prompt: Sequence[int]) -> tuple[KeyValues, int] | None:
        """Keys and values that begin as this prompt does, and how many tokens of them count."""
        best, count = None, 0
        for key in self._entries:
            if key[0] == scope and (n := _common(key[1], prompt)) > count:
                best, count = key, n
        if best is None or count < KEPT:
            return None
        self._entries.move_to_end(best)
        self.hits += 1
        return self._entries[best], count

    def worth_keeping(self, scope: str | None, prompt: Sequence[int], known: int) -> int:
        """How many first tokens of a prompt to keep, of which `known` are kept already; 0 for none."""
        before, self._before[scope] = self._before.get(scope), list(prompt)
        n = _common(before, prompt) if before else 0
        return n if n >= known + KEPT else 0

    def keep(self, scope: str | None, prefix: Sequence[int], values: KeyValues) -> None:
        size = sum(x.numel() * x.element_size() for pair in values.values() for x in pair)
        key = scope, tuple(prefix)
        if key in self._entries or size > self.max_bytes:
            return
        while self.bytes + size > self.max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = values
        self.bytes += size

    def forget(self, scope: str) -> None:
        """Drop what an adapter computed."""
        self._before.pop(scope, None)
        for key in [key for key in self._entries if key[0] == scope]:
            self._drop(key)

    def _drop(self, key: tuple[str | None, tuple[int, ...]]) -> None:
        values = self._entries.pop(key)
        self.bytes -= sum(x.numel() * x.element_size() for pair in values.values() for x in pair)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


@dataclass
class _Bucket:
    """Rows of similar length that answer; `next_tokens` and `lengths` are (rows,)."""

    slots: Slots
    next_tokens: torch.Tensor
    lengths: torch.Tensor
    rows: list[Row] = field(default_factory=list)
    longest: int = 0


class Decoder:
    """Continuous batching on one base.

    Args:
        cache: beginnings of prompts that are kept from one request to the next.
        prefix: instead of a cache, tokens that all prompts begin with, computed once by `prefix_adapter` and
            held once; no adapter may begin to work inside it.
    """

    def __init__(
        self,
        base: Base,
        *,
        cache: PrefixCache | None = None,
        prefix: Sequence[int] = (),
        prefix_adapter: str | None = None,
    ):
        self._base = base
        self._cache = cache
        self._waiting: deque[Row] = deque()
        self._buckets: dict[int, _Bucket] = {}
        self._prefilled_last = False
        self._routed: tuple[list[str | None], Route] = ([], Route())
        self._shared = len(prefix)
        self._prefix: KeyValues | None = None
        if prefix:
            with torch.inference_mode():
                route = Route((prefix_adapter,)) if prefix_adapter else Route()
                self._prefix = self._extended(None, prefix, route)

    def forget(self, adapter: str) -> None:
        """Drop what is kept of an adapter that goes away."""
        if self._cache is not None:
            self._cache.forget(adapter)

    @property
    def rows(self) -> int:
        """Rows that answer or wait to be computed."""
        return len(self._waiting) + sum(len(bucket.rows) for bucket in self._buckets.values())

    def add(self, row: Row) -> None:
        """Take in a row. Raises ValueError when it is empty or does not fit the context."""
        _admit(self._base, row)
        self._waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Stop working for this row: its slot is free at the next step."""
        row.cancelled = True

    def tokens_with(self, rows: Iterable[Row]) -> int:
        """Tokens of keys and values that memory has room for once these rows have joined."""
        plans = {size: (len(b.rows), 0, b.slots) for size, b in self._buckets.items()}
        for row in [*self._waiting, *rows]:
            need = self._need(row)
            n, longest, slots = plans.get(_bucket(need), (0, 0, Slots()))
            plans[_bucket(need)] = n + 1, max(longest, need), slots
        rooms = [slots.room(n, longest) for n, longest, slots in plans.values()]
        return sum(slots * capacity for slots, capacity in rooms)

    @torch.inference_mode()
    def prime(self, prefix: Sequence[int], adapter: str | None) -> None:
        """Compute a beginning of prompts into the cache."""
        if self._cache is not None and len(prefix) >= KEPT:
            route = Route((adapter,)) if adapter else Route()
            self._cache.keep(adapter, prefix, self._extended(None, prefix, route))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Either compute the next newcomers, or take one token for each row that answers."""
        self._waiting = deque(row for row in self._waiting if not row.cancelled)
        for size, bucket in list(self._buckets.items()):
            self._keep(size, [i for i, row in enumerate(bucket.rows) if not row.cancelled])
        if self._waiting and not (self._prefilled_last and self._buckets):
            self._prefilled_last = True
            return self._prefill()
        self._prefilled_last = False
        return self._decode() if self._buckets else []

    # -- newcomers -------------------------------------------------------------------------------------

    def _need(self, row: Row) -> int:
        return len(row.prompt) - self._shared + row.max_new_tokens

    def _begin(self, row: Row) -> None:
        """Look up what is known of its prompt."""
        if row.past is None and self._cache is not None:
            scope, count = _scope(row)
            known = self._cache.longest(scope, row.prompt[: min(count, len(row.prompt) - 1)])
            row.past = known

    def _prefill(self) -> list[Event]:
        taken: dict[int, list[Row]] = {}
        tokens = 0
        while self._waiting:
            row = self._waiting[0]
            self._begin(row)
            size = len(row.prompt) - self._shared - (row.past[1] if row.past else 0)
            if tokens and tokens + size > PREFILL_TOKENS:
                break
            if size > PREFILL_TOKENS and self._prefix is None:
                self._advance(row)
                return []
            tokens += size
            taken.setdefault(_bucket(self._need(row)), []).append(self._waiting.popleft())
        return [event for size, rows in taken.items() for event in self._join(size, rows)]

    def _advance(self, row: Row) -> None:
        """Compute one piece of a long prompt."""
        before, known = row.past or (None, 0)
        route = self._route([row], [known], [PREFILL_TOKENS])
        piece = row.prompt[known : known + PREFILL_TOKENS]
        row.past = self._extended(before and _first(before, known), piece, route), known + PREFILL_TOKENS

    def _route(self, rows: Sequence[Row], starts: Sequence[int], lengths: Sequence[int]) -> Route:
        active = [max(0, row.active_from - start) for row, start in zip(rows, starts, strict=True)]
        return self._base.lora.for_rows([row.adapter for row in rows], lengths, active)

    def _extended(self, before: KeyValues | None, tokens: Sequence[int], route: Route) -> KeyValues:
        """`before` (1, heads, n, size) and behind it the keys and values of `tokens`."""
        past = Past(before, [_tokens(before)]) if before is not None else None
        packing = Packing([tokens], self._base.device, past=past, capture=True)
        with self._base.lora.routed(route):
            hidden_states(self._base.model, packing)
        assert packing.captured is not None
        return packing.captured if before is None else _joined(before, packing.captured)

    def _join(self, size: int, rows: list[Row]) -> list[Event]:
        """Compute the prompts of some rows as one sequence, and their first tokens."""
        base, shared = self._base, self._shared
        rows.sort(key=lambda row: (row.adapter or "", -len(row.prompt)))
        known = [row.past[1] if row.past else 0 for row in rows]
        rest = [list(row.prompt[shared + n :]) for row, n in zip(rows, known, strict=True)]
        bucket = self._buckets.get(size)
        if bucket is None:
            empty = torch.zeros(0, dtype=torch.long, device=base.device)
            bucket = self._buckets[size] = _Bucket(Slots(), empty, empty)
        slots, first = bucket.slots, len(bucket.rows)
        room = first + len(rows), max(self._need(row) for row in rows)
        past = None
        if any(known):
            slots.reserve(next(row.past[0] for row in rows if row.past), *room)
            for i, row in enumerate(rows):
                if row.past:
                    slots.copy(row.past[0], first + i, row.past[1])
            past = slots.past(first, known)
        elif self._prefix is not None:
            values = {
                module: (k.expand(len(rows), -1, -1, -1), v.expand(len(rows), -1, -1, -1))
                for module, (k, v) in self._prefix.items()
            }
            past = Past(values, [shared] * len(rows))
        packing = Packing(rest, base.device, past=past, capture=True)
        starts = [shared + n for n in known]
        with base.lora.routed(self._route(rows, starts, packing.lengths)):
            hidden = hidden_states(base.model, packing)
        ends = [start + length - 1 for start, length in zip(packing.starts, packing.lengths, strict=True)]
        logits = logits_of(base.model, hidden[torch.tensor(ends, device=base.device)])
        assert packing.captured is not None
        slots.reserve(packing.captured, *room)
        lengths = torch.tensor(packing.lengths)
        index = torch.arange(int(lengths.sum()))
        row_of = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        at = index - torch.tensor(packing.starts)[row_of] + torch.tensor(known)[row_of]
        device = base.device
        slots.write(packing.captured, index.to(device), (first + row_of).to(device), at.to(device))
        total = [n + length for n, length in zip(known, packing.lengths, strict=True)]
        self._learn(slots, first, rows, known)
        chosen, events, staying = _choose(base, rows, logits)
        bucket.rows += rows
        bucket.next_tokens = torch.cat([bucket.next_tokens, chosen])
        bucket.lengths = torch.cat([bucket.lengths, torch.tensor(total, device=device)])
        bucket.longest = max(bucket.longest, *total)
        for row in rows:
            row.past = None
        self._keep(size, [*range(first), *(first + i for i in staying)])
        return events

    def _learn(self, slots: Slots, first: int, rows: Sequence[Row], known: Sequence[int]) -> None:
        """Keep what the next prompts may begin with."""
        if self._cache is None:
            return
        for i, (row, n) in enumerate(zip(rows, known, strict=True)):
            scope, count = _scope(row)
            if length := self._cache.worth_keeping(scope, row.prompt[:count], n):
                self._cache.keep(scope, row.prompt[:length], slots.of_row(first + i, length))

    # -- rows that answer ------------------------------------------------------------------------------

    def _decode(self) -> list[Event]:
        base, buckets = self._base, list(self._buckets.items())
        rows = [row for _, bucket in buckets for row in bucket.rows]
        segments = [Segment(bucket.slots, bucket.lengths, bucket.longest) for _, bucket in buckets]
        tokens = torch.cat([bucket.next_tokens for _, bucket in buckets])
        step = Step(tokens, segments, self._prefix, self._shared)
        with base.lora.routed(self._decode_route(rows)):
            hidden = hidden_states(base.model, step)
        chosen, events, staying = _choose(base, rows, logits_of(base.model, hidden))
        at = 0
        for size, bucket in buckets:
            n = len(bucket.rows)
            bucket.next_tokens = chosen[at : at + n]
            bucket.lengths = bucket.lengths + 1
            bucket.longest += 1
            self._keep(size, [i - at for i in staying if at <= i < at + n])
            at += n
        return events

    def _decode_route(self, rows: Sequence[Row]) -> Route:
        key = [row.adapter if row.active_from < len(row.prompt) else None for row in rows]
        known, route = self._routed
        if key != known or not self._base.lora.adapters.keys() >= set(route.names):
            self._routed = key, self._base.lora.for_rows(key, [1] * len(key))
        return self._routed[1]

    def _keep(self, size: int, staying: list[int]) -> None:
        """Let all other rows of a bucket go; those at the end move to the free slots."""
        bucket = self._buckets[size]
        n, before = len(staying), len(bucket.rows)
        if n == before:
            return
        if not n:
            del self._buckets[size]
            return
        kept = set(staying)
        targets = [i for i in range(n) if i not in kept]
        sources = [i for i in staying if i >= n]
        order = list(range(n))
        for source, target in zip(sources, targets, strict=True):
            order[target] = source
        if sources:
            bucket.slots.move(sources, targets, bucket.longest)
        index = torch.tensor(order, device=self._base.device)
        bucket.rows = [bucket.rows[i] for i in order]
        bucket.next_tokens, bucket.lengths = bucket.next_tokens[index], bucket.lengths[index]
        bucket.longest = int(bucket.lengths.max())


def _scope(row: Row) -> tuple[str | None, int]:
    """Whose keys and values a prompt begins with, and for how many tokens."""
    return (row.adapter, len(row.prompt)) if row.active_from == 0 else (None, row.active_from)


def _bucket(tokens: int) -> int:
    size = BUCKET
    while size < tokens:
        size *= 4
    return size


def _tokens(values: KeyValues) -> int:
    return next(iter(values.values()))[0].shape[2]


def _first(values: KeyValues, tokens: int) -> KeyValues:
    return {module: (k[:, :, :tokens], v[:, :, :tokens]) for module, (k, v) in values.items()}


def _joined(a: KeyValues, b: KeyValues) -> KeyValues:
    return {m: (torch.cat([a[m][0], b[m][0]], 2), torch.cat([a[m][1], b[m][1]], 2)) for m in a}


@torch.inference_mode()
def token_bytes(base: Base) -> int:
    """Memory that the keys and values of one token take."""
    if not base.packs:  # at most, as far as the configuration tells
        config = base.model.config.get_text_config()
        return 2 * config.num_hidden_layers * config.hidden_size * base.model.dtype.itemsize
    packing = Packing([[base.pad_id]], base.device, capture=True)
    with base.active(None):
        hidden_states(base.model, packing)
    assert packing.captured is not None
    return sum(x.numel() * x.element_size() for pair in packing.captured.values() for x in pair)


# -- tokens --------------------------------------------------------------------------------------------


def _admit(base: Base, row: Row) -> None:
    if not row.prompt:
        raise ValueError("the prompt is empty: expected at least one token")
    if len(row.prompt) + row.max_new_tokens > base.context_length:
        raise ValueError(
            f"{len(row.prompt)} tokens and {row.max_new_tokens} new ones exceed the context of "
            f"{base.context_length}"
        )
    row.active_from = base.active_from(row.adapter, row.prompt)


def _choose(
    base: Base, rows: Sequence[Row], logits: torch.Tensor
) -> tuple[torch.Tensor, list[Event], list[int]]:
    """Next tokens (rows,) from logits (rows, vocabulary), what happened, and the rows that go on."""
    chosen = logits.argmax(-1)
    for i, row in enumerate(rows):
        if row.temperature > 0:
            chosen[i] = _sample(row, logits[i])
    if scored := [i for i, row in enumerate(rows) if row.scored]:
        index = torch.tensor(scored, device=logits.device)
        wanted = logits[index].float()
        found = wanted.gather(-1, chosen[index, None])[:, 0] - wanted.logsumexp(-1)
        for i, value in zip(scored, found.tolist(), strict=True):
            rows[i].logprob = value
    events: list[Event] = []
    staying: list[int] = []
    stops = base.chat.stop_ids
    for i, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
        if row.cancelled:
            continue
        if token in stops:
            events.append((row, None, "stop"))
            continue
        row.produced += 1
        last = row.produced >= row.max_new_tokens
        events.append((row, token, "length" if last else None))
        if not last:
            staying.append(i)
    return chosen, events, staying


def _sample(row: Row, logits: torch.Tensor) -> int:
    if row.generator is None:
        row.generator = torch.Generator()
        if row.seed is not None:
            row.generator.manual_seed(row.seed)
    logits = logits.float().cpu()
    # a temperature near 0 is 0 in float32, and the division no number
    probabilities = torch.softmax((logits - logits.max()) / max(row.temperature, MIN_TEMPERATURE), -1)
    if row.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= row.top_p
        outside[0] = False  # a top_p near 0 is 0 in float32
        probabilities[order[outside]] = 0
    return int(torch.multinomial(probabilities, 1, generator=row.generator))


# -- whole sets of prompts -----------------------------------------------------------------------------


def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    adapters: Sequence[str | None] | None = None,
    batch_tokens: int = 16384,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Greedy answers to `prompts` (token ids), in their order.

    `adapters` has the adapter of each prompt, None for the bare base; without it, all are answered by the
    active one. `batch_tokens` bounds rows x (prompt + new tokens) in memory. `on_progress(done, total)` is
    called as answers end. Raises ValueError that names a prompt that is empty or does not fit the context.
    """
    if adapters is None:
        active = base.lora.route.names
        adapters = [active[0] if active else None] * len(prompts)
    rows = [Row(p, max_new_tokens, name) for p, name in zip(prompts, adapters, strict=True)]
    for i, row in enumerate(rows):
        try:
            _admit(base, row)
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from error
    decoder = _decoder_for(base, rows)
    pending = deque(sorted(rows, key=lambda row: -len(row.prompt)))
    tokens: dict[Row, list[int]] = {row: [] for row in rows}
    ended: dict[Row, tuple[FinishReason, float]] = {}
    joined: dict[Row, float] = {}
    while pending or decoder.rows:
        if pending:
            limit = max(1, batch_tokens // (len(pending[0].prompt) + max_new_tokens))
            # newcomers are computed together: a few at a time would cost more than the room they'd fill
            if decoder.rows <= 0.75 * limit:
                while pending and decoder.rows < limit:
                    row = pending.popleft()
                    joined[row] = time.perf_counter()
                    decoder.add(row)
        before = len(ended)
        for row, token, reason in decoder.step():
            if token is not None:
                tokens[row].append(token)
            if reason is not None:
                ended[row] = reason, time.perf_counter() - joined[row]
        if on_progress and len(ended) > before:
            on_progress(len(ended), len(rows))
    return [
        Completion(tokens[row], base.chat.decode(tokens[row]), ended[row][0], len(row.prompt), ended[row][1])
        for row in rows
    ]


def _decoder_for(base: Base, rows: Sequence[Row]) -> "Decoder | FallbackDecoder":
    """A decoder that knows what the prompts of each adapter have in common."""
    if not base.packs:
        return FallbackDecoder(base)
    scopes: dict[str | None, list[Sequence[int]]] = {}
    for row in rows:
        scope, count = _scope(row)
        # one more token than may be shared, as no prompt may be shared as a whole
        ends = [] if count == len(row.prompt) else [-1]
        scopes.setdefault(scope, []).append([*row.prompt[:count], *ends])
    shared = {scope: prompts[0][: shared_prefix(prompts)] for scope, prompts in scopes.items()}
    if len(shared) == 1:
        [(scope, prefix)] = shared.items()
        return Decoder(base, prefix=prefix, prefix_adapter=scope)
    decoder = Decoder(base, cache=PrefixCache(2**40))
    for scope, prefix in shared.items():
        decoder.prime(prefix, scope)
    return decoder


# -- models that can't pack ----------------------------------------------------------------------------


class FallbackDecoder:
    """As `Decoder`, over transformers' own caches: rows that wait at the same time are one batch, padded on
    the left, and batches take turns."""

    def __init__(self, base: Base):
        self._base = base
        self._cache = _cache_argument(base)
        self._waiting: list[Row] = []
        self._batches: deque[_CacheBatch | _WholeBatch] = deque()

    def forget(self, adapter: str) -> None:
        pass

    @property
    def rows(self) -> int:
        return len(self._waiting) + sum(len(batch.rows) for batch in self._batches)

    def add(self, row: Row) -> None:
        _admit(self._base, row)
        self._waiting.append(row)

    def cancel(self, row: Row) -> None:
        row.cancelled = True

    def tokens_with(self, rows: Iterable[Row]) -> int:
        waiting = [len(row.prompt) + row.max_new_tokens for row in [*self._waiting, *rows]]
        return len(waiting) * max(waiting, default=0) + sum(
            len(batch.rows) * max(len(row.prompt) + row.max_new_tokens for row in batch.rows)
            for batch in self._batches
        )

    @torch.inference_mode()
    def step(self) -> list[Event]:
        self._waiting = [row for row in self._waiting if not row.cancelled]
        for batch in self._batches:  # also those whose turn it is not: an adapter may be gone by then
            batch.keep([i for i, row in enumerate(batch.rows) if not row.cancelled])
        self._batches = deque(batch for batch in self._batches if batch.rows)
        if self._waiting:
            if self._cache is None:
                batch = _WholeBatch(self._base, self._waiting)
            else:
                batch = _CacheBatch(self._base, self._waiting, self._cache)
            self._waiting = []
        elif self._batches:
            batch = self._batches.popleft()
        else:
            return []
        events = batch.step()
        if batch.rows:
            self._batches.append(batch)
        return events


@torch.inference_mode()
def _cache_argument(base: Base) -> str | None:
    """The name under which a model gives and takes its cache. None where it has none of which rows can be
    selected: RWKV has a list, RecurrentGemma keeps its state in its layers."""
    from transformers.cache_utils import Cache

    with base.active(None):
        out = base.model(input_ids=torch.tensor([[base.pad_id]], device=base.device), use_cache=True)
    for name in ("past_key_values", "cache_params"):
        if isinstance(getattr(out, name, None), Cache):
            return name
    return None


class _CacheBatch:
    def __init__(self, base: Base, rows: list[Row], cache: str):
        self._base, self.rows, self._name = base, rows, cache
        width = max(len(row.prompt) for row in rows)
        self._ids = torch.full((len(rows), width), base.pad_id)
        self._mask = torch.zeros(len(rows), width, dtype=torch.long, device=base.device)
        for i, row in enumerate(rows):
            self._ids[i, width - len(row.prompt) :] = torch.tensor(row.prompt)
            self._mask[i, width - len(row.prompt) :] = 1
        self._cache: Any = None

    def step(self) -> list[Event]:
        model, width = self._base.model, self._ids.shape[1]
        if self._cache is None:
            starts = [width - len(row.prompt) + row.active_from for row in self.rows]
        else:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
            starts = [int(row.active_from == len(row.prompt)) for row in self.rows]
        route = self._base.lora.for_rows([row.adapter for row in self.rows], [width] * len(self.rows), starts)
        extra: dict[str, Any] = {}
        if accepts(type(model), "position_ids"):
            extra["position_ids"] = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        if accepts(type(model), "logits_to_keep"):
            extra["logits_to_keep"] = 1
        mask = None if bool(self._mask.all()) else self._mask
        if self._cache is not None:
            extra[self._name] = self._cache
            if self._name == "cache_params":  # a state space's mask is of the tokens that come in
                mask = None
        with self._base.lora.routed(route):
            out = model(
                input_ids=self._ids.to(self._base.device), attention_mask=mask, use_cache=True, **extra
            )
        self._cache = getattr(out, self._name)
        chosen, events, staying = _choose(self._base, self.rows, out.logits[:, -1])
        self._ids = chosen[:, None]
        self.keep(staying)
        return events

    def keep(self, staying: list[int]) -> None:
        """Let all other rows go."""
        if len(staying) == len(self.rows):
            return
        index = torch.tensor(staying, dtype=torch.long, device=self._base.device)
        if staying:
            layers = self._cache.layers
            if all(hasattr(layer, "batch_select_indices") for layer in layers):
                self._cache.batch_select_indices(index)
            else:  # a recurrent layer can only be reordered, which selects as well
                for layer in layers:
                    getattr(layer, "batch_select_indices", layer.reorder_cache)(index)
        self._mask, self._ids = self._mask[index], self._ids[index]
        self.rows = [self.rows[i] for i in staying]


class _WholeBatch:
    """As `_CacheBatch`, without a cache: each token is computed from the whole row. Padding is on the right,
    where neither attention nor a recurrent state sees it."""

    def __init__(self, base: Base, rows: list[Row]):
        self._base, self.rows = base, rows
        self._tokens = [list(row.prompt) for row in rows]

    def step(self) -> list[Event]:
        base, rows = self._base, self.rows
        width = max(map(len, self._tokens))
        ids = torch.full((len(rows), width), base.pad_id)
        last = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, tokens in enumerate(self._tokens):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            last[i, len(tokens) - 1] = True
        # one that does not begin within the prompt never does
        starts = [row.active_from if row.active_from < len(row.prompt) else width for row in rows]
        route = base.lora.for_rows([row.adapter for row in rows], [width] * len(rows), starts)
        with only_positions(base.model, last.to(base.device)), base.lora.routed(route):
            logits = base.model(input_ids=ids.to(base.device), use_cache=False).logits[0]
        chosen, events, staying = _choose(base, rows, logits)
        for tokens, token in zip(self._tokens, chosen.tolist(), strict=True):
            tokens.append(token)
        self.keep(staying)
        return events

    def keep(self, staying: list[int]) -> None:
        """Let all other rows go."""
        self._tokens = [self._tokens[i] for i in staying]
        self.rows = [self.rows[i] for i in staying]
