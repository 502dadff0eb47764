"""What a base model is, found by looking at the loaded model: nothing here depends on its name."""

import copy
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_assets.base_models import identity
from ml_assets.base_models.conversion import end_tokens
from ml_assets.base_models.identity import BaseModelError

PROBE_TEXT = (
    "The quick brown fox jumps over the lazy dog. On Monday the library opens at nine in the morning, and "
    "everyone who wants to read a book there is welcome. Water boils at 100 degrees; ice melts at zero."
)
ROUND_TRIP = (
    "Turn on the kitchen light.",
    "Für 3,50 € öffnen: naïve café?",
    '{"name": "灯", "on": true}\n\tok 🙂',
)
SYSTEM = {"role": "system", "content": "Answer briefly."}
EXAMPLE = [{"role": "user", "content": "Is the light on?"}]
ANSWER = {"role": "assistant", "content": "Yes."}


@dataclass(frozen=True)
class Finding:
    """Result of one check: `passed`, and in words what was seen."""

    passed: bool
    description: str


def facts(model: Any, tokenizer: Any, directory: Path) -> dict[str, Any]:
    """The manifest's description of a converted base model; `directory` holds its files."""
    config = model.config.get_text_config()
    template = tokenizer.chat_template
    parts = identity.identity_parts(directory)
    return {
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "context_length": context_length(config, tokenizer),
        "vocab_size": model.get_input_embeddings().weight.shape[0],
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "chat_template": "model" if template else "plain",
        "chat_template_sha256": parts["chat_template"],
        "tokenizer_sha256": parts["tokenizer"],
        "weights_sha256": parts["weights"],
        "lora_targets": lora_targets(model),
        "eos_token_ids": end_tokens(model, tokenizer),
    }


def context_length(config: Any, tokenizer: Any) -> int:
    """Longest sequence in tokens that the model states. Models without positions of their own (ALiBi, state
    space) state it in other words, or only in the tokenizer. With LongRoPE it is what the model was trained
    on: beyond, all positions of a pass turn otherwise, also those of shorter sequences beside it."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None)
        if isinstance(original, int) and original > 0:
            return original
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    if tokenizer.model_max_length < 10**9:  # more is transformers' way to say 'not stated'
        return int(tokenizer.model_max_length)
    raise BaseModelError(
        "neither config.json nor tokenizer_config.json states a context length (max_position_embeddings)"
    )


# -- LoRA targets --------------------------------------------------------------------------------------


def lora_targets(model: Any) -> dict[str, list[str]]:
    """{"all-linear": [...], "attention": [...]}: name suffixes for peft's `target_modules`.

    A target is a linear layer (torch's, or GPT-2's transposed Conv1D; a router of experts that answers more
    than a product is none) that is not the output head, and that peft would adapt under its name, so that an
    adapter can leave. It belongs to attention when it lies in a
    module that computes attention in a forward pass; a model that does so without transformers' attention
    interface, or not at all, has none.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    linear = {
        name
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, Conv1D))
        and type(module).forward in (nn.Linear.forward, Conv1D.forward)
        and module is not head
    }
    if not _adapts(model, linear):
        kinds = {name.rpartition(".")[2] for name in linear}
        alike = [{name for name in linear if name.rpartition(".")[2] == kind} for kind in kinds]
        linear = {name for names in alike if _adapts(model, names) for name in names}
    blocks = attention_blocks(model)
    attention = {name for name in linear if any(name.startswith(f"{block}.") for block in blocks)}
    return {
        "all-linear": suffixes(linear, modules),
        "attention": suffixes(attention, modules),
    }


