"""Training all weights of a model on text: plain PyTorch, the same on the same machine."""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from examples.base_revisions.text import conversations, documents
from ml_assets.engine import hardware
from ml_assets.engine.prompting import ChatFormat
from ml_assets.settings import Settings

LENGTH = 256
"""Tokens of a block; a step takes BLOCKS of them, MICRO at a time."""
BLOCKS, MICRO = 4, 2


@dataclass(frozen=True)
class Course:
    """How long and how hard: `rate` is the highest of the learning rates, after a warm-up of a tenth."""

    steps: int
    rate: float
    seed: int = 0
    chat: float = 0.3
    """Share of the tokens in conversations."""


def blocks(tokenizer: Any, count: int, chat: float, seed: int) -> list[list[int]]:
    """`count` blocks of LENGTH tokens: documents and conversations one after the other, each ended by the
    token that ends it for this model."""
    form = ChatFormat(tokenizer)
    end = tokenizer.eos_token_id

    def plain() -> Iterator[list[int]]:
        for text in documents(seed):
            yield [*tokenizer(text, add_special_tokens=False)["input_ids"], end]

    def talks() -> Iterator[list[int]]:
        for messages in conversations(seed):
            yield [*form.prompt_ids(messages[:-1]), *form.target_ids(messages[-1]["content"])]

    wanted = round(count * chat)
    found = [*itertools.islice(_cut(talks()), wanted), *itertools.islice(_cut(plain()), count - wanted)]
    random.Random(f"blocks {seed}").shuffle(found)
    return found


def _cut(pieces: Iterator[list[int]]) -> Iterator[list[int]]:
    rest: list[int] = []
    for piece in pieces:
        rest += piece
        while len(rest) >= LENGTH:
            yield rest[:LENGTH]
            rest = rest[LENGTH:]


def train(
    model: Any,
    tokenizer: Any,
    course: Course,
    settings: Settings,
    teacher: Any = None,
    log: Callable[[str], None] = lambda _: None,
) -> None:
    """Train every weight of `model` (float32) on the next token; with `teacher`, a model with the same
    tokenizer, on its distribution of the next token instead (Hinton et al. 2015, arXiv 1503.02531)."""
    torch.manual_seed(course.seed)
    data = blocks(tokenizer, course.steps * BLOCKS, course.chat, course.seed)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, course.steps // 10)
    began = time.monotonic()
    with hardware.computing(settings.home):
        for step in range(course.steps):
            done = max(0, step + 1 - warmup) / max(1, course.steps - warmup)
            for group in optimizer.param_groups:
                group["lr"] = course.rate * min((step + 1) / warmup, 1.05 - done)
            rows = data[step * BLOCKS : (step + 1) * BLOCKS]
            total = 0.0
            for at in range(0, BLOCKS, MICRO):
                loss = next_token_loss(model, rows[at : at + MICRO], settings, teacher) * MICRO / BLOCKS
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % 5 == 0 or step + 1 == course.steps:
                speed = (step + 1) * BLOCKS * LENGTH / (time.monotonic() - began)
                log(f"step {step + 1} of {course.steps}: loss {total:.3f}, {speed:.0f} tokens/s")
    model.eval().requires_grad_(False)


def next_token_loss(
    model: Any, rows: list[list[int]], settings: Settings, teacher: Any = None
) -> torch.Tensor:
    """Mean loss (nats) of predicting each token of rows of the same length from those before it."""
    ids = torch.tensor(rows, device=model.device)
    logits = _logits(model, ids, settings)
    if teacher is None:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    with torch.no_grad():
        wanted = _logits(teacher, ids, settings).log_softmax(-1)
    found = logits.log_softmax(-1)
    return torch.nn.functional.kl_div(
        found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean"
    )


def _logits(model: Any, ids: torch.Tensor, settings: Settings) -> torch.Tensor:
    dtype = hardware.compute_dtype(settings.home)
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return model(input_ids=ids, use_cache=False).logits[:, :-1].float()
