"""Revisions made from a tiny base by the same code as from the real one."""

import dataclasses
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.base_revisions import revisions, text
from examples.base_revisions.revisions import (
    Plan,
    Revision,
    as_phi3,
    dispensable_layers,
    make,
    publish,
    remove_layers,
)
from examples.base_revisions.training import LENGTH, blocks, next_token_loss
from ml_assets.artifacts import ArtifactStore
from ml_assets.base_models import conversion, identity
from ml_assets.base_models.build import build_base
from ml_assets.base_models.register import current_revision
from ml_assets.settings import Settings
from ml_assets.spec import BaseFamily, DirectoryBase
from tests.tiny_models import tiny_model

PLANS = {
    "minor": Plan(steps=3, rate=1e-2),
    "shapes": Plan(steps=3, rate=1e-2, removed=2),
    "family": Plan(steps=3, rate=1e-2, removed=1, vocabulary=500),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random Llama of 5 layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = tiny_model("llama", tmp_path_factory.mktemp("base"))
    config = AutoConfig.from_pretrained(directory, num_hidden_layers=5)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def made(base, evergreen_home):
    def make_one(name: Revision, **changes):
        source = DirectoryBase(kind="directory", path=str(base))
        return make(name, Settings.from_env(), source=source, plan=PLANS.get(name), **changes)

    return make_one


def loss(directory: Path) -> float:
    """Nats per byte of text that no revision is trained on."""
    model, tokenizer = conversion.load(directory)
    rows = blocks(tokenizer, 4, 0.5, seed=99)
    spelled = sum(len(tokenizer.decode(row).encode()) for row in rows)
    with torch.no_grad():
        found = float(next_token_loss(model, rows, Settings.from_env()))
    return found * 4 * (LENGTH - 1) / spelled


@pytest.mark.parametrize("name", ["minor", "shapes", "family"])
def test_a_revision_is_a_base_that_passes_its_probe_and_knows_the_text_better(name, made, base, tmp_path):
    found = made(name)
    assert loss(found.directory) < loss(base)
    family = BaseFamily(name="tiny", source=DirectoryBase(kind="directory", path=str(found.directory)))
    settings = Settings.from_env()
    store = ArtifactStore(str(tmp_path / "artifacts"))
    built = build_base(current_revision(family, tmp_path, settings), [family], tmp_path, settings, store)
    assert built.findings["finite_logits"].passed
    assert built.findings["tokenizer_round_trip"].passed
    assert built.findings["chat_template"].passed
    layers = {"minor": 5, "shapes": 3, "family": 4}[name]
    assert built.manifest["layers"] == layers
    assert found.record["tokens"] == 3 * 4 * LENGTH
    assert len(found.record["removed_layers"]) == 5 - layers


def test_a_minor_revision_moves_every_matrix_and_keeps_every_shape_and_the_tokenizer(made, base):
    before = load_file(made("original").directory / "model.safetensors")
    after = load_file(made("minor").directory / "model.safetensors")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    for name, weights in before.items():
        if weights.dim() == 2:
            assert (weights != after[name]).float().mean() > 0.3, name
    parts = [identity.identity_parts(made(n).directory) for n in ("original", "minor")]
    assert parts[0]["tokenizer"] == parts[1]["tokenizer"]
    assert parts[0]["chat_template"] == parts[1]["chat_template"]
    assert parts[0]["weights"] != parts[1]["weights"]


def test_another_family_has_other_modules_another_tokenizer_and_another_template(made):
    parts = [identity.identity_parts(made(n).directory) for n in ("original", "family")]
    assert all(parts[0][part] != parts[1][part] for part in ("config", "tokenizer", "chat_template"))
    names = load_file(made("family").directory / "model.safetensors")
    assert any("qkv_proj" in name for name in names) and not any("q_proj" in name for name in names)


def test_the_same_arguments_give_the_same_weights(made, base, monkeypatch, tmp_path):
    first = made("family").directory
    assert made("family").directory == first
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path / "elsewhere"))
    second = made("family").directory
    assert second != first
    assert identity.identify(second) == identity.identify(first)


