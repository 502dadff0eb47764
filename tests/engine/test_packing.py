"""Architectures whose peculiarities a packing has to know of, and texts that are long for one."""

from pathlib import Path

import pytest
import torch
from bases import LLAMA_TARGETS, tiny_base

from ml_assets.base_models.probe import lora_targets
from ml_assets.engine import packing, training
from ml_assets.engine.generation import generate
from ml_assets.engine.lora import new_adapter
from ml_assets.engine.scoring import mean_logprobs
from ml_assets.engine.training import Example, lora_for_training, save_adapter, step_loss
from ml_assets.spec import AdapterRecipe

RECIPE = AdapterRecipe(rank=4, alpha=8, dropout=0.0, epochs=1, batch_tokens=256, learning_rate=1e-3)


def ids(start: int, length: int) -> list[int]:
    return [(7 * i * i + 3 * i + start) % 390 + 5 for i in range(length)]


def test_a_window_that_only_the_mask_knows_is_kept(tmp_path: Path) -> None:
    """Short sequences, on which packing is tried, are within any window."""
    base = tiny_base("phimoe", tmp_path)
    assert not base.packs and tiny_base("mistral", tmp_path / "other").packs
    base.chat.stop_ids = frozenset()
    prompts = [ids(3, 12), ids(5, 60)]
    for prompt, completion in zip(prompts, generate(base, prompts, 3), strict=True):
        alone = list(prompt)
        with torch.inference_mode():
            for _ in range(3):
                logits = base.model(input_ids=torch.tensor([alone])).logits
                alone.append(int(logits[0, -1].argmax()))
        assert completion.token_ids == alone[len(prompt) :]


def test_a_model_that_adds_to_a_layers_output_in_place_is_trained(tmp_path: Path) -> None:
    base = tiny_base("falcon", tmp_path)
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    with lora_for_training(base, RECIPE, targets) as adapter:
        step_loss(base, [Example(ids(3, 20), ids(4, 5))])
        gradients = [pair[1].grad for pair in adapter.weights.values()]
    assert gradients and all(g is not None and float(g.abs().sum()) > 0 for g in gradients)


@pytest.mark.parametrize(("architecture", "draws"), [("biogpt", True), ("gpt2", True), ("llama", False)])
def test_dropout_is_noticed_whatever_it_is_called(architecture: str, draws: bool, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    base = tiny_base(architecture, tmp_path)
    assert base.draws == draws and not base.random, "nothing is trained yet"
    assert not base.model.training and torch.equal(torch.get_rng_state(), state)
    base.model.train()
    assert base.random == draws


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_scores_that_are_too_many_to_keep_give_the_same_gradient(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(architecture, tmp_path)
    examples = [Example([*ids(9, 30), *ids(n, 8 + n)], ids(2 * n, 3 + n)) for n in range(3)]

    def gradient() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        with lora_for_training(base, RECIPE, LLAMA_TARGETS) as adapter:
            for pair in adapter.weights.values():
                pair[1].data.normal_(std=0.1)
            step_loss(base, examples)
            return {name: pair[0].grad.clone() for name, pair in adapter.weights.items()}  # type: ignore[union-attr]

    kept = gradient()
    monkeypatch.setattr(packing, "MOST_SCORES", 0)
    for name, value in gradient().items():
        torch.testing.assert_close(value, kept[name], rtol=1e-4, atol=1e-6)


def test_one_long_sequence_has_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama", tmp_path)
    pairs = [(ids(3, 40), ids(5, 20))]
    kept = mean_logprobs(base, pairs)
    monkeypatch.setattr(packing, "MOST_SCORES", 0)
    monkeypatch.setattr(
        packing._Group, "mask", lambda *_: pytest.fail("as large as the square of its length")
    )
    assert mean_logprobs(base, pairs) == pytest.approx(kept, abs=1e-5)


@pytest.mark.parametrize("architecture", ["glm4_moe", "mamba"])
def test_an_adapter_is_the_same_to_peft(architecture: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_base(architecture, tmp_path)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.mul_(2)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    plain.load_state_dict(base.model.state_dict())
    targets = lora_targets(plain)["all-linear"]
    adapter = new_adapter(base.model, targets, rank=4, alpha=8, dropout=0.0, dtype=torch.float32)
    for pair in adapter.weights.values():
        pair[1].normal_(std=0.5)
    save_adapter(base, adapter, targets, tmp_path / "adapter")
    base.lora.add("own", adapter)
    tokens = torch.tensor([ids(3, 20)])
    with torch.no_grad():
        bare = base.model(tokens).logits
        with base.active("own"):
            own = base.model(tokens).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(tokens).logits
    assert float((own - bare).norm()) > 0.05 * float(bare.norm())
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


def test_one_thread_does_not_end_anothers_checkpointing(tmp_path: Path) -> None:
    base = tiny_base("llama", tmp_path)
    layer = base.model.model.layers[0]
    one, other = training._checkpointed(base, True), training._checkpointed(base, True)
    with one:
        with other:
            assert layer.gradient_checkpointing
        assert layer.gradient_checkpointing
    assert not layer.gradient_checkpointing
