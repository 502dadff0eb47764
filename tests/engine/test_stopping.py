"""Trainings that stop on rows of their own, and those with a teacher."""

import math
from pathlib import Path

import pytest
import torch
from bases import tiny_base
from test_training import examples, gradients, recipe, targets, with_lora

from ml_assets.artifacts import sha256_file
from ml_assets.engine import training
from ml_assets.engine.forward import answer_log_probs
from ml_assets.engine.scoring import answer_losses, top_tokens
from ml_assets.engine.training import Example, Soft, Stopping, step_loss, train_lora


def final_loss(base, folder: Path, rows: list[Example]) -> float:
    from ml_assets.engine.lora import read_adapter

    base.lora.add("found", read_adapter(base.model, folder, base.model.dtype, base.device))
    try:
        with base.active("found"):
            losses = answer_losses(base, [(row.prompt, row.target) for row in rows])
    finally:
        base.lora.remove("found")
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", ["lora", "activated_lora"])
def test_it_gives_the_weights_that_were_best_on_the_rows_held_out(tmp_path: Path, kind: str) -> None:
    base = tiny_base("llama", tmp_path / "base", torch.float32)
    rows = examples(base, 24)
    held = rows[16:]
    # answers that contradict: what is learned on the rows makes these worse, sooner or later
    held = [Example(row.prompt, rows[i].target, row.row) for i, row in enumerate(held)]
    stopping = Stopping(held, checks=8, patience=2)
    result = train_lora(
        base,
        rows[:16],
        recipe(steps=60, learning_rate=3e-2, kind=kind),
        targets(base),
        tmp_path / "out",
        stopping=stopping,
    )
    losses = dict(result.validation)
    assert result.best_step == min(losses, key=lambda step: (losses[step], step))
    assert final_loss(base, tmp_path / "out", held) == pytest.approx(losses[result.best_step or 0], rel=1e-3)
    later = [step for step in losses if step > (result.best_step or 0)]
    assert result.steps == max(losses) and (len(later) >= 2 or result.steps == 60)
    assert len(result.losses) == result.steps
    assert not base.model.training and not base.lora.adapters


