"""An adapter as a start on another base: the same where it fits, mapped where shapes differ."""

import json
from pathlib import Path

import pytest
import torch
from bases import tiny_base
from hypothesis import given
from hypothesis import strategies as st
from test_training import examples, targets
from tiny_models import ARCHITECTURES

from ml_assets.engine.copying import NoStart, OldModules, fits, monotone, read_old, starts
from ml_assets.engine.loading import Base, load_base
from ml_assets.engine.lora import Adapter, new_adapter, place
from ml_assets.engine.packing import body


def adapter_on(base: Base, seed: int = 3) -> Adapter:
    torch.manual_seed(seed)
    adapter = new_adapter(base.model, targets(base), 4, 8, 0.0, torch.float32)
    for _, b in adapter.weights.values():
        torch.nn.init.normal_(b, std=0.05)
    return adapter


def texts_of(base: Base) -> list[list[int]]:
    return [[*row.prompt, *row.target] for row in examples(base, 12)]


def change(base: Base, adapter: Adapter, texts: list[list[int]]) -> torch.Tensor:
    """What an adapter adds to the last hidden states."""

    def hidden() -> torch.Tensor:
        found = [
            body(base.model)(input_ids=torch.tensor([t]), use_cache=False).last_hidden_state[0] for t in texts
        ]
        return torch.cat(found).float()

    with torch.inference_mode():
        without = hidden()
        base.lora.add("it", adapter)
        try:
            with base.active("it"):
                return hidden() - without
        finally:
            base.lora.remove("it")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_base_gets_the_same_adapter(architecture: str, tmp_path: Path) -> None:
    base = tiny_base(architecture, tmp_path / "base")
    adapter = adapter_on(base)
    old = read_old(base, adapter, texts_of(base))
    assert fits(base, targets(base), base, adapter)
    found = starts(base, targets(base), adapter, old, texts_of(base))
    assert list(found) == ["copy", "rescaled copy"]
    for start in found.values():
        for name, (a, b) in start.weights.items():
            assert torch.equal(a, adapter.weights[name][0])
            assert torch.allclose(b, adapter.weights[name][1], rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_is_rescaled_by_what_is_left_of_a_weight(architecture: str, tmp_path: Path) -> None:
    base = tiny_base(architecture, tmp_path / "base")
    adapter = adapter_on(base)
    old = read_old(base, adapter, [])
    old.weights = {name: weight.clone() for name, weight in old.weights.items()}
    name = next(iter(adapter.weights))
    with torch.no_grad():
        base.model.get_submodule(name).weight.mul_(0.25)  # type: ignore[operator,union-attr]
    found = starts(base, targets(base), adapter, old, [])
    assert torch.equal(found["copy"].weights[name][1], adapter.weights[name][1])
    assert torch.allclose(found["rescaled copy"].weights[name][1], adapter.weights[name][1] * 0.25, rtol=1e-4)


def test_a_mapped_adapter_does_what_the_old_one_did(tmp_path: Path) -> None:
    """The mapping by regression, held against the truth: on the very same base it must change the hidden
    states as the adapter itself does."""
    base = tiny_base("llama", tmp_path / "base")
    adapter = adapter_on(base)
    texts = texts_of(base)
    old = read_old(base, adapter, texts)
    # pretend that the shapes are others, so that it is mapped and not copied
    first = next(iter(old.weights))
    old.weights[first] = old.weights[first][:-1]
    found = starts(base, targets(base), adapter, old, texts)
    assert list(found) == ["mapped"]
    wanted, got = change(base, adapter, texts), change(base, found["mapped"], texts)
    assert float((wanted - got).norm() / wanted.norm()) < 0.1
    zero = adapter_on(base, seed=4)
    assert float((wanted - change(base, zero, texts)).norm() / wanted.norm()) > 0.8, "another one does not"


def test_other_sizes_and_layers_are_mapped(tmp_path: Path) -> None:
    from tiny_models import tiny_model

    base = tiny_base("llama", tmp_path / "base")
    tiny_model("llama", tmp_path / "wide", seed=2, hidden=96, layers=5)
    (tmp_path / "wide/manifest.json").write_bytes((tmp_path / "base/manifest.json").read_bytes())
    wide = load_base(tmp_path / "wide", torch.float32)
    adapter = adapter_on(base)
    texts = texts_of(base)
    assert not fits(wide, targets(wide), base, adapter)
    tiny_model("llama", tmp_path / "deep", seed=2, layers=5)
    (tmp_path / "deep/manifest.json").write_bytes((tmp_path / "base/manifest.json").read_bytes())
    deep = load_base(tmp_path / "deep", torch.float32)
    assert fits(deep, targets(deep), base, adapter)
    assert list(starts(deep, targets(deep), adapter, read_old(base, adapter, []), [])) == [
        "layer copy",
        "rescaled layer copy",
    ]
    start = starts(wide, targets(wide), adapter, read_old(base, adapter, texts), texts)["mapped"]
    assert len(start.weights) == 5 * 7
    name = "model.layers.4.mlp.down_proj"
    assert start.weights[name][0].shape == (4, 192) and start.weights[name][1].shape == (96, 4)
    assert all(bool(torch.isfinite(t).all()) for pair in start.weights.values() for t in pair)
    assert float(start.weights[name][1].norm()) > 0
    with pytest.raises(NoStart, match="no tokens that both bases read"):
        starts(wide, targets(wide), adapter, read_old(base, adapter, []), [])


def hybrid(directory: Path, hidden: int, kinds: str) -> Base:
    """A base with layers of two kinds: `a` attention, `c` convolution."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    base = tiny_base("llama", directory)  # its tokenizer
    torch.manual_seed(0)
    layers = ["full_attention" if kind == "a" else "conv" for kind in kinds]
    config = Lfm2Config(
        vocab_size=base.model.config.vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=len(layers),
        layer_types=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    Lfm2ForCausalLM(config).save_pretrained(directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["lora_targets"] = {"all-linear": ["q_proj", "v_proj", "in_proj", "w1"]}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return load_base(directory, torch.float32)


def test_layers_of_different_kinds_are_mapped_as_far_as_they_match(tmp_path: Path) -> None:
    base, wide = hybrid(tmp_path / "base", 32, "aac"), hybrid(tmp_path / "wide", 48, "acac")
    adapter, texts = adapter_on(base), texts_of(base)
    mapped = starts(wide, targets(wide), adapter, read_old(base, adapter, texts), texts)["mapped"]
    effects = {name: float(b.norm()) for name, (_, b) in mapped.weights.items()}
    assert all(bool(torch.isfinite(t).all()) for pair in mapped.weights.values() for t in pair)
    assert all(effect > 0 for name, effect in effects.items() if name.endswith("w1")), "in every layer"
    unmatched = [name for name, effect in effects.items() if effect == 0]
    assert unmatched, "the second kind of layer comes before the first again, which it did not before"
    assert all(name.endswith(("q_proj", "v_proj", "in_proj")) for name in unmatched)
    assert float(change(wide, mapped, texts).norm()) > 0


def test_modules_that_no_text_passes_through_are_left_as_they_are(tmp_path: Path) -> None:
    """As experts that are not chosen, in either base."""
    base, wide = hybrid(tmp_path / "base", 32, "ac"), hybrid(tmp_path / "wide", 48, "ac")
    attention, convolution = base.model.model.layers[0].self_attn, wide.model.model.layers[1].conv
    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    convolution.forward = lambda hidden_states, **_: torch.zeros_like(hidden_states)
    adapter, texts = adapter_on(base), texts_of(base)
    old = read_old(base, adapter, texts)
    mapped = starts(wide, targets(wide), adapter, old, texts)["mapped"]
    effective = {name for name, (_, b) in mapped.weights.items() if float(b.norm()) > 0}
    assert effective == {"model.layers.0.feed_forward.w1", "model.layers.1.feed_forward.w1"}
    old.grams.clear()
    with pytest.raises(NoStart, match="the texts pass through no modules that both bases have"):
        starts(wide, targets(wide), adapter, old, texts)


def test_modules_of_other_names_are_no_start(tmp_path: Path) -> None:
    base, other = tiny_base("llama", tmp_path / "a"), tiny_base("gpt2", tmp_path / "b")
    adapter = adapter_on(base)
    with pytest.raises(NoStart, match="no module here is named like one there"):
        starts(other, targets(other), adapter, read_old(base, adapter, []), [])


def test_places() -> None:
    assert place("model.layers.12.self_attn.q_proj") == ("model.layers.*.self_attn.q_proj", 12)
    assert place("encoder.3.experts.7.up") == ("encoder.*.experts.7.up", 3)
    assert place("head") == ("head", -1)
    assert OldModules().weights == {}


@given(st.lists(st.lists(st.floats(-1, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_layers_are_matched_in_order_and_best(table: list[list[float]]) -> None:
    import itertools

    chosen = monotone(table)
    assert chosen == sorted(chosen)
    score = sum(row[j] for row, j in zip(table, chosen, strict=True))
    paths = itertools.combinations_with_replacement(range(4), len(table))
    best = max(sum(row[j] for row, j in zip(table, path, strict=True)) for path in paths)
    assert score == pytest.approx(best, abs=1e-9)
