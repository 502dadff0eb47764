"""Batched generation gives what `generate` gives one by one, for every architecture, in float32."""

from pathlib import Path

import pytest
import torch
from bases import tiny_base
from tiny_models import ARCHITECTURES

from ml_assets.engine.generation import DecodeBatch, generate
from ml_assets.engine.loading import Base
from ml_assets.engine.scoring import mean_logprobs, text_nll

TEXTS = [
    "turn on the light",
    "kitchen",
    "what is the temperature in the living room? " * 4,
    "a",
    "close the window",
]


def prompts(base: Base, system: str | None = None) -> list[list[int]]:
    start = [{"role": "system", "content": system}] if system else []
    return [base.chat.prompt_ids([*start, {"role": "user", "content": text}]) for text in TEXTS]


def one_by_one(base: Base, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = base.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=sorted(base.chat.stop_ids),
        pad_token_id=base.pad_id,
    )[0, len(prompt) :].tolist()
    return [t for t in out if t not in base.chat.stop_ids]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("system", [None, "classify the topic of the text. business sport politics"])
def test_equals_one_by_one(architecture: str, system: str | None, tmp_path: Path) -> None:
    base = tiny_base(architecture, tmp_path)
    # sharper than random weights, so that no two tokens are as good as tied
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.mul_(1.7)
    asked = prompts(base, system)
    answers = generate(base, asked, 12, batch_tokens=400)
    assert [a.token_ids for a in answers] == [one_by_one(base, p, 12) for p in asked]
    assert [a.prompt_tokens for a in answers] == [len(p) for p in asked]
    assert [a.token_ids for a in generate(base, asked, 12)] == [a.token_ids for a in answers]


def test_stops_at_the_end_of_the_turn_and_rows_leave_the_batch(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path)
    asked = prompts(base)
    free = generate(base, asked, 10)
    # declare one row's third token a stop: it must end there, the others go on as before
    stop = free[0].token_ids[2]
    base.chat.stop_ids = frozenset({stop})
    for before, after in zip(free, generate(base, asked, 10), strict=True):
        expected = before.token_ids
        if stop in expected:
            expected = expected[: expected.index(stop)]
            assert after.finish_reason == "stop"
        else:
            assert after.finish_reason == "length"
        assert after.token_ids == expected


def test_each_row_has_its_own_limit_and_can_be_cancelled(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path)
    base.chat.stop_ids = frozenset()
    batch = DecodeBatch(base, prompts(base)[:3], [2, 5, 9])
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    steps = 0
    while not batch.done:
        for row, token, _ in batch.step():
            assert token is not None
            tokens[row].append(token)
        steps += 1
        if steps == 3:
            batch.cancel(2)
    assert [len(t) for t in tokens.values()] == [2, 5, 3]


def test_sampling_follows_its_seed(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path)
    base.chat.stop_ids = frozenset()

    def sample(seeds: list[int], temperature: float = 1.0, top_p: float = 1.0) -> list[list[int]]:
        batch = DecodeBatch(
            base, [prompts(base)[0]] * len(seeds), [8] * len(seeds), temperature, top_p, seeds
        )
        rows: list[list[int]] = [[] for _ in seeds]
        while not batch.done:
            for row, token, _ in batch.step():
                rows[row].append(token or 0)
        return rows

    a, b, c = sample([1, 2, 1])
    assert a == c and a != b
    assert sample([3], top_p=1e-9) == sample([4], temperature=0)


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path)
    with pytest.raises(ValueError, match="exceed the context of 512"):
        generate(base, [[5] * 510], 10)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        DecodeBatch(base, [[5], []], [1, 1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_full_logits(architecture: str, tmp_path: Path) -> None:
    base = tiny_base(architecture, tmp_path)
    pairs = [
        (p, base.chat.target_ids(t)) for p, t in zip(prompts(base), ["kitchen", "a b c"] * 3, strict=False)
    ]
    for (prompt, target), value in zip(pairs, mean_logprobs(base, pairs, batch_tokens=200), strict=True):
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([prompt + target])).logits[0].float().log_softmax(-1)
        expected = sum(float(logits[len(prompt) - 1 + i, t]) for i, t in enumerate(target)) / len(target)
        assert value == pytest.approx(expected, abs=1e-4)
    assert text_nll(base, ["the minister said the vote would be held"]) == pytest.approx(6, abs=1.5)


def test_plain_template_without_chat_template(tmp_path: Path) -> None:
    base = tiny_base("gpt2", tmp_path, chat_template=False)
    assert base.chat.plain
    text = base.tokenizer.decode(base.chat.prompt_ids([{"role": "user", "content": "kitchen"}]))
    assert text.endswith("User:\nkitchen\n\nAssistant:\n")
    assert base.chat.target_ids("a")[-1] == base.tokenizer.eos_token_id
