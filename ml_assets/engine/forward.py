"""Log-probabilities of given answers, with or without a gradient, for any causal language model.

Logits are computed where an answer's token is predicted and nowhere else, some positions at a time, so that
the vocabulary never decides how much memory a pass takes.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ml_assets.engine.lora import Route
from ml_assets.engine.packing import Packing, body, logits_of

if TYPE_CHECKING:
    from ml_assets.engine.loading import Base
    from ml_assets.engine.prompt_cache import PromptCache
    from ml_assets.engine.training import Soft

Softs = Sequence["Soft | None"]
Watch = Callable[[torch.Tensor], None]
Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of its answer, at least one each."""

MIN_SHARED_PREFIX = 8
"""A shared prefix shorter than this costs more to split off than it saves."""

LOGITS = 2**24
"""Logits computed at a time."""


def answer_log_probs(
    base: "Base",
    pairs: Sequence[Pair],
    loss_scale: float | None = None,
    prompts: "PromptCache | None" = None,
    soft: Softs | None = None,
    watch: Watch | None = None,
    states: Sequence[torch.Tensor | None] | None = None,
) -> list[torch.Tensor]:
    """Log-probability (nats, float32) of each token of each answer, under the active adapter.

    With `loss_scale`, the gradient of -loss_scale * (sum of all of them) is added to the parameters'. With
    `prompts`, what an activated adapter leaves to the base comes from there. `soft` are a teacher's
    probabilities for some of the answers: they change the gradient, not what is returned. `watch` is shown
    the logits of the answers' tokens, one after the other, some at a time. `states` are those that
    `frozen.FrozenLayers` kept, if of all pairs.
    """
    taught = _Taught.of(soft, pairs, base.device)
    if not base.packs:
        return _padded(base, pairs, loss_scale, taught, watch)
    packing, firsts, route = packed_pairs(base, pairs, prompts)
    known = [state for state in states or () if state is not None]
    if len(known) == len(pairs):
        first = known[0][: packing.prefix]
        packing.entering = torch.cat([first, *(state[packing.prefix :] for state in known)])[None]
    with base.lora.routed(route):
        answers = [answer for _, answer in pairs]
        return packed_log_probs(base, packing, firsts, answers, loss_scale, taught, watch)


def packed_pairs(
    base: "Base", pairs: Sequence[Pair], prompts: "PromptCache | None" = None
) -> tuple[Packing, list[int], Route]:
    """A pass over prompts and answers: its packing, the token at which the first token of each answer is
    predicted, and where the active adapter works. With `prompts`, from the adapter's invocation on."""
    if prompts is not None:
        (name,) = base.lora.route.names
        invocation = base.lora.adapters[name].invocation or []
        heads = [prompt[: len(prompt) - len(invocation)] for prompt, _ in pairs]
        sequences = [[*invocation, *answer[:-1]] for _, answer in pairs]
        packing = Packing(sequences, base.device, past=prompts.past(heads))
        return packing, [start + len(invocation) - 1 for start in packing.starts], base.lora.route
    prefix = shared_prefix([prompt for prompt, _ in pairs]) if not base.random else 0
    starts = _invocations(base, pairs)
    if starts is not None:
        prefix = min(prefix, *starts)
    sequences = [[*prompt[prefix:], *answer[:-1]] for prompt, answer in pairs]
    packing = Packing(sequences, base.device, prefix=pairs[0][0][:prefix])
    firsts = [start + len(p) - prefix - 1 for start, (p, _) in zip(packing.starts, pairs, strict=True)]
    route = base.lora.route
    if starts is not None:
        names = [None, *route.names * len(pairs)]
        route = base.lora.for_rows(names, [prefix, *packing.lengths], [0, *(s - prefix for s in starts)])
    return packing, firsts, route


def _invocations(base: "Base", pairs: Sequence[Pair]) -> list[int] | None:
    """The token from which the active adapter works, for each prompt; None if it does on all of them."""
    route = base.lora.route
    if route.training or not route.names or base.lora.adapters[route.names[0]].invocation is None:
        return None
    return [base.active_from(route.names[0], prompt) for prompt, _ in pairs]


def packed_log_probs(
    base: "Base",
    packing: Packing,
    firsts: Sequence[int],
    answers: Sequence[Sequence[int]],
    loss_scale: float | None = None,
    taught: "_Taught | None" = None,
    watch: Watch | None = None,
) -> list[torch.Tensor]:
    """As `answer_log_probs`; the first token of answer i is predicted at token `firsts[i]` of the packing."""
    positions = [
        p for first, answer in zip(firsts, answers, strict=True) for p in range(first, first + len(answer))
    ]
    wanted = torch.tensor([token for answer in answers for token in answer], device=base.device)
    with packing.applied():
        hidden = body(base.model)(
            input_ids=packing.input_ids, position_ids=packing.position_ids, use_cache=False
        ).last_hidden_state[0]
        chosen = hidden[torch.tensor(positions, device=base.device)]
        leaf = chosen.detach().requires_grad_(loss_scale is not None)
        values = torch.cat(
            [
                _chunk(base, leaf[part], wanted[part], loss_scale, taught, part, watch)
                for part in _chunks(base, wanted)
            ]
        )
        if loss_scale is not None:
            chosen.backward(leaf.grad)
    return list(values.split([len(answer) for answer in answers]))