def _adapts(model: Any, names: set[str]) -> bool:
    """Whether peft, given the suffixes of these linear layers, puts LoRA on them and on nothing else. It
    refuses some layers of state spaces, and where a model has experts takes its plain `gate_proj`, `up_proj`
    and `down_proj` for theirs."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    try:
        with torch.device("meta"):
            blank = type(model)(copy.deepcopy(model.config))
    except Exception:  # a model that computes with its weights as it is made: nothing to ask peft about
        return True
    wanted = suffixes(names, [name for name, _ in model.named_modules()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is seen in what it does
        try:
            inject_adapter_in_model(LoraConfig(r=1, target_modules=wanted), blank, low_cpu_mem_usage=True)
        except ValueError:
            return False
    return {name for name, module in blank.named_modules() if isinstance(module, LoraLayer)} == names


def attention_blocks(model: Any) -> set[str]:
    """Names of the modules that call transformers' attention interface in a forward pass."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from ml_assets.engine.packing import attend  # transformers' own refuses soft caps

    seen: set[int] = set()

    def record(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(id(module))
        return attend(module, *args, **kwargs)

    AttentionInterface.register("evergreen_probe", record)
    AttentionMaskInterface.register("evergreen_probe", sdpa_mask)
    usual = model.config._attn_implementation
    try:
        model.set_attn_implementation("evergreen_probe")
        with torch.inference_mode():
            ids = torch.tensor([[0, 1]], device=model.device)
            model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        model.set_attn_implementation(usual)
    return {name for name, module in model.named_modules() if id(module) in seen}


def suffixes(wanted: Iterable[str], names: Iterable[str]) -> list[str]:
    """The shortest dotted suffixes that select exactly the `wanted` of all module `names`, in the way of
    peft: a module is selected when its name ends with a suffix, at a dot.

    In GPT-2, `c_proj` names a layer of attention and one of the MLP, so attention alone is `attn.c_proj`.
    """
    wanted, others = set(wanted), set(names) - set(wanted)
    found: set[str] = set()
    for name in sorted(wanted):
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            suffix = ".".join(parts[start:])
            if start == 0 or not any(other == suffix or other.endswith(f".{suffix}") for other in others):
                found.add(suffix)
                break
    return sorted(found)


# -- checks --------------------------------------------------------------------------------------------


def findings(model: Any, tokenizer: Any) -> dict[str, Finding]:
    """The checks of a converted base model, by name, from one forward pass over a short text."""
    logits, loss, tokens = _forward(model, tokenizer)
    chance = math.log(model.get_input_embeddings().weight.shape[0])
    return {
        "finite_logits": Finding(logits, f"forward pass over {tokens} tokens"),
        "better_than_chance": Finding(
            loss < chance,
            f"{loss:.2f} nats per token of plain English; guessing gives {chance:.2f}",
        ),
        "tokenizer_round_trip": _round_trip(tokenizer),
        "chat_template": _chat_template(tokenizer),
    }


def _forward(model: Any, tokenizer: Any) -> tuple[bool, float, int]:
    import torch

    ids = tokenizer(PROBE_TEXT, return_tensors="pt", add_special_tokens=True)["input_ids"].to(model.device)
    ids = ids[:, : context_length(model.config.get_text_config(), tokenizer)]
    with torch.inference_mode():
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    return bool(torch.isfinite(logits).all()), float(loss), ids.shape[1]


def _round_trip(tokenizer: Any) -> Finding:
    for text in ROUND_TRIP:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back.removeprefix(" ") != text:  # sentencepiece starts a text with a space
            return Finding(False, f"{text!r} comes back as {back!r}: such text cannot be an answer")
    return Finding(True, f"{len(ROUND_TRIP)} texts come back unchanged")


def _chat_template(tokenizer: Any) -> Finding:
    """An answer is trained as the continuation of the prompt, so the template must not rewrite the prompt
    once the answer is there."""
    from ml_assets.engine.prompting import ChatFormat

    try:
        chat = ChatFormat(tokenizer)
        prompt = chat.prompt_text(EXAMPLE)
        whole = chat.prompt_text([*EXAMPLE, ANSWER], generation_prompt=False)
    except Exception as error:  # a template can raise anything
        return Finding(False, f"the chat template fails: {error}")
    if not whole.startswith(prompt):
        return Finding(False, f"the prompt {prompt!r} is not how the conversation {whole!r} begins")
    return Finding(True, "a conversation begins with its prompt")


def rendered_example(tokenizer: Any) -> str:
    """The prompt of a short conversation as the model sees it, or why it cannot be rendered."""
    from ml_assets.engine.prompting import ChatFormat

    try:
        return ChatFormat(tokenizer).prompt_text([SYSTEM, *EXAMPLE])
    except Exception as error:  # a template can raise anything
        return f"the chat template fails: {error}"
