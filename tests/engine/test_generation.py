"""Batched generation gives what `generate` gives one by one, for every architecture, in float32."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import LLAMA_TARGETS, TARGETS, tiny_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES

from ml_assets.engine import scoring
from ml_assets.engine.forward import answer_log_probs, output_head
from ml_assets.engine.generation import Decoder, Event, FallbackDecoder, PrefixCache, Row, generate
from ml_assets.engine.loading import Base
from ml_assets.engine.lora import Adapter, new_adapter
from ml_assets.engine.packing import Packing, hidden_states
from ml_assets.engine.scoring import best_labels, choose_labels, label_log_probs, mean_logprobs, text_nll

TEXTS = [
    "turn on the light",
    "kitchen",
    "what is the temperature in the living room? " * 4,
    "a",
    "close the window",
]
SYSTEM = "classify the topic of the text. business sport politics"


def sharp_base(architecture: str, directory: Path, packs: bool = True) -> Base:
    """Sharper than random weights, so that no two tokens are as good as tied."""
    base = tiny_base(architecture, directory)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.mul_(1.7)
    base.packs = packs
    return base


def add_adapter(base: Base, name: str, seed: int, architecture: str = "llama", rank: int = 4) -> Adapter:
    """A random adapter, strong enough to change answers."""
    targets = TARGETS.get(architecture, LLAMA_TARGETS)
    adapter = new_adapter(base.model, targets, rank=rank, alpha=2 * rank, dropout=0.0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for pair in adapter.weights.values():
        for tensor in pair:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15)
    base.lora.add(name, adapter)
    return adapter


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


def run(decoder: Decoder | FallbackDecoder, rows: Sequence[Row]) -> list[list[int]]:
    for row in rows:
        decoder.add(row)
    tokens: dict[Row, list[int]] = {row: [] for row in rows}
    while decoder.rows:
        collect(tokens, decoder.step())
    return [tokens[row] for row in rows]


def collect(tokens: dict[Row, list[int]], events: list[Event]) -> None:
    for row, token, _ in events:
        if token is not None:
            tokens[row].append(token)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_equals_one_by_one(architecture: str, system: str | None, packs: bool, tmp_path: Path) -> None:
    base = sharp_base(architecture, tmp_path, packs)
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


@pytest.mark.parametrize("packs", [True, False])
def test_each_row_has_its_own_limit_and_can_be_cancelled(packs: bool, tmp_path: Path) -> None:
    base = sharp_base("llama", tmp_path, packs)
    base.chat.stop_ids = frozenset()
    decoder = Decoder(base) if packs else FallbackDecoder(base)
    rows = [Row(prompt, n) for prompt, n in zip(prompts(base), [2, 5, 9], strict=False)]
    for row in rows:
        decoder.add(row)
    tokens: dict[Row, list[int]] = {row: [] for row in rows}
    while decoder.rows:
        collect(tokens, decoder.step())
        if len(tokens[rows[2]]) == 3:
            decoder.cancel(rows[2])
    assert [len(t) for t in tokens.values()] == [2, 5, 3]
    assert decoder.tokens_with([]) == 0, "all room is given back"


@pytest.mark.parametrize("architecture", ["lfm2", "bamba", "mamba", "recurrent_gemma", "rwkv"])
def test_rows_leave_a_batch_of_recurrent_states(architecture: str, tmp_path: Path) -> None:
    base = sharp_base(architecture, tmp_path, packs=False)
    base.chat.stop_ids = frozenset()
    for seed, name in enumerate("ab"):
        add_adapter(base, name, seed, architecture)
    add_adapter(base, "later", 3, architecture).invocation = base.chat.invocation_ids()
    add_adapter(base, "never", 4, architecture).invocation = [1, 1, 1]
    names, limits = [None, "a", "b", "later", "never", "a"], [2, 7, 12, 5, 4, 1]
    asked = [*prompts(base), prompts(base)[0]]
    decoder = FallbackDecoder(base)
    rows = [Row(prompt, n, name) for prompt, n, name in zip(asked, limits, names, strict=True)]
    tokens: dict[Row, list[int]] = {row: [] for row in rows}
    for row in rows[:4]:
        decoder.add(row)
    collect(tokens, decoder.step())
    for row in rows[4:]:  # a second batch: the two take turns
        decoder.add(row)
    while decoder.rows:
        collect(tokens, decoder.step())
        if len(tokens[rows[2]]) == 3:
            decoder.cancel(rows[2])
    assert [len(found) for found in tokens.values()] == [2, 7, 3, 5, 4, 1]
    for row, found in tokens.items():
        ids = list(row.prompt)
        start = base.active_from(row.adapter, row.prompt)
        name = row.adapter if start < len(row.prompt) else None
        for token in found:
            route = base.lora.for_rows([name], [len(ids)], [start])
            with torch.no_grad(), base.lora.routed(route):
                logits = base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert token == int(logits.argmax())
            ids.append(token)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, list[list[int]], dict[Any, list[int]]]:
    """A base with adapters of every kind, prompts, and the answer of each adapter to each prompt alone."""
    base = sharp_base("llama", tmp_path_factory.mktemp("base"))
    for name, seed, rank in (("a", 1, 4), ("b", 2, 4), ("c", 3, 8)):
        add_adapter(base, name, seed, rank=rank)
    for name, seed in (("later", 4), ("later2", 5)):
        add_adapter(base, name, seed).invocation = base.chat.invocation_ids()
    add_adapter(base, "never", 6).invocation = [1, 1, 1]
    asked = [*prompts(base), *prompts(base, SYSTEM)]
    alone = {
        (name, i): run(Decoder(base), [Row(prompt, 8, name)])[0]
        for name in (None, "a", "b", "c", "later", "later2", "never")
        for i, prompt in enumerate(asked)
    }
    return base, asked, alone


def test_adapters_answer_differently(world: Any) -> None:
    base, asked, alone = world
    for i in range(len(asked)):
        assert len({tuple(alone[name, i]) for name in (None, "a", "b", "c", "later", "later2")}) >= 5
        assert alone["never", i] == alone[None, i]
    for name in (None, "a"):
        with base.active(name):
            assert [alone[name, i] for i in range(len(asked))] == [one_by_one(base, p, 8) for p in asked]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_join_and_leave_at_any_step(world: Any, data: st.DataObject) -> None:
    base, asked, alone = world
    names = st.sampled_from([None, "a", "b", "c", "later", "later2", "never"])
    row = st.tuples(names, st.integers(0, len(asked) - 1), st.integers(1, 8))
    cache = PrefixCache(data.draw(st.sampled_from([0, 60_000, 10_000_000])))
    decoder = Decoder(base, cache=cache)
    expected: dict[Row, list[int]] = {}
    tokens: dict[Row, list[int]] = {}
    cancelled: set[Row] = set()
    for _ in range(data.draw(st.integers(1, 12))):
        for name, i, new in data.draw(st.lists(row, max_size=4)):
            joined = Row(asked[i], new, name)
            expected[joined], tokens[joined] = alone[name, i][:new], []
            decoder.add(joined)
        if tokens and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(list(tokens)))
            cancelled.add(gone)
            decoder.cancel(gone)
        collect(tokens, decoder.step())
    while decoder.rows:
        collect(tokens, decoder.step())
    for joined, found in tokens.items():
        if joined in cancelled:
            assert found == expected[joined][: len(found)]
        else:
            assert found == expected[joined]
    assert cache.bytes <= cache.max_bytes
    assert decoder.tokens_with([]) == 0


@pytest.mark.parametrize("packs", [True, False])
def test_mixed_adapters_equal_each_alone(world: Any, packs: bool) -> None:
    base, asked, alone = world
    names = [None, "a", "b", "c", "later", "later2", "never"]
    mixed = [(name, i) for i in range(len(asked)) for name in names]
    random.Random(0).shuffle(mixed)
    base.packs = packs
    try:
        answers = generate(base, [asked[i] for _, i in mixed], 8, adapters=[name for name, _ in mixed])
        some = generate(base, asked, 8, adapters=["a", "later"] * (len(asked) // 2))
    finally:
        base.packs = True
    assert [a.token_ids for a in answers] == [alone[key] for key in mixed]
    assert [a.token_ids for a in some] == [alone[("a", "later")[i % 2], i] for i in range(len(asked))]


@pytest.mark.parametrize("packs", [True, False])
def test_the_adapter_of_a_cancelled_row_may_go_at_once(packs: bool, tmp_path: Path) -> None:
    base = sharp_base("llama", tmp_path, packs)
    for seed, name in enumerate("ab"):
        add_adapter(base, name, seed)
    asked = prompts(base)
    plain, other = (run(Decoder(base), [Row(asked[i], 8, name)])[0] for i, name in ((1, None), (2, "b")))
    decoder = Decoder(base) if packs else FallbackDecoder(base)
    gone, stays, later = Row(asked[0], 8, "a"), Row(asked[1], 8), Row(asked[2], 8, "b")
    tokens: dict[Row, list[int]] = {gone: [], stays: [], later: []}
    for row in (gone, stays):
        decoder.add(row)
    collect(tokens, decoder.step())
    decoder.add(later)
    collect(tokens, decoder.step())
    decoder.cancel(gone)
    decoder.forget("a")
    base.lora.remove("a")
    while decoder.rows:
        collect(tokens, decoder.step())
    assert len(tokens[gone]) < 3
    assert (tokens[stays], tokens[later]) == (plain, other)


def test_many_adapters_in_one_batch(tmp_path: Path) -> None:
    base = sharp_base("qwen2", tmp_path)
    names = [f"adapter {i}" for i in range(20)]
    for i, name in enumerate(names):
        add_adapter(base, name, i, "qwen2", rank=2 + i % 3)
    prompt = prompts(base)[0]
    answers = generate(base, [prompt] * 40, 6, adapters=names * 2)
    for name, first, second in zip(names, answers, answers[20:], strict=False):
        with base.active(name):
            assert first.token_ids == second.token_ids == one_by_one(base, prompt, 6)
    base.lora.remove(names[0])
    again = generate(base, [prompt] * 19, 6, adapters=names[1:])
    assert [a.token_ids for a in again] == [a.token_ids for a in answers[1:20]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_activated_lora_is_pefts(architecture: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = sharp_base(architecture, tmp_path)
    targets = TARGETS.get(architecture, LLAMA_TARGETS)
    adapter = add_adapter(base, "later", 1, architecture)
    adapter.invocation = base.chat.invocation_ids()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    plain.load_state_dict(base.model.state_dict())
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, alora_invocation_tokens=adapter.invocation,
        fan_in_fan_out=architecture == "gpt2", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(plain, config).eval()
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter.named_tensors().items():
            state[name.replace(".weight", ".default.weight")].copy_(tensor)
    asked = prompts(base, SYSTEM)
    answers = generate(base, asked, 8, adapters=["later"] * len(asked))
    targets_ids = [base.chat.target_ids(text) for text in ("kitchen", "a b c", "sport", "a", "on")]
    with base.active("later"):
        values = mean_logprobs(base, list(zip(asked, targets_ids, strict=True)))
    for prompt, answer, target, value in zip(asked, answers, targets_ids, values, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=sorted(base.chat.stop_ids),
            pad_token_id=base.pad_id,
        )[0, len(prompt) :].tolist()
        assert answer.token_ids == [t for t in out if t not in base.chat.stop_ids]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(prompt) - 1 + i, t]) for i, t in enumerate(target)) / len(target)
        assert value == pytest.approx(expected, abs=1e-4)


def test_a_prefix_is_computed_once_and_a_long_prompt_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_assets.engine import generation

    base = sharp_base("llama", tmp_path)
    add_adapter(base, "a", 1)
    add_adapter(base, "later", 2).invocation = base.chat.invocation_ids()
    asked = prompts(base, SYSTEM)
    alone = {name: [run(Decoder(base), [Row(p, 5, name)])[0] for p in asked] for name in (None, "a", "later")}
    computed: list[int] = []
    real = generation.hidden_states

    def count(model: Any, packing: Any) -> torch.Tensor:
        if isinstance(packing, generation.Packing):
            computed.append(packing.input_ids.shape[1])
        return real(model, packing)

    monkeypatch.setattr(generation, "hidden_states", count)
    cache = PrefixCache(10_000_000)
    decoder = Decoder(base, cache=cache)
    for name in (None, "a", "later"):
        assert [run(decoder, [Row(p, 5, name)])[0] for p in asked] == alone[name]
    # the third prompt of a scope finds what the first two share; an activated LoRA finds the base's
    system = len(base.chat.prompt_ids([{"role": "system", "content": SYSTEM}])) - len(
        base.chat.invocation_ids()
    )
    lengths = [len(p) for p in asked]
    assert computed[:2] == lengths[:2] and all(
        n <= a - system for n, a in zip(computed[2:5], lengths[2:], strict=True)
    )
    assert computed[5:7] == lengths[:2], "an adapter's own keys and values"
    assert all(n <= a - system for n, a in zip(computed[10:], lengths, strict=True))
    cache.forget("a")
    assert cache.bytes > 0
    assert run(decoder, [Row(asked[0], 5, "a")]) == [alone["a"][0]]

    monkeypatch.setattr(generation, "PREFILL_TOKENS", 7)
    computed.clear()
    decoder = Decoder(base)
    rows = [Row(p, 5, name) for name in (None, "a", "later") for p in asked]
    assert run(decoder, rows) == [tokens for name in (None, "a", "later") for tokens in alone[name]]
    assert max(computed) <= 7


@pytest.mark.parametrize("sampling", [{"temperature": 7.6e-299}, {"temperature": 1.0, "top_p": 7.6e-299}])
def test_sampling_from_next_to_nothing_is_greedy(sampling: dict[str, float], tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path)
    greedy = generate(base, [prompts(base)[0]], 8)[0].token_ids
    decoder = Decoder(base)
    decoder.add(Row(prompts(base)[0], 8, seed=1, **sampling))
    tokens: list[int | None] = []
    while decoder.rows:
        tokens += [token for _, token, _ in decoder.step() if token is not None]
    assert tokens == greedy


def test_sampling_follows_its_seed(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path)
    base.chat.stop_ids = frozenset()

    def sample(seeds: list[int], temperature: float = 1.0, top_p: float = 1.0) -> list[list[int]]:
        rows = [Row(prompts(base)[0], 8, None, temperature, top_p, seed) for seed in seeds]
        return run(Decoder(base), rows)

    a, b, c = sample([1, 2, 1])
    assert a == c and a != b
    assert sample([3], top_p=1e-9) == sample([4], temperature=0)


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path)
    with pytest.raises(ValueError, match="prompt 0: 510 tokens and 10 new ones exceed the context of 512"):
        generate(base, [[5] * 510], 10)
    with pytest.raises(ValueError, match="the prompt is empty"):
        Decoder(base).add(Row([], 1))


# -- labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_label_scores_equal_brute_force(architecture: str, packs: bool, tmp_path: Path) -> None:
    base = sharp_base(architecture, tmp_path, packs)
    add_adapter(base, "a", 1, architecture)
    add_adapter(base, "later", 2, architecture).invocation = base.chat.invocation_ids()
    labels = [
        base.chat.target_ids(t) for t in ("business", "sport", "sports", "politics", "a", "a b", "a b c")
    ]
    asked = [*prompts(base), *prompts(base, SYSTEM)]
    adapters = [("a", "later", None)[i % 3] for i in range(len(asked))]
    found = label_log_probs(base, asked, labels, adapters)
    for prompt, name, values in zip(asked, adapters, found, strict=True):
        with base.active(name), torch.inference_mode():
            expected = [float(answer_log_probs(base, [(prompt, label)])[0].sum()) for label in labels]
        assert values.tolist() == pytest.approx(expected, abs=2e-4)
    for name in (None, "a", "later"):
        with base.active(name):
            values = label_log_probs(base, asked[5:], labels)
            assert choose_labels(base, asked[5:], labels) == [int(v.argmax()) for v in values]
        same = label_log_probs(base, asked[5:], labels, [name] * 5)
        assert torch.allclose(torch.stack(values), torch.stack(same), atol=2e-4)


@pytest.mark.parametrize("limit", [scoring.LABEL_TOKENS, 30])
@pytest.mark.parametrize("make", [sharp_base, tiny_base])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_best_label_is_found_without_computing_all(
    architecture: str, make: Callable[..., Base], limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make(architecture, tmp_path)
    add_adapter(base, "a", 1, architecture)
    add_adapter(base, "later", 2, architecture).invocation = base.chat.invocation_ids()
    words = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
    texts = [*words, *(f"{a} {b}" for a in words for b in words[:2]), "alphabet"]
    labels = [*(base.chat.target_ids(text) for text in texts), [base.chat.target_ids("eta")[0]]]
    asked = [*prompts(base), *prompts(base, SYSTEM)]
    adapters = [("a", "later", None)[i % 3] for i in range(len(asked))]
    expected = label_log_probs(base, asked, labels, adapters)
    monkeypatch.setattr(scoring, "LABEL_TOKENS", limit)
    trees: list[bool] = []
    behind = scoring._pass_behind

    def watched(*args: Any) -> Any:
        trees.append(len(args) > 4)
        return behind(*args)

    monkeypatch.setattr(scoring, "_pass_behind", watched)
    found = best_labels(base, asked, labels, adapters)
    assert set(trees) == {False, True}, "some labels alone, and where all are alike the tree"
    for (label, value), values in zip(found, expected, strict=True):
        assert value == pytest.approx(float(values.max()), abs=2e-4)
        assert float(values[label]) == pytest.approx(float(values.max()), abs=2e-4)


def test_labels_that_can_not_win_are_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = sharp_base("llama", tmp_path)
    with torch.no_grad():
        output_head(base.model).weight.mul_(30.0)  # as sure as a trained model
    asked = prompts(base)
    right = [answer.token_ids for answer in generate(base, asked, 4)]
    others = [[token, *right[0][1:]] for token in range(20, 40) if token not in {ids[0] for ids in right}]
    labels = [*{tuple(ids): ids for ids in right if ids}.values(), *others]
    passes: list[list[int]] = []

    def counted(model: torch.nn.Module, packing: Packing) -> torch.Tensor:
        passes.append(packing.lengths)
        return hidden_states(model, packing)

    monkeypatch.setattr(scoring, "hidden_states", counted)
    found = best_labels(base, asked, labels)
    assert [labels[label] for label, _ in found] == right
    assert sum(len(ids) - 1 for ids in right) > 0
    assert [sum(lengths) for lengths in passes[1:]] == [sum(len(ids) - 1 for ids in right)]


def test_labels_must_differ(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path)
    for labels in ([], [[]], [[1, 2], [1, 2]]):
        with pytest.raises(ValueError, match="expected distinct labels"):
            label_log_probs(base, [[5]], labels)
        with pytest.raises(ValueError, match="expected distinct labels"):
            best_labels(base, [[5]], labels)


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
