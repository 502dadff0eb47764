"""The training loop computes what transformers and peft do, gives the same bytes, and resumes exactly."""

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bases import tiny_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES

from ml_assets.artifacts import sha256_file
from ml_assets.engine import forward, training
from ml_assets.engine.forward import shared_prefix
from ml_assets.engine.loading import Base, IncompatibleAdapter
from ml_assets.engine.lora import place, target_modules
from ml_assets.engine.prompt_cache import PromptCache
from ml_assets.engine.training import (
    BadExample,
    Example,
    TrainResult,
    learning_rate,
    lora_for_training,
    plan_batches,
    save_adapter,
    step_loss,
    train_lora,
)
from ml_assets.spec import AdapterRecipe

WORDS = ["kitchen", "light", "turn on", "bedroom", "lamp", "window", "temperature", "news", "shares"]


def examples(base: Base, n: int = 12, system: str | None = None) -> list[Example]:
    rows = []
    start = [{"role": "system", "content": system}] if system else []
    for i, words in zip(range(n), itertools.cycle(itertools.permutations(WORDS, 3)), strict=False):
        text = " ".join(words[: 1 + i % 3])
        prompt = base.chat.prompt_ids([*start, {"role": "user", "content": text}])
        rows.append(Example(prompt, base.chat.target_ids(words[0]), row=str(i)))
    return rows


def recipe(**changes) -> AdapterRecipe:
    return AdapterRecipe(
        **{"rank": 4, "alpha": 8, "steps": 6, "batch_tokens": 128, "learning_rate": 1e-2} | changes
    )


def targets(base: Base) -> list[str]:
    return base.manifest["lora_targets"]["all-linear"]


@contextlib.contextmanager
def with_lora(base: Base, **changes) -> Iterator[dict[str, torch.Tensor]]:
    with lora_for_training(base, recipe(**changes), targets(base)) as adapter:
        for _, b in adapter.weights.values():  # zero at the start, which would leave A without a gradient
            torch.nn.init.normal_(b.detach(), std=0.05)
        without_dropout(base)
        yield adapter.named_tensors()


