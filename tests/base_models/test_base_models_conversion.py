"""Conversion to bf16 safetensors and the probe, on real tiny models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, CHAT_TEMPLATE, CONTEXT, tiny_gguf, tiny_model

from ml_assets.base_models import conversion, probe
from ml_assets.base_models.identity import BaseModelError, identity_parts

LLAMA_ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
LLAMA_ALL = sorted([*LLAMA_ATTENTION, "down_proj", "gate_proj", "up_proj"])
TARGETS = {
    "llama": (LLAMA_ALL, LLAMA_ATTENTION),
    "qwen2": (LLAMA_ALL, LLAMA_ATTENTION),
    "mistral": (LLAMA_ALL, LLAMA_ATTENTION),
    "gemma": (LLAMA_ALL, LLAMA_ATTENTION),
    "gpt2": (["c_attn", "c_fc", "c_proj"], ["attn.c_proj", "c_attn"]),
    "gpt_neox": (
        ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
        ["dense", "query_key_value"],
    ),
}


def converted(source: Path, directory: Path) -> tuple[object, object, dict]:
    directory.mkdir()
    conversion.convert(source, directory)
    model, tokenizer = conversion.load(directory)
    return model, tokenizer, probe.facts(model, tokenizer, directory)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probe_of_each_architecture(architecture: str, tmp_path: Path):
    source = tiny_model(architecture, tmp_path / "source")
    model, tokenizer, facts = converted(source, tmp_path / "converted")
    assert facts["lora_targets"] == dict(zip(("all-linear", "attention"), TARGETS[architecture], strict=True))
    assert facts["context_length"] == CONTEXT
    assert facts["model_type"] == architecture
    assert facts["architecture"] == type(model).__name__
    assert (facts["hidden_size"], facts["layers"], facts["vocab_size"]) == (64, 2, 400)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["chat_template"] == "model"
    assert facts["eos_token_ids"] == [tokenizer.eos_token_id]
    assert facts["weights_sha256"] == identity_parts(source)["weights"]  # bf16 before, bf16 after
    findings = probe.findings(model, tokenizer)
    assert [
        name for name, finding in findings.items() if not finding.passed and name != "better_than_chance"
    ] == []


@pytest.mark.parametrize(("architecture", "context"), [("gemma2", CONTEXT), ("phi3", 64)])
def test_probe_of_peculiar_architectures(architecture: str, context: int, tmp_path: Path):
    """Capped attention scores; and positions that turn otherwise for all once one is beyond a length."""
    source = tiny_model(architecture, tmp_path / "source")
    _, _, facts = converted(source, tmp_path / "converted")
    assert facts["context_length"] == context
    assert {"qkv_proj", "q_proj"} & set(facts["lora_targets"]["attention"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("role", ["all-linear", "attention"])
def test_peft_finds_exactly_these_targets(architecture: str, role: str, tmp_path: Path):
    """`all-linear` is what peft itself means by it; `attention` is those of them that are not in an MLP."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    def adapted(targets: str | list[str]) -> set[str]:
        model, _ = conversion.load(source)
        lora = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
        return {name for name, module in lora.named_modules() if isinstance(module, LoraLayer)}

    source = tiny_model(architecture, tmp_path / "source")
    model, _ = conversion.load(source)
    found = adapted(probe.lora_targets(model)[role])
    if role == "all-linear":
        assert found == adapted("all-linear")
    else:
        assert found and all(
            ".attn." in name or ".self_attn." in name or ".attention." in name for name in found
        )
        assert found == {name for name in adapted("all-linear") if "mlp" not in name}


@pytest.mark.parametrize(
    ("architecture", "targets", "attention"),
    [
        ("glm4_moe", LLAMA_ATTENTION, LLAMA_ATTENTION),  # its MLP's names are those of experts to peft
        ("mamba", ["dt_proj", "in_proj", "x_proj"], []),  # peft refuses its out_proj
    ],
)
def test_what_peft_would_not_adapt_by_its_name_is_no_target(
    architecture: str, targets: list[str], attention: list[str], tmp_path: Path
):
    model, _ = conversion.load(tiny_model(architecture, tmp_path))
    assert probe.lora_targets(model) == {"all-linear": targets, "attention": attention}


def test_conversion_is_deterministic_and_says_nothing_of_its_place(tmp_path: Path):
    files = []
    for name in ("one", "another"):
        source = tiny_model("llama", tmp_path / name / "source")
        (tmp_path / name / "out").mkdir()
        conversion.convert(source, tmp_path / name / "out")
        files.append({path.name: path.read_bytes() for path in (tmp_path / name / "out").iterdir()})
    assert files[0] == files[1]
    assert not any(b"transformers_version" in data or b"source" in data for data in files[0].values())