def test_a_start_that_nothing_improves_stays_as_it_is(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path / "base", torch.float32)
    rows = examples(base)
    train_lora(base, rows, recipe(steps=40), targets(base), tmp_path / "start")
    wild = recipe(steps=6, learning_rate=5.0)
    result = train_lora(
        base,
        rows,
        wild,
        targets(base),
        tmp_path / "out",
        start=tmp_path / "start",
        stopping=Stopping(rows, checks=6, patience=1),
    )
    assert result.best_step == 0 and result.steps == 1
    assert sha256_file(tmp_path / "out/adapter_model.safetensors") == sha256_file(
        tmp_path / "start/adapter_model.safetensors"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_at_every_step_gives_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny_base("qwen2", tmp_path / "base", dtype)
    rows = examples(base)
    stopping, plan = Stopping(rows[8:], checks=3, patience=2), recipe(dropout=0.1)
    whole = train_lora(base, rows[:8], plan, targets(base), tmp_path / "whole", stopping=stopping)

    class Stop(Exception):
        pass

    for stop in range(1, whole.steps):

        def interrupt(progress: training.Progress, stop: int = stop) -> None:
            if progress.step == stop + 1:
                raise Stop

        folder, out = tmp_path / f"checkpoints-{stop}", tmp_path / f"resumed-{stop}"

        options = {"checkpoints": folder, "checkpoint_seconds": 0, "stopping": stopping}
        with pytest.raises(Stop):
            train_lora(base, rows[:8], plan, targets(base), out, on_progress=interrupt, **options)
        resumed = train_lora(base, rows[:8], plan, targets(base), out, **options)
        assert resumed.resumed_from == stop
        assert (resumed.validation, resumed.best_step) == (whole.validation, whole.best_step)
        assert sha256_file(out / "adapter_model.safetensors") == sha256_file(
            tmp_path / "whole/adapter_model.safetensors"
        )


def test_a_teacher_with_more_tokens_than_the_student(tmp_path: Path) -> None:
    """Bases of one tokenizer differ in how far their vocabulary is padded."""
    base = tiny_base("llama", tmp_path / "student", torch.float32)
    teacher = tiny_base("llama", tmp_path / "teacher", torch.float32, seed=1)
    teacher.model.resize_token_embeddings(base.vocabulary + 300, mean_resizing=False)
    rows = examples(base, 3)
    pairs = [(row.prompt, row.target) for row in rows]
    found = top_tokens(teacher, pairs, 8, vocabulary=base.vocabulary)
    assert all(token < base.vocabulary for tokens, _ in found for row in tokens for token in row)
    taught = [Example(r.prompt, r.target, r.row, Soft(*f, 0.5)) for r, f in zip(rows, found, strict=True)]
    with with_lora(base):
        assert math.isfinite(step_loss(base, taught))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("packs", [True, False])
def test_a_teachers_loss_is_the_cross_entropy_to_its_probabilities(
    tmp_path: Path, architecture: str, packs: bool
) -> None:
    base = tiny_base(architecture, tmp_path / "base", torch.float32)
    base.packs = packs and base.packs
    rows = examples(base, 5)
    pairs = [(row.prompt, row.target) for row in rows]
    tops = top_tokens(base, pairs, 4)
    logits: list[torch.Tensor] = []
    with torch.no_grad():
        answer_log_probs(base, pairs, watch=lambda part: logits.append(part.clone()))
    everything = torch.cat(logits).softmax(-1)
    at = 0
    for (tokens, shares), (_, answer) in zip(tops, pairs, strict=True):
        for found, probabilities, row in zip(tokens, shares, everything[at : at + len(answer)], strict=True):
            assert torch.allclose(torch.tensor(probabilities), row.topk(4)[0], atol=1e-3)
            assert set(found) == set(row.topk(4)[1].tolist())
        at += len(answer)

    # one token with probability 1: the ordinary loss of an answer of those tokens
    sure = [Soft([[t] for t in row.target], [[1.0]] * len(row.target), 1.0) for row in rows]
    taught = [Example(row.prompt, row.target, row.row, soft) for row, soft in zip(rows, sure, strict=True)]
    half = [
        Example(row.prompt, row.target, row.row, Soft(*tops[i], 0.5) if i % 2 else None)
        for i, row in enumerate(rows)
    ]
    with with_lora(base) as weights:
        plain_loss = step_loss(base, rows)
        plain = gradients(weights)
        taught_loss = step_loss(base, taught)
        same = gradients(weights)
        mixed_loss = step_loss(base, half)
        mixed = gradients(weights)
        expected = torch.zeros(())
        pieces: list[torch.Tensor] = []
        total = sum(len(row.target) for row in rows)
        for i, row in enumerate(rows):
            ids = torch.tensor([[*row.prompt, *row.target[:-1]]])
            log_probs = (
                base.model(ids, use_cache=False).logits[0, len(row.prompt) - 1 :].float().log_softmax(-1)
            )
            hard = -log_probs.gather(-1, torch.tensor(row.target)[:, None])[:, 0]
            if i % 2:
                shares = torch.tensor(tops[i][1])
                shares = shares / shares.sum(-1, keepdim=True)
                soft = -(shares * log_probs.gather(-1, torch.tensor(tops[i][0]))).sum(-1)
                hard = 0.5 * hard + 0.5 * soft
            pieces.append(hard.sum())
        expected = torch.stack(pieces).sum() / total
        expected.backward()
        wanted = gradients(weights)
    assert taught_loss == pytest.approx(plain_loss, rel=1e-5) == pytest.approx(mixed_loss, rel=1e-5)
    for key in plain:
        assert torch.allclose(plain[key], same[key], atol=1e-6)
        scale = wanted[key].norm().clamp(min=1e-6)
        assert float((mixed[key] - wanted[key]).norm() / scale) < 1e-2, key