def gradients(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients, taken away."""
    found = {}
    for key, tensor in weights.items():
        assert tensor.grad is not None, key
        found[key], tensor.grad = tensor.grad, None
    return found


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared prefix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_equal_padded_peft(architecture: str, shared: bool, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_base(architecture, tmp_path / "base")
    rows = examples(base, system="answer with one word, the first" if shared else None)
    assert base.packs
    assert (shared_prefix([row.prompt for row in rows]) >= 8) == shared
    with with_lora(base) as weights:
        loss = step_loss(base, rows)
        ours = gradients(weights)
        save_adapter(base, base.lora.adapters["default"], targets(base), tmp_path / "adapter")

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), base.pad_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, row in enumerate(rows):  # plain padding, peft's layers and transformers' own loss
        ids[i, : len(row)] = torch.tensor(row.prompt + row.target)
        labels[i, len(row.prompt) : len(row)] = torch.tensor(row.target)
        mask[i, : len(row)] = 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True).eval()
    reference = peft(input_ids=ids, attention_mask=mask, labels=labels).loss
    reference.backward()
    theirs = {k.replace(".default.", "."): p.grad for k, p in peft.named_parameters() if "lora_" in k}

    assert loss == pytest.approx(reference.item(), abs=1e-4)
    assert theirs.keys() == ours.keys()
    for key, gradient in theirs.items():
        scale = float(gradient.abs().max())
        assert scale > 0, key
        assert float((ours[key] - gradient).abs().max()) < 1e-4 * scale, key


@pytest.mark.parametrize(
    ("memory", "disk"), [(2**30, 0), (0, 2**30), (0, 0)], ids=["in memory", "on disk", "not kept"]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activated_lora_equals_peft(architecture: str, memory: int, disk: int, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_base(architecture, tmp_path / "base")
    rows = examples(base)
    heads = [row.prompt[: -len(base.chat.invocation_ids())] for row in rows]
    prompts = PromptCache(base, heads, tmp_path / "cache", memory, disk)
    assert prompts.kept == (memory + disk > 0)
    with with_lora(base, kind="activated_lora") as weights:
        assert step_loss(base, rows, prompts) == step_loss(base, rows, prompts)  # the second from the cache
        gradients(weights)
        again = PromptCache(base, heads, tmp_path / "cache", memory, disk)  # as another process would
        loss = step_loss(base, rows, again)
        ours = gradients(weights)
        save_adapter(base, base.lora.adapters["default"], targets(base), tmp_path / "adapter")
    assert bool(list((tmp_path / "cache").rglob("*.kv"))) == (disk > 0)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True).eval()
    total, reference = sum(len(row.target) for row in rows), 0.0
    for row in rows:
        ids = torch.tensor([row.prompt + row.target])
        labels = ids.clone()
        labels[0, : len(row.prompt)] = -100
        part = peft(input_ids=ids, labels=labels).loss * len(row.target) / total
        part.backward()
        reference += part.item()
    theirs = {k.replace(".default.", "."): p.grad for k, p in peft.named_parameters() if "lora_" in k}
    assert loss == pytest.approx(reference, abs=1e-4)
    for key, gradient in theirs.items():
        scale = float(gradient.abs().max())
        assert scale > 0, key
        assert float((ours[key] - gradient).abs().max()) < 1e-4 * scale, key


def test_kept_prompts_are_the_same_bytes_and_damage_is_noticed(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path / "base")
    prompts = [row.prompt for row in examples(base, 60, system="answer with one word")]

    def values(cache: PromptCache, asked: list[list[int]]) -> bytes:
        past = cache.past(asked)
        assert past.lengths == [len(prompt) for prompt in asked]
        return b"".join(x.numpy().tobytes() for pair in past.values.values() for x in pair)

    folder = tmp_path / "kept"
    fresh = values(PromptCache(base, prompts), prompts)
    assert values(PromptCache(base, prompts, folder, 0), prompts) == fresh
    files = sorted(folder.glob("*.kv"))
    before = {path: path.read_bytes() for path in files}
    assert values(PromptCache(base, prompts[::-1], folder, 0), prompts) == fresh
    for path in files:
        path.write_bytes(path.read_bytes()[:-1] if path == files[0] else b"\0" * path.stat().st_size)
    assert values(PromptCache(base, prompts, folder, 0), prompts) == fresh
    assert {path: path.read_bytes() for path in files} == before

    size = sum(map(len, before.values()))
    other = [row.prompt for row in examples(base, 60, system="say what it is")]
    values(PromptCache(base, other, folder, 0, int(1.5 * size)), other)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1.5 * size
    assert not PromptCache(base, other, folder, 0, 10).kept


@pytest.mark.parametrize("kind", ["lora", "activated_lora"])
def test_workers_share_a_step(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama", tmp_path / "base")
    rows = examples(base, 24)
    threads = torch.get_num_threads()
    results = {}
    for cores in (1, 2, 3):
        torch.set_num_threads(cores)
        seen: set[int] = set()
        embeddings = base.model.get_input_embeddings()
        handle = embeddings.register_forward_pre_hook(lambda *_, seen=seen: seen.add(threading.get_ident()))
        try:
            out = tmp_path / str(cores)
            plan = recipe(kind=kind, batch_tokens=400)
            results[cores] = train_lora(base, rows, plan, targets(base), out, prompt_cache=tmp_path / "p")
            train_lora(base, rows, plan, targets(base), tmp_path / f"{cores} again")
            assert torch.get_num_threads() == cores
        finally:
            handle.remove()
            torch.set_num_threads(threads)
        files = [folder / "adapter_model.safetensors" for folder in (out, tmp_path / f"{cores} again")]
        assert files[0].read_bytes() == files[1].read_bytes() and len(seen) >= cores
        assert not base.lora.adapters
    for cores in (2, 3):
        assert results[cores].losses == pytest.approx(results[1].losses, abs=1e-4)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_last_layers_change(architecture: str, cores: int, tmp_path: Path) -> None:
    base = tiny_base(architecture, tmp_path / "base")
    rows, plan, threads = examples(base, 24), recipe(steps=2, batch_tokens=400), torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        train_lora(base, rows, plan, targets(base), tmp_path / "start")
        weights = {}
        for share in (1.0, 0.5, 0.01):
            out = tmp_path / str(share)
            start = tmp_path / "start"
            train_lora(base, rows, plan, targets(base), out, start=start, last_layers=share)
            weights[share] = load_file(out / "adapter_model.safetensors")
    finally:
        torch.set_num_threads(threads)
    before = load_file(tmp_path / "start" / "adapter_model.safetensors")
    changed = {
        share: {place(name)[1] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        for share, after in weights.items()
    }
    assert changed == {1.0: {0, 1}, 0.5: {1}, 0.01: {1}}  # of two layers


def test_a_part_of_the_way_from_where_it_began(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path / "base")
    rows, plan, start = examples(base, 24), recipe(steps=3), tmp_path / "start"
    train_lora(base, rows, plan, targets(base), start)
    for weight in (1.0, 0.75):
        train_lora(base, rows, plan, targets(base), tmp_path / str(weight), start=start, weight=weight)
    before, whole, part = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("start", "1.0", "0.75")
    )
    for name, tensor in part.items():
        assert not torch.equal(tensor, whole[name])
        torch.testing.assert_close(tensor, 0.25 * before[name] + 0.75 * whole[name])


def without_dropout(base: Base) -> Base:
    base.model.apply(lambda module: setattr(module, "p", 0) if isinstance(module, torch.nn.Dropout) else None)
    base.model.config.attention_dropout = 0.0
    base.draws = False
    return base


def update_twice(
    base: Base, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str = "lora"
) -> tuple[list[TrainResult], list[int]]:
    """The last layer trained from some start with and without kept states; how often the first computed."""
    rows = examples(base, 24, "answer with one word")
    train_lora(base, rows, recipe(kind=kind), targets(base), folder / "start")
    inside = base.model.get_submodule(target_modules(base.model, targets(base))[0])
    results, counts = [], []
    for budget in (2**30, 0):
        monkeypatch.setattr(training, "KEPT_BYTES", budget)
        computed: list[int] = []
        handle = inside.register_forward_hook(lambda *_, seen=computed: seen.append(1))
        plan, out = recipe(epochs=4, steps=None, kind=kind), folder / str(budget)
        results.append(
            train_lora(base, rows, plan, targets(base), out, start=folder / "start", last_layers=0.5)
        )
        handle.remove()
        counts.append(len(computed))
    return results, counts


@pytest.mark.parametrize("kind", ["lora", "activated_lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_that_are_not_trained_are_computed_once(
    architecture: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = without_dropout(tiny_base(architecture, tmp_path / "base"))
    (kept, anew), counts = update_twice(base, tmp_path, monkeypatch, kind)
    assert len(kept.losses) > 10 and counts[1] - counts[0] >= len(kept.losses) - 3
    assert kept.losses == pytest.approx(anew.losses, abs=1e-5)
    saved = [load_file(tmp_path / str(budget) / "adapter_model.safetensors") for budget in (2**30, 0)]
    for name, tensor in saved[0].items():
        torch.testing.assert_close(tensor, saved[1][name], atol=1e-4, rtol=1e-3)
    whole = train_lora(base, examples(base), recipe(kind=kind), targets(base), tmp_path / "after")
    assert whole.losses == train_lora(base, examples(base), recipe(kind=kind), targets(base), tmp_path).losses


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_kept_states_go_with_gradient_checkpoints(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = without_dropout(tiny_base(architecture, tmp_path / "base"))
    monkeypatch.setattr(training, "MICRO_BATCH_TOKENS", 20)  # every example is longer
    (kept, anew), counts = update_twice(base, tmp_path, monkeypatch)
    assert counts[1] > 2 * counts[0]
    assert kept.losses == pytest.approx(anew.losses, abs=1e-5)


def test_layers_that_hand_on_more_than_hidden_states_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("llama", tmp_path / "base")
    first, second = base.model.model.layers
    known: dict[int, torch.Tensor] = {}
    first.mlp.register_forward_hook(lambda m, args, out: known.update({threading.get_ident(): args[0]}))
    second.mlp.register_forward_hook(lambda m, args, out: out + known[threading.get_ident()])
    (kept, anew), counts = update_twice(base, tmp_path, monkeypatch)
    assert counts[0] == counts[1] > len(kept.losses)
    assert kept.losses == anew.losses


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_neither_micro_batches_nor_checkpoints_nor_padding_change_the_gradient(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(architecture, tmp_path)
    rows = examples(base)
    longest = max(map(len, rows))
    with with_lora(base) as weights:
        step_loss(base, rows)
        whole = gradients(weights)
        passes = []
        embeddings = base.model.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
        for budget in (
            2 * longest,
            longest - 1,
        ):  # several examples at a time; one, with gradient checkpoints
            monkeypatch.setattr(training, "MICRO_BATCH_TOKENS", budget)
            passes.clear()
            step_loss(base, rows)
            assert len(passes) > 1 and max(passes) <= max(budget, longest)
            for key, gradient in gradients(weights).items():
                torch.testing.assert_close(gradient, whole[key], atol=1e-5, rtol=1e-4)
        monkeypatch.setattr(base, "packs", False)
        step_loss(base, rows)
        for key, gradient in gradients(weights).items():
            torch.testing.assert_close(gradient, whole[key], atol=1e-5, rtol=1e-4)


def test_logits_are_computed_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama", tmp_path)
    rows = examples(base)
    with with_lora(base) as weights:
        loss, whole = step_loss(base, rows), gradients(weights)
        sizes = []
        base.model.get_output_embeddings().register_forward_hook(lambda m, a, out: sizes.append(out.numel()))
        monkeypatch.setattr(forward, "LOGITS", 3 * base.vocabulary)
        assert step_loss(base, rows) == pytest.approx(loss, abs=1e-6)
        assert len(sizes) > 3 and max(sizes) == 3 * base.vocabulary
        for key, gradient in gradients(weights).items():
            torch.testing.assert_close(gradient, whole[key], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_learns_and_gives_the_same_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path / "base", dtype)
    rows = examples(base)
    long = recipe(steps=60, dropout=0.1)
    first = train_lora(base, rows, long, targets(base), tmp_path / "a")
    train_lora(base, rows, long, targets(base), tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert sha256_file(tmp_path / "a" / name) == sha256_file(tmp_path / "b" / name)
    assert sum(first.losses[-5:]) / 5 < 0.85 * first.losses[0]
    other = train_lora(base, rows, long.model_copy(update={"seed": 1}), targets(base), tmp_path / "c")
    assert other.losses != first.losses


@pytest.mark.parametrize("kind", ["lora", "activated_lora"])
@pytest.mark.parametrize("layers", [1.0, 0.5], ids=["all layers", "last layers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_at_every_step_gives_the_same_bytes(
    dtype: torch.dtype, layers: float, kind: str, tmp_path: Path
) -> None:
    base = tiny_base("qwen2", tmp_path / "base", dtype)
    # without dropout, what the other layers give is kept
    rows, plan = examples(base), recipe(dropout=0.1 if layers == 1 else 0.0, kind=kind)
    cache = tmp_path / "prompts"  # warm for those that resume
    out = tmp_path / "whole"
    whole = train_lora(base, rows, plan, targets(base), out, prompt_cache=cache, last_layers=layers)

    class Stop(Exception):
        pass

    for stop in range(1, plan.steps or 0):

        def interrupt(progress: training.Progress, stop: int = stop) -> None:
            if progress.step == stop + 1:
                raise Stop

        folder = tmp_path / f"checkpoints-{stop}"
        out = tmp_path / f"resumed-{stop}"
        with pytest.raises(Stop):
            train_lora(
                base,
                rows,
                plan,
                targets(base),
                out,
                checkpoints=folder,
                checkpoint_seconds=0,
                last_layers=layers,
                on_progress=interrupt,
            )
        resumed = train_lora(
            base,
            rows,
            plan,
            targets(base),
            out,
            checkpoints=folder,
            checkpoint_seconds=0,
            prompt_cache=None if stop % 2 else cache,
            last_layers=layers,
        )
        assert resumed.resumed_from == stop
        assert resumed.losses == whole.losses
        assert resumed.earlier_seconds > 0 and whole.earlier_seconds == 0
        assert sha256_file(out / "adapter_model.safetensors") == sha256_file(
            tmp_path / "whole" / "adapter_model.safetensors"
        )


def test_a_checkpoint_of_another_training_is_not_continued(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path / "base")
    rows = examples(base)
    folder = tmp_path / "checkpoints"
    train_lora(base, rows, recipe(), targets(base), tmp_path / "a", checkpoints=folder, checkpoint_seconds=0)
    result = train_lora(
        base, rows[:-1], recipe(), targets(base), tmp_path / "b", checkpoints=folder, checkpoint_seconds=0
    )
    assert result.resumed_from == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_loads_the_adapter_and_computes_the_same(architecture: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_base(architecture, tmp_path / "base")
    rows = examples(base)
    out = tmp_path / "adapter"
    train_lora(base, rows, recipe(), targets(base), out)
    pins = {"base_identity": base.manifest["identity"], "tokenizer_sha256": "t", "chat_template_sha256": "c"}
    (out / "manifest.json").write_text(json.dumps(pins))
    ids = torch.tensor([rows[0].prompt])
    bare = base.model(input_ids=ids).logits
    base.attach("x", out)
    with base.active("x"), torch.no_grad():
        ours = base.model(input_ids=ids).logits
    with base.active(None), torch.no_grad():
        torch.testing.assert_close(base.model(input_ids=ids).logits, bare)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, out).eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert float((ours - bare).abs().max()) > 1e-3
    base.detach("x")
    assert not base.adapters
    torch.testing.assert_close(base.model(input_ids=ids).logits, bare)


def test_an_adapter_of_another_base_or_with_bad_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tiny_base("llama", tmp_path / "base")
    out = tmp_path / "adapter"
    train_lora(base, examples(base), recipe(), targets(base), out)
    pins = {"base_identity": base.manifest["identity"], "tokenizer_sha256": "t", "chat_template_sha256": "c"}
    weights = load_file(out / "adapter_model.safetensors")
    first = next(iter(weights))
    broken = {
        "made for base_identity": (pins | {"base_identity": "0" * 64}, weights),
        "made for tokenizer_sha256": (pins | {"tokenizer_sha256": "z"}, weights),
        "missing": (pins, {k: v for k, v in weights.items() if k != first}),
        "unexpected": (pins, weights | {"stray": torch.zeros(1)}),
        "has shape": (pins, weights | {first: weights[first][:1].clone()}),
        "not finite": (pins, weights | {first: torch.full_like(weights[first], torch.nan)}),
    }
    for message, (manifest, tensors) in broken.items():
        (out / "manifest.json").write_text(json.dumps(manifest))
        save_file(tensors, out / "adapter_model.safetensors")
        with pytest.raises(IncompatibleAdapter, match=message):
            base.attach("x", out)
        assert not base.adapters and not base.lora.adapters


def test_no_example_is_longer_than_the_base_can_read(tmp_path: Path) -> None:
    base = tiny_base("gpt2", tmp_path / "base")
    long = Example([5] * base.context_length, [6], "q")
    with pytest.raises(BadExample, match="exceed 512 tokens"):
        train_lora(base, [long], recipe(max_length=2000), targets(base), tmp_path / "a")


def test_bad_examples_name_the_row(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path / "base")
    good = examples(base, 3)
    cases = {
        "row q: target of 600 tokens": Example([5], [6] * 600, "q"),
        r"1 of 4 examples exceed 512 tokens .* q \(600 \+ 1\)": Example([5] * 600, [6], "q"),
        "row q: expected at least one prompt token": Example([], [6], "q"),
    }
    for message, bad in cases.items():
        with pytest.raises(BadExample, match=message):
            train_lora(base, [*good, bad], recipe(), targets(base), tmp_path / "a")
    with pytest.raises(BadExample, match="at least one training example"):
        train_lora(base, [], recipe(), targets(base), tmp_path / "a")


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80),
    budget=st.integers(1, 1000),
    epochs=st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]),
    seed=st.integers(0, 5),
)
def test_every_epoch_sees_every_example_once_within_the_budget(lengths, budget, epochs, seed) -> None:
    plan = plan_batches(lengths, AdapterRecipe(epochs=epochs, batch_tokens=budget, seed=seed))
    assert plan == plan_batches(lengths, AdapterRecipe(epochs=epochs, batch_tokens=budget, seed=seed))
    for batch in plan:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    counts = [sum(batch.count(i) for batch in plan) for i in range(len(lengths))]
    if epochs == int(epochs):
        assert counts == [int(epochs)] * len(lengths)
    else:
        assert max(counts) <= int(epochs) + 1


def test_learning_rate_schedules() -> None:
    linear = [learning_rate(s, 100, AdapterRecipe(learning_rate=1.0, warmup=0.1)) for s in range(100)]
    assert linear[0] == pytest.approx(0.1) and max(linear) == 1.0 and linear[-1] < 0.02
    constant = AdapterRecipe(learning_rate=1.0, warmup=0, schedule="constant")
    assert {learning_rate(s, 10, constant) for s in range(10)} == {1.0}
    cosine = AdapterRecipe(learning_rate=1.0, warmup=0, schedule="cosine")
    assert learning_rate(50, 100, cosine) == pytest.approx(0.5)