@dataclass(frozen=True)
class _Taught:
    """A teacher's most probable tokens (N, k), their probabilities (N, k), and its weight (N) in the loss at
    each of N target tokens; 0 where there is no teacher."""

    tokens: torch.Tensor
    shares: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, soft: Softs | None, pairs: Sequence[Pair], device: torch.device) -> "_Taught | None":
        width = max((len(s.tokens[0]) for s in soft or () if s is not None), default=0)
        if soft is None or not width:
            return None
        count = sum(len(answer) for _, answer in pairs)
        tokens = torch.zeros(count, width, dtype=torch.long)
        shares, weights = torch.zeros(count, width), torch.zeros(count)
        at = 0
        for one, (_, answer) in zip(soft, pairs, strict=True):
            if one is not None:
                here = slice(at, at + len(answer))
                tokens[here, : len(one.tokens[0])] = torch.tensor(one.tokens)
                shares[here, : len(one.shares[0])] = torch.tensor(one.shares)
                weights[here] = one.weight
            at += len(answer)
        return cls(tokens.to(device), shares.to(device), weights.to(device))

    def loss(self, log_probs: torch.Tensor, hard: torch.Tensor, part: slice) -> torch.Tensor:
        """Of each target token: the answer's and the teacher's, by weight. What the teacher thinks of all
        tokens but its most probable ones is left out, and `shares` are taken as the whole."""
        shares = self.shares[part]
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-9)
        taught = -(shares * log_probs.gather(-1, self.tokens[part])).sum(-1)
        weights = self.weights[part]
        return (1 - weights) * hard + weights * taught


def _chunks(base: "Base", wanted: torch.Tensor) -> Iterator[slice]:
    rows = max(1, LOGITS // base.vocabulary)
    for start in range(0, len(wanted), rows):
        yield slice(start, start + rows)


def _chunk(
    base: "Base",
    hidden: torch.Tensor,
    wanted: torch.Tensor,
    loss_scale: float | None,
    taught: _Taught | None,
    part: slice,
    watch: Watch | None,
) -> torch.Tensor:
    logits = logits_of(base.model, hidden).float()
    if watch:
        watch(logits)
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    if loss_scale is not None:
        aim = taught.loss(logits.log_softmax(-1), losses, part) if taught else losses
        (aim.sum() * loss_scale).backward()
    return -losses.detach()


def shared_prefix(prompts: Sequence[Any]) -> int:
    """Length of the prefix that several prompts share, leaving each at least one token of its own; 0 where
    splitting it off does not pay."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(list, prompts)), max(map(list, prompts))
    limit = min(map(len, prompts)) - 1
    n = 0
    while n < limit and first[n] == last[n]:
        n += 1
    return n if n >= MIN_SHARED_PREFIX else 0


# -- models that can't pack ----------------------------------------------------------------------------


def _padded(
    base: "Base", pairs: Sequence[Pair], loss_scale: float | None, taught: _Taught | None, watch: Watch | None
) -> list[torch.Tensor]:
    """(B, T) tokens padded on the right: causal attention keeps padding out of sight."""
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), width), base.pad_id)
    mask = torch.zeros(len(pairs), width, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(pairs):
        ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        mask[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
    wanted = torch.tensor([token for _, answer in pairs for token in answer], device=base.device)
    starts, route = _invocations(base, pairs), base.lora.route
    if starts is not None:
        route = base.lora.for_rows(route.names * len(pairs), [width] * len(pairs), starts)
    with only_positions(base.model, mask.to(base.device)), base.lora.routed(route):
        logits = base.model(input_ids=ids.to(base.device), use_cache=False).logits[0]
    logits = logits.float()
    if watch:
        watch(logits)
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    if loss_scale is not None:
        everywhere = slice(0, len(wanted))
        aim = taught.loss(logits.log_softmax(-1), losses, everywhere) if taught else losses
        (aim.sum() * loss_scale).backward()
    return list((-losses.detach()).split([len(answer) for _, answer in pairs]))


def output_head(model: torch.nn.Module) -> torch.nn.Module:
    """The module that turns hidden states into logits. Raises TypeError when the model names none."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise TypeError(f"{type(model).__name__} names no output embeddings: not a causal language model?")
    return head


@contextlib.contextmanager
def only_positions(model: torch.nn.Module, mask: torch.Tensor) -> Iterator[None]:
    """Inside, a forward pass over (B, T) tokens gives logits of shape (1, N, V) for the N positions where
    `mask` (B, T, bool) is set, in row-major order.

    The output head sees those hidden states alone, so what a model does behind its head (scaling, capping)
    still happens, and the (B, T, V) tensor is never made.
    """

    def select(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][mask][None], *args[1:])

    handle = output_head(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@lru_cache(maxsize=64)
def accepts(model_class: type, argument: str) -> bool:
    """Whether the model's forward takes this argument by name."""
    return argument in inspect.signature(model_class.forward).parameters
