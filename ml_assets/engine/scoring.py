"""Log-probabilities of given answers and texts: fingerprints, forgetting probes, label scores."""

from collections.abc import Sequence

import torch

from ml_assets.engine.forward import answer_log_probs
from ml_assets.engine.loading import Base


def mean_logprobs(
    base: Base, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int = 4096
) -> list[float]:
    """Mean log-probability (nats per token) of each answer given its prompt, under the active adapter.

    `pairs` are (prompt ids, answer ids), each with at least one token. A row's value does not depend on the
    rows beside it beyond rounding.
    """
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    results = [0.0] * len(pairs)
    batch: list[int] = []
    for position, i in enumerate(order):
        batch.append(i)
        following = order[position + 1] if position + 1 < len(order) else None
        width = len(pairs[following][0]) + len(pairs[following][1]) if following is not None else 0
        if following is None or width * (len(batch) + 1) > batch_tokens:
            with torch.inference_mode():
                values = answer_log_probs(base, [pairs[j] for j in batch])
            for j, value in zip(batch, values, strict=True):
                results[j] = float(value.double().mean())
            batch = []
    return results


def text_nll(base: Base, texts: Sequence[str]) -> float:
    """Negative log-likelihood of plain texts, nats per token, under the active adapter."""
    total, count = 0.0, 0
    for text in texts:
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"][: base.context_length]
        if len(ids) < 2:
            raise ValueError(f"expected a text of at least two tokens, found {text!r}")
        total -= mean_logprobs(base, [(ids[:1], ids[1:])])[0] * (len(ids) - 1)
        count += len(ids) - 1
    return total / count