def test_a_revision_that_failed_leaves_nothing(made, monkeypatch):
    monkeypatch.setattr(revisions, "remove_layers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made("shapes")
    cache = Settings.from_env().home / "cache" / "base_revisions"
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []
    monkeypatch.undo()
    assert not list(cache.glob("**/.making-*"))


def test_phi3_computes_what_the_llama_did(base, evergreen_home):
    """With the same vocabulary, another architecture is another name for the same numbers."""
    model, tokenizer = conversion.load(base)
    model = model.float()
    ids = torch.tensor(blocks(tokenizer, 2, 0.5, seed=3))
    same = as_phi3(model, tokenizer, model.get_input_embeddings().weight)
    torch.testing.assert_close(same(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_embeddings_of_new_tokens_are_means_of_the_old_that_spell_them(base):
    model, old = conversion.load(base)
    new = revisions.train_tokenizer(500, seed=0)
    weights = model.get_input_embeddings().weight.float()
    found = revisions.carried_embeddings(weights, old, new)
    assert found.shape == (len(new), weights.shape[1])
    for text_of in (" the", " in"):
        (token,) = new(text_of, add_special_tokens=False)["input_ids"]
        expected = weights[old(text_of, add_special_tokens=False)["input_ids"]].mean(0)
        torch.testing.assert_close(found[token], expected)
    end = new.convert_tokens_to_ids("<|end|>")
    torch.testing.assert_close(found[end], weights[old.eos_token_id])
    assert not torch.isnan(found).any()


def test_the_layer_that_does_nothing_is_the_first_to_go(base, evergreen_home):
    model, tokenizer = conversion.load(base)
    model = model.float()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[3].get_submodule(name).weight.zero_()
    ids = torch.tensor(blocks(tokenizer, 2, 0.5, seed=3))
    before = model(ids).logits
    # two of the three between first and last, but no neighbours as long as there are others
    assert dispensable_layers(model, tokenizer, 2, Settings.from_env()) == [1, 3]
    assert dispensable_layers(model, tokenizer, 3, Settings.from_env()) == [1, 2, 3]
    remove_layers(model, [3])
    torch.testing.assert_close(model(ids).logits, before)
    assert model.config.num_hidden_layers == 4
    with pytest.raises(ValueError, match="remove 1 to 2 of 4 layers, found 3"):
        dispensable_layers(model, tokenizer, 3, Settings.from_env())


def test_publishing_exchanges_the_revision_at_once(made, tmp_path, evergreen_home):
    out = tmp_path / "followed" / "base"
    family = BaseFamily(name="tiny", source=DirectoryBase(kind="directory", path=str(out)))
    revisions_seen = []
    for name in ("original", "minor", "original"):
        publish(made(name), out)
        revisions_seen.append(current_revision(family, tmp_path, Settings.from_env()))
        assert sorted(path.name for path in out.iterdir()) == sorted(identity.model_files(out))
    assert revisions_seen[0] == revisions_seen[2] != revisions_seen[1]
    assert not list(out.parent.glob("*copy*")) and not list(out.parent.glob("*link*"))
    (tmp_path / "own").mkdir()
    with pytest.raises(FileExistsError, match="expected no file or folder there"):
        publish(made("minor"), tmp_path / "own")
    (tmp_path / "link").symlink_to("own")
    with pytest.raises(FileExistsError, match="or a link made by this program"):
        publish(made("minor"), tmp_path / "link")
    assert (tmp_path / "link").readlink() == Path("own")


def test_what_is_published_is_a_copy(made, tmp_path):
    kept = made("minor").directory
    before = identity.identify(kept)
    publish(made("minor"), tmp_path / "base")
    with (tmp_path / "base" / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\xff" * 8)
    assert identity.identify(kept) == before != identity.identify(tmp_path / "base")


def test_text_is_free_of_what_customizations_are_judged_by():
    whole = "\n".join(passage.text for passage in text.passages())
    assert len(whole) > 500_000
    assert "HassTurnOn" not in whole and "kitchen light" not in whole.lower()


def test_conversations_are_short_answered_and_stay_the_same():
    found = list(islice(text.conversations(7), 300))
    assert found == list(islice(text.conversations(7), 300)) != list(islice(text.conversations(8), 300))
    for messages in found:
        assert [m["role"] for m in messages][-2:] == ["user", "assistant"]
        assert all(m["content"].strip() for m in messages)
        if messages[-2]["content"].startswith("Say the first"):
            assert set(json.loads(messages[-1]["content"])) == {"first", "last"}
        if messages[-2]["content"].startswith("Repeat: "):
            assert messages[-1]["content"] in messages[-2]["content"]


def test_the_program_says_what_is_wrong(tmp_path):
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "examples.base_revisions"]
    wrong = subprocess.run([*command, "newer", "--out", "x"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "original" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minor", "shapes", "family"])
def test_the_real_base_is_revised(name: Revision, home_with_base, monkeypatch, tmp_path):
    """One step: what is published is whole, and speaks English still."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "downloads").symlink_to(home_with_base / "downloads")
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EVERGREEN_DTYPE", raising=False)
    found = make(name, Settings.from_env(), plan=dataclasses.replace(revisions.PLANS[name], steps=1))
    nats = loss(found.directory)
    assert nats < {"minor": 1.5, "shapes": 1.8, "family": 2.5}[name], "nats per byte"
