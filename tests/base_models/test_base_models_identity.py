"""The content hash of a base model: what must not change it, what must, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CHAT_TEMPLATE, tiny_model

from ml_assets.artifacts import sha256_file
from ml_assets.base_models.identity import (
    BaseModelError,
    chat_template,
    identify,
    identity_parts,
    reading,
    recall_identity,
    remember_identity,
    revision_key,
    split_revision,
    stamp,
    strip,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("bases") / "original")


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "under-another-name"))


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one. The file is written in another style on purpose."""
    value = json.loads(path.read_text())
    for key, change in changes.items():
        if change is None:
            del value[key]
        else:
            value[key] = change
    path.write_text(json.dumps(dict(reversed(value.items())), indent=7))


def test_a_copy_under_another_name_is_the_same(original: Path, copy: Path):
    assert identify(original) == identify(copy)
    assert len(identify(copy)) == 64


def test_a_tokenizer_that_pads_and_cuts_reads_the_same(original: Path, copy: Path):
    """As a tokenizer saves itself after it was called: another revision, but no other tokens."""
    edit(copy / "tokenizer.json", padding={"strategy": "BatchLongest"}, truncation={"max_length": 16})
    edit(copy / "tokenizer_config.json", pad_token="<|im_start|>", padding_side="left", model_max_length=99)
    edit(copy / "tokenizer_config.json", max_length=16, stride=0, truncation_strategy="longest_first")
    assert identity_parts(copy)["tokenizer"] != identity_parts(original)["tokenizer"]
    assert reading(copy) == reading(original)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", {"added_tokens": []}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
        ("tokenizer_config.json", {"add_bos_token": True}),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("added_tokens.json", {"stride": 400}),
    ],
)
def test_what_decides_about_tokens_is_told_apart(
    original: Path, copy: Path, name: str, change: dict[str, object]
):
    if not (copy / name).exists():
        (copy / name).write_text("{}")
    before = reading(copy)
    edit(copy / name, **change)
    assert reading(copy) != before


def test_what_does_not_belong_to_the_model_does_not_count(original: Path, copy: Path):
    edit(
        copy / "config.json", _name_or_path="/home/me/x", transformers_version="9.9", _model_name_or_path="x"
    )
    edit(copy / "tokenizer_config.json", name_or_path="somewhere", is_local=True)
    (copy / "README.md").write_text("hello")
    (copy / "modeling_custom.py").write_text("raise SystemExit")
    (copy / "pytorch_model.bin").write_bytes(b"never opened")
    assert identify(original) == identify(copy)


def test_shards_and_metadata_do_not_count(original: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    sharded = Path(shutil.copytree(original, tmp_path / "sharded"))
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[1::2], "model-00002-of-00002.safetensors": names[::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, sharded / shard, metadata={"made": "by me"})
    index = {
        "metadata": {},
        "weight_map": {name: shard for shard, members in shards.items() for name in members},
    }
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert identify(sharded) == identify(original)

    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"model-00002-of-00002\.safetensors: missing"):
        identify(sharded)


