"""A base model in memory, and the adapters on it."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ml_assets.artifacts import read_json
from ml_assets.engine import hardware, linear, norms, packing
from ml_assets.engine.examples import is_prompted
from ml_assets.engine.lora import Adapter, IncompatibleAdapter, LoraLayers, Route, read_adapter
from ml_assets.engine.prompting import ChatFormat

ADAPTER_PINS = ("base_identity", "tokenizer_sha256", "chat_template_sha256")
"""Fields of an adapter's manifest that must be those of the base it is loaded on."""


def quiet() -> None:
    """Keep libraries from writing progress bars, and from telling anyone that they are used."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


class Base:
    """A loaded base model.

    `model` is the transformers model, `lora` the adapters on it; `manifest` is the artifact's; `chat`
    tokenizes conversations; `packs` says whether the model computes sequences one after the other in one
    pass. Not thread-safe: one thread computes with it.
    """

    def __init__(self, model: Any, tokenizer: Any, manifest: dict[str, Any], device: torch.device):
        self.model = model
        self.tokenizer = tokenizer
        self.manifest = manifest
        self.device = device
        self.chat = ChatFormat(tokenizer, manifest.get("eos_token_ids", ()))
        self.context_length: int = manifest["context_length"]
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else self.chat.end_of_turn
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.packs = packing.packs(model)
        self.draws = draws_in_training(model)
        norms.replace_rms_norms(model)
        linear.pack_linear_layers(model)
        self.lora = LoraLayers(model)
        self.adapters: dict[str, dict[str, Any]] = {}

    @property
    def random(self) -> bool:
        """Whether a forward pass draws random numbers, as with dropout: rows can't share what they compute
        then, and threads would draw from one generator."""
        if not self.model.training:
            return False
        return self.draws or any(self.lora.adapters[name].dropout > 0 for name in self.lora.route.names)

    def attach(self, name: str, directory: Path) -> None:
        """Load the adapter in `directory` (PEFT files and manifest.json) under `name`, not yet active. One
        that is a prompt alone has no weights, and changes nothing here: its examples go into the prompts.

        Raises IncompatibleAdapter when its manifest pins another base, tokenizer or chat template, when a
        weight is missing, unexpected or of another shape, or is not a finite number.
        """
        self.insert(name, self.read_adapter(directory))

    def read_adapter(self, directory: Path) -> tuple[Adapter, dict[str, Any]]:
        """An adapter and its manifest, read and checked as `attach` does: what any thread may do."""
        manifest = read_json(directory / "manifest.json")
        for field in ADAPTER_PINS:
            ours = self.manifest["identity" if field == "base_identity" else field]
            if manifest.get(field) != ours:
                raise IncompatibleAdapter(
                    f"{directory}: made for {field} {str(manifest.get(field))[:12]}, "
                    f"the base {self.manifest['revision']} has {str(ours)[:12]}"
                )
        if is_prompted(manifest):
            return Adapter(0, 1.0, {}), manifest
        return read_adapter(self.model, directory, self.model.dtype, self.device), manifest

    def insert(self, name: str, read: tuple[Adapter, dict[str, Any]]) -> None:
        """Put what `read_adapter` gave into the layers."""
        if name in self.adapters:
            raise ValueError(f"an adapter named {name!r} is attached already")
        self.lora.add(name, read[0])
        self.adapters[name] = read[1]

    def detach(self, name: str) -> None:
        """Forget an attached adapter and free its memory. The last one gone leaves the plain model."""
        del self.adapters[name]
        self.lora.remove(name)

    def count_prompt(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Tokens of a conversation."""
        return len(self.chat.prompt_ids(messages))

    def count_answer(self, text: str) -> int:
        """Tokens of an answer, the one that ends it included."""
        return len(self.chat.target_ids(text))

    def active_from(self, name: str | None, prompt: Sequence[int]) -> int:
        """The token of `prompt` from which adapter `name` works; its length for the bare base."""
        return len(prompt) if name is None else self.lora.adapters[name].active_from(prompt)

    @contextlib.contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Inside, the model runs with adapter `name`, or bare with None. An activated LoRA
        works from its invocation on in `forward`, `generation` and `scoring`, on every token elsewhere."""
        with self.lora.routed(Route(() if name is None else (name,))):
            yield


@torch.inference_mode()
def draws_in_training(model: Any) -> bool:
    """Whether the forward pass of a model that is being trained draws random numbers. Found by computing:
    dropout has many names in configurations, and not all of it is a module."""
    was, device = model.training, model.device

    def states() -> list[torch.Tensor]:
        found = [torch.get_rng_state()]
        return [*found, torch.cuda.get_rng_state(device)] if device.type == "cuda" else found

    before = states()
    try:
        model.train()
        model(input_ids=torch.arange(4, device=device)[None])
        return not all(torch.equal(a, b) for a, b in zip(before, states(), strict=True))
    finally:
        model.train(was)
        torch.set_rng_state(before[0])
        if len(before) > 1:
            torch.cuda.set_rng_state(before[1], device)


@dataclass(frozen=True)
class Reader:
    """What tokenizes conversations as a base does, without its weights."""

    chat: ChatFormat


def load_reader(directory: Path) -> Reader:
    """How the base model artifact in `directory` tokenizes conversations."""
    quiet()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return Reader(ChatFormat(tokenizer, read_json(directory / "manifest.json").get("eos_token_ids", ())))


def load_base(directory: Path, dtype: torch.dtype | None = None) -> Base:
    """Load a base model artifact. `dtype` is that of the computation; by default what is fast here."""
    quiet()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = hardware.device()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype or hardware.compute_dtype(),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model.to(device)  # type: ignore[arg-type]
    model.eval().requires_grad_(False)
    return Base(model, tokenizer, read_json(directory / "manifest.json"), device)
