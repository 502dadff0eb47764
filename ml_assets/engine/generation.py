"""Greedy (or sampled) generation for many prompts at once, on transformers' own models and caches.

Prompts are sorted by length, the prefix that a batch shares is computed once, finished rows leave the batch,
and every row stops at the end of its turn.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ml_assets.engine.forward import accepts
from ml_assets.engine.loading import Base

FinishReason = Literal["stop", "length"]

MIN_SHARED_PREFIX = 8
"""A shared prefix shorter than this costs more to split off than it saves."""


@dataclass(frozen=True)
class Completion:
    """One answer. `token_ids` are without the token that ended it; `seconds` is from the start of its batch
    to its last token."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    seconds: float


class DecodeBatch:
    """Decodes one batch token by token under the adapter that is active at construction and at every step.

    Args:
        prompts: token ids, at least one each, all within the context together with their new tokens.
        max_new_tokens: per row.
        temperature: per row or for all; 0 is greedy.
        top_p: per row or for all; only for rows with a temperature.
        seeds: per row; a sampled row draws from a generator of its own.
    """

    def __init__(
        self,
        base: Base,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        temperature: float | Sequence[float] = 0.0,
        top_p: float | Sequence[float] = 1.0,
        seeds: Sequence[int] | None = None,
    ):
        n = len(prompts)
        self._base = base
        self._remaining = list(max_new_tokens)
        self._temperature = [temperature] * n if isinstance(temperature, int | float) else list(temperature)
        self._top_p = [top_p] * n if isinstance(top_p, int | float) else list(top_p)
        self._generators = [
            torch.Generator().manual_seed(seeds[i]) if seeds is not None else torch.Generator()
            for i in range(n)
        ]
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty: expected at least one token")
            if len(prompt) + self._remaining[i] > base.context_length:
                raise ValueError(
                    f"prompt {i}: {len(prompt)} tokens and {self._remaining[i]} new ones exceed the context "
                    f"of {base.context_length}"
                )
        self._slots = list(range(n))  # batch position -> row
        self._finished: set[int] = set()
        self._cache: Any = None
        self._logits = self._prefill([list(p) for p in prompts])

    @property
    def done(self) -> bool:
        return len(self._finished) == len(self._remaining)

    def cancel(self, row: int) -> None:
        """Stop working for this row."""
        self._finished.add(row)

    def step(self) -> list[tuple[int, int | None, FinishReason | None]]:
        """One token for each unfinished row: (row, token, None), (row, token, "length") for the last that
        fits, or (row, None, "stop") when the model ended its turn."""
        events: list[tuple[int, int | None, FinishReason | None]] = []
        if self.done:
            return events
        greedy = self._logits.argmax(-1).tolist()
        fed: list[int] = []
        for position, row in enumerate(self._slots):
            token = greedy[position]
            if row not in self._finished:
                if self._temperature[row] > 0:
                    token = self._sample(self._logits[position], row)
                if token in self._base.chat.stop_ids:
                    events.append((row, None, "stop"))
                    self._finished.add(row)
                else:
                    self._remaining[row] -= 1
                    last = self._remaining[row] <= 0
                    events.append((row, token, "length" if last else None))
                    if last:
                        self._finished.add(row)
            fed.append(token)
        if not self.done:
            self._compact(fed)
            self._logits = self._forward(torch.tensor(fed, device=self._base.device)[:, None])
        return events

    # -- inside ----------------------------------------------------------------------------------------

    def _prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        shared = _shared_prefix(prompts) if len(prompts) > 1 else 0
        device = self._base.device
        if shared >= MIN_SHARED_PREFIX:
            self._mask = torch.ones(1, shared, dtype=torch.long, device=device)
            self._positions = torch.full((1,), 0, device=device)
            self._forward(torch.tensor([prompts[0][:shared]], device=device), extend=False)
            self._cache.batch_repeat_interleave(len(prompts))
        else:
            shared = 0
        rest = [prompt[shared:] for prompt in prompts]
        width = max(map(len, rest))
        ids = torch.full((len(rest), width), self._base.pad_id)
        mask = torch.zeros(len(rest), shared + width, dtype=torch.long)
        mask[:, :shared] = 1
        for i, tokens in enumerate(rest):  # padded on the left, so that every row's next token lines up
            ids[i, width - len(tokens) :] = torch.tensor(tokens)
            mask[i, shared + width - len(tokens) :] = 1
        self._mask = mask.to(device)
        self._positions = torch.full((len(rest),), shared, device=device)
        return self._forward(ids.to(device), extend=False)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, extend: bool = True) -> torch.Tensor:
        """Feed (B, T) tokens; returns the logits (B, V) at the last position."""
        width = ids.shape[1]
        if extend:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), width)], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        model = self._base.model
        kind = type(model)
        extra: dict[str, Any] = {}
        if accepts(kind, "position_ids"):
            extra["position_ids"] = positions
        if accepts(kind, "logits_to_keep"):
            extra["logits_to_keep"] = 1
        mask = None if bool(self._mask.all()) else self._mask
        out = model(input_ids=ids, attention_mask=mask, past_key_values=self._cache, use_cache=True, **extra)
        self._cache = out.past_key_values
        return out.logits[:, -1].float()

    def _compact(self, fed: list[int]) -> None:
        """Drop finished rows once they are a quarter of the batch: dropping copies the cache."""
        keep = [i for i, row in enumerate(self._slots) if row not in self._finished]
        if len(keep) > 0.75 * len(self._slots):
            return
        index = torch.tensor(keep, device=self._base.device)
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        self._slots = [self._slots[i] for i in keep]
        fed[:] = [fed[i] for i in keep]

    def _sample(self, logits: torch.Tensor, row: int) -> int:
        probabilities = torch.softmax(logits.cpu() / self._temperature[row], -1)
        if self._top_p[row] < 1:
            ordered, order = probabilities.sort(descending=True)
            outside = ordered.cumsum(-1) - ordered >= self._top_p[row]
            probabilities[order[outside]] = 0
        return int(torch.multinomial(probabilities, 1, generator=self._generators[row]))