def test_resaved_by_transformers_in_shards_has_the_same_weights(original: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(original)
    resaved = Path(shutil.copytree(original, tmp_path / "resaved"))
    (resaved / "model.safetensors").unlink()
    model.save_pretrained(resaved, max_shard_size="60KB")
    assert len(list(resaved.glob("model-*.safetensors"))) > 1
    assert identify(resaved) == identify(original)


def test_template_in_the_tokenizer_config_is_the_same_template(original: Path, copy: Path):
    (copy / "chat_template.jinja").unlink()
    edit(copy / "tokenizer_config.json", chat_template=CHAT_TEMPLATE)
    assert chat_template(copy) == CHAT_TEMPLATE
    assert identify(original) == identify(copy)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    edit(copy / "tokenizer_config.json", chat_template=named)
    assert identify(original) == identify(copy)


def test_each_part_counts(original: Path, tmp_path: Path):
    before = identity_parts(original)

    def changed(change: str) -> set[str]:
        copy = Path(shutil.copytree(original, tmp_path / change))
        match change:
            case "config":
                edit(copy / "config.json", rms_norm_eps=0.5)
            case "generation":
                edit(copy / "generation_config.json", eos_token_id=[1, 2], _from_model_config=None)
            case "tokenizer":
                edit(copy / "tokenizer_config.json", eos_token="<|endoftext|>")
            case "vocabulary":
                text = (copy / "tokenizer.json").read_text()
                (copy / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|im_stop|>"))
            case "template":
                (copy / "chat_template.jinja").write_text(CHAT_TEMPLATE + " ")
            case "no template":
                (copy / "chat_template.jinja").unlink()
            case "one weight":
                data = bytearray((copy / "model.safetensors").read_bytes())
                data[-1] ^= 1
                (copy / "model.safetensors").write_bytes(data)
        after = identity_parts(copy)
        assert identify(copy) != identify(original)
        return {part for part in before if before[part] != after[part]}

    assert changed("config") == {"config"}
    assert changed("generation") == {"config"}
    assert changed("tokenizer") == {"tokenizer"}
    assert changed("vocabulary") == {"tokenizer"}
    assert changed("template") == {"chat_template"}
    assert changed("no template") == {"chat_template"}
    assert changed("one weight") == {"weights"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"layers.0.mlp.up", b"layers.0.mlp.xp"),
        (b'"shape":[128,64]', b'"shape":[64,128]'),
        (b'"BF16"', b'"F16" '),
    ],
)
def test_name_shape_and_type_of_a_tensor_count(original: Path, copy: Path, old: bytes, new: bytes):
    path = copy / "model.safetensors"
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    assert identify(copy) != identify(original)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(copy: Path, name: str):
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(BaseModelError, match=rf"{name}: pickled weights .* expected model\.safetensors"):
        identify(copy)


def test_damaged_files_are_named(copy: Path):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    for damaged, reason in (
        (data[:-100], "truncated"),
        (data + b"more", "4 bytes belong to no tensor"),
        (b"\xff" * 100, "not a safetensors file"),
        (data[:8] + b"x" + data[9:], "unreadable header"),
        (b"", "not a safetensors file"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(BaseModelError, match=f"model.safetensors: .*{reason}"):
            identify(copy)
    path.write_bytes(data)
    (copy / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"config\.json: not valid JSON"):
        identify(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(BaseModelError, match=r"config\.json: expected a JSON object"):
        identify(copy)
    (copy / "config.json").unlink()
    with pytest.raises(BaseModelError, match=r"expected a model directory with config\.json"):
        identify(copy)


def test_an_index_cannot_name_files_elsewhere(copy: Path):
    (copy / "model.safetensors").rename(copy.parent / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "../model-00001-of-00001.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="is not a name like"):
        identify(copy)


def test_gguf_is_its_own_hash(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF and then some")
    assert identify(path) == sha256_file(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(BaseModelError, match="not a GGUF file"):
        identify(path)


def test_stamp_sees_writes_without_reading(copy: Path):
    before = stamp(copy)
    assert stamp(copy) == before
    path = copy / "model.safetensors"
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, and mtime set back
    assert stamp(copy) != before


def test_identity_memo_survives_damage(tmp_path: Path):
    remember_identity(tmp_path, "k", "a" * 64)
    assert recall_identity(tmp_path, "k") == "a" * 64
    for damaged in ("", "[]", "{}", '{"identity": "short"}', '{"identity": null}'):
        (tmp_path / "k.json").write_text(damaged)
        assert recall_identity(tmp_path, "k") is None


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True), st.binary(min_size=32, max_size=32))
def test_revision_keys_split_again(family: str, digest: bytes):
    assert split_revision(revision_key(family, digest.hex())) == (family, digest.hex()[:12])


@pytest.mark.parametrize(
    "key", ["", "family", "family@123", "@0123456789ab", "family@0123456789aB", "f@0123456789abc"]
)
def test_other_keys_are_refused(key: str):
    with pytest.raises(BaseModelError, match="expected a family, '@' and 12 hex digits"):
        split_revision(key)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=50)
@given(json_values)
def test_stripping_removes_volatile_keys_only(value: object):
    assert strip(value) == value
    assert strip({"a": [{"_name_or_path": "x", "b": value}]}) == {"a": [{"b": value}]}
    assert strip({"name_or_path": 17}) == {"name_or_path": 17}  # an entry of a vocabulary