def test_float32_becomes_bfloat16(tmp_path: Path):
    source = tiny_model("llama", tmp_path / "source")
    tensors = {name: t.float() for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    converted(source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}


def test_gguf_gives_the_model_it_was_made_from(tmp_path: Path):
    model, tokenizer, facts = converted(tiny_gguf(tmp_path / "m.gguf"), tmp_path / "from-gguf")
    expected, expected_tokenizer = conversion.load(tiny_model("llama", tmp_path / "original"))
    ids = torch.tensor([[5, 6, 7, 300, 399]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    text = "turn on the light<|im_end|>"
    assert tokenizer(text)["input_ids"] == expected_tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert facts["context_length"] == CONTEXT
    assert facts["eos_token_ids"] == [expected_tokenizer.eos_token_id]
    assert facts["lora_targets"]["attention"] == LLAMA_ATTENTION
    config = json.loads((tmp_path / "from-gguf" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"


def test_a_base_without_chat_template_is_plain(tmp_path: Path):
    model, tokenizer, facts = converted(
        tiny_model("gpt2", tmp_path / "source", chat_template=False), tmp_path / "converted"
    )
    assert facts["chat_template"] == "plain"
    assert not (tmp_path / "converted" / "chat_template.jinja").exists()
    assert "Is the light on?" in probe.rendered_example(tokenizer)
    assert probe.findings(model, tokenizer)["chat_template"].passed


def test_the_default_of_several_templates_is_kept(tmp_path: Path):
    source = tiny_model("llama", tmp_path / "source")
    (source / "chat_template.jinja").unlink()
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": CHAT_TEMPLATE},
        {"name": "tool_use", "template": "x"},
    ]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    _, tokenizer, facts = converted(source, tmp_path / "converted")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert facts["chat_template_sha256"] == identity_parts(source)["chat_template"]


def broken(source: Path, how: str) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    match how:
        case "nan":
            tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        case "infinite":
            tensors = {name: t.float() for name, t in tensors.items()}
            tensors["model.norm.weight"][0] = 3.4e38  # finite in float32, not in bfloat16
        case "missing":
            del tensors["model.layers.0.self_attn.q_proj.weight"]
        case "shape":
            tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 32, dtype=torch.bfloat16)
        case "tokenizer":
            config["vocab_size"] = 390
            tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:390].clone()
        case "unknown":
            config["model_type"] = "brand_new"
        case "code":
            config |= {"model_type": "brand_new", "auto_map": {"AutoModelForCausalLM": "modeling_new.Model"}}
            config["auto_map"]["AutoConfig"] = "modeling_new.Config"
            (source / "modeling_new.py").write_text(f"open({str(source / 'ran')!r}, 'w')")
        case "quantized":
            config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        case "no end":
            del tokenizer["eos_token"]
            config["eos_token_id"] = None
            (source / "generation_config.json").unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", r"NaN or infinity in tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        ("infinite", r"NaN or infinity in tensor 'model\.norm\.weight'"),
        ("missing", r"missing tensor 'model\.layers\.0\.self_attn\.q_proj\.weight', which LlamaForCausalLM"),
        (
            "shape",
            r"tensor 'model\.layers\.0\.self_attn\.q_proj\.weight' of another shape than config\.json says",
        ),
        ("tokenizer", "token ids up to 399, the model embeds 390"),
        ("unknown", "brand_new"),
        ("code", "cannot be loaded"),
        ("quantized", r"config\.json: quantized weights \(gptq\)"),
        ("no end", "names an end-of-text token"),
    ],
)
def test_broken_bases_are_refused(how: str, message: str, tmp_path: Path):
    source = tiny_model("llama", tmp_path / "source")
    broken(source, how)
    (tmp_path / "out").mkdir()
    with pytest.raises(BaseModelError, match=message) as raised:
        conversion.convert(source, tmp_path / "out")
    assert str(source) in str(raised.value)
    assert not (source / "ran").exists()
    assert not list((tmp_path / "out").iterdir())


def test_an_adapter_in_the_folder_is_not_loaded(tmp_path: Path):
    """transformers loads an adapter_config.json that it finds beside a model on top of it."""
    from peft import LoraConfig, get_peft_model

    source = tiny_model("llama", tmp_path / "source")
    model, _ = conversion.load(source)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        shutil.copy(path, source)
    converted(source, tmp_path / "out")
    assert identity_parts(tmp_path / "out")["weights"] == identity_parts(source)["weights"]


def test_damaged_gguf(tmp_path: Path):
    path = tiny_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BaseModelError, match=r"m\.gguf"):
        conversion.convert(path, tmp_path / "out")


def test_a_model_that_gives_nan_is_found(tmp_path: Path):
    model, tokenizer = conversion.load(tiny_model("llama", tmp_path / "source"))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    finding = probe.findings(model, tokenizer)["finite_logits"]
    assert not finding.passed


def test_a_template_that_rewrites_the_prompt_is_found(tmp_path: Path):
    model, tokenizer = conversion.load(tiny_model("llama", tmp_path / "source"))
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    finding = probe.findings(model, tokenizer)["chat_template"]
    assert not finding.passed and "is not how the conversation" in finding.description


names = st.lists(st.sampled_from(["a", "b", "c", "0", "1"]), min_size=1, max_size=4).map(".".join)


@settings(max_examples=300)
@given(st.sets(names, max_size=12), st.data())
def test_suffixes_select_exactly_what_is_wanted(everything: set[str], data: st.DataObject):
    wanted = data.draw(st.sets(st.sampled_from(sorted(everything)))) if everything else set()
    found = probe.suffixes(wanted, everything)
    selected = {n for n in everything for s in found if n == s or n.endswith(f".{s}")}
    assert wanted <= selected
    # a full name can be another's suffix; then nothing shorter than peft's own rule can tell them apart
    clashes = {n for n in everything - wanted if any(n.endswith(f".{w}") for w in wanted)}
    assert selected - wanted <= clashes