def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_tokens: int = 8192,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Greedy answers to `prompts` (token ids), in their order, under the active adapter.

    `batch_tokens` bounds rows x (prompt + new tokens) of one batch. `on_progress(done, total)` is called
    after each batch.
    """
    results: list[Completion | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    done = 0
    while done < len(order):
        rows = max(1, batch_tokens // (len(prompts[order[done]]) + max_new_tokens))
        members = order[done : done + rows]
        answers = _generate_batch(base, [prompts[i] for i in members], max_new_tokens)
        for i, completion in zip(members, answers, strict=True):
            results[i] = completion
        done += len(members)
        if on_progress:
            on_progress(done, len(order))
    return [completion for completion in results if completion is not None]


def _generate_batch(base: Base, prompts: list[Sequence[int]], max_new_tokens: int) -> list[Completion]:
    start = time.perf_counter()
    tokens: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason] = ["length"] * len(prompts)
    seconds = [0.0] * len(prompts)
    batch = DecodeBatch(base, prompts, [max_new_tokens] * len(prompts))
    while not batch.done:
        for row, token, reason in batch.step():
            if token is not None:
                tokens[row].append(token)
            if reason is not None:
                reasons[row] = reason
                seconds[row] = time.perf_counter() - start
    return [
        Completion(ids, base.chat.decode(ids), reasons[i], len(prompts[i]), seconds[i])
        for i, ids in enumerate(tokens)
    ]


def _shared_prefix(prompts: list[list[int]]) -> int:
    """Length of the prefix that all prompts share, leaving each at least one token of its own."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    n = 0
    while n < limit and first[n] == last[n]:
        n += 1
    return n
