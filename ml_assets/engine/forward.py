"""Forward passes that compute logits only where they are needed, for any causal language model."""

import contextlib
import inspect
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch


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


def completion_log_probs(
    model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each labelled token.

    Args:
        input_ids: (B, T) tokens, padded on the right; causal attention keeps padding out of sight.
        labels: (B, T), the token at each position that counts, -100 elsewhere (position 0 never counts).

    Returns:
        (N,) log-probabilities in nats, float32, and (N,) the row of each.
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    with only_positions(model, mask):
        logits = model(input_ids=input_ids, use_cache=False).logits[0]
    wanted = labels[:, 1:][mask[:, :-1]]
    values = -torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    return values, mask.nonzero()[:, 0]


def right_padded(
    sequences: list[tuple[list[int], list[int]]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, answer) token pairs as `input_ids` and `labels` (B, T) for `completion_log_probs`."""
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    input_ids = torch.full((len(sequences), width), pad)
    labels = torch.full((len(sequences), width), -100)
    for i, (prompt, answer) in enumerate(sequences):
        row = torch.tensor(prompt + answer)
        input_ids[i, : len(row)] = row
        labels[i, len(prompt) : len(row)] = row[len(prompt) :]
    return input_ids.to(device), labels.to(device)


@lru_cache(maxsize=64)
def accepts(model_class: type, argument: str) -> bool:
    """Whether the model's forward takes this argument by name."""
    return argument in inspect.signature(model_class.forward).parameters
