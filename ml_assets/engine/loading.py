"""A base model in memory, and the adapters on it."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ml_assets.artifacts import read_json
from ml_assets.engine import hardware
from ml_assets.engine.prompting import ChatFormat

ADAPTER_PINS = ("base_identity", "tokenizer_sha256", "chat_template_sha256")
"""Fields of an adapter's manifest that must be those of the base it is loaded on."""


class IncompatibleAdapter(Exception):
    """An adapter was made for another base, or its files do not fit the model; the message says how."""


def quiet() -> None:
    """Keep libraries from writing progress bars, and from telling anyone that they are used."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("peft").setLevel(logging.ERROR)


class Base:
    """A loaded base model.

    `model` is the transformers model, or a PeftModel around it once an adapter is attached; `manifest` is the
    artifact's; `chat` tokenizes conversations. Not thread-safe: one thread computes with it.
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
        self.adapters: dict[str, dict[str, Any]] = {}

    @property
    def plain_model(self) -> Any:
        """The transformers model under the adapters."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def attach(self, name: str, directory: Path) -> None:
        """Load the adapter in `directory` (PEFT files and manifest.json) under `name`, not yet active.

        Raises IncompatibleAdapter when its manifest pins another base, tokenizer or chat template, when a
        weight is missing, unexpected or of another shape, or is not a finite number.
        """
        from peft import LoraConfig, PeftModel
        from safetensors.torch import load_file

        if name in self.adapters:
            raise ValueError(f"an adapter named {name!r} is attached already")
        manifest = read_json(directory / "manifest.json")
        for field in ADAPTER_PINS:
            ours = self.manifest["identity" if field == "base_identity" else field]
            if manifest.get(field) != ours:
                raise IncompatibleAdapter(
                    f"{directory}: made for {field} {str(manifest.get(field))[:12]}, "
                    f"the base {self.manifest['revision']} has {str(ours)[:12]}"
                )
        config = LoraConfig(**{**read_json(directory / "adapter_config.json"), "inference_mode": True})
        if hasattr(self.model, "peft_config"):
            self.model.add_adapter(name, config, low_cpu_mem_usage=False)
        else:
            self.model = PeftModel(self.model, config, adapter_name=name, autocast_adapter_dtype=False)
        try:
            _fill(self.model, name, load_file(directory / "adapter_model.safetensors"), directory)
        except BaseException:
            self.adapters[name] = manifest
            self.detach(name)
            raise
        self.model.eval()
        self.adapters[name] = manifest

    def detach(self, name: str) -> None:
        """Forget an attached adapter and free its memory. The last one gone leaves the plain model."""
        del self.adapters[name]
        if len(self.model.peft_config) > 1:
            self.model.delete_adapter(name)
        else:
            self.model = self.model.unload()

    @contextlib.contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Inside, the model runs with adapter `name`, or bare with None."""
        if name is None:
            if self.adapters:
                with self.model.disable_adapter():
                    yield
            else:
                yield
            return
        if name not in self.adapters:
            raise KeyError(f"no adapter named {name!r} is attached; attached: {sorted(self.adapters)}")
        self.model.set_adapter(name, inference_mode=True)
        yield


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


def _fill(model: Any, name: str, weights: dict[str, torch.Tensor], directory: Path) -> None:
    """Copy adapter weights into the model, every one of them: peft itself loads what fits and keeps silent
    about the rest."""
    wanted = adapter_parameters(model, name)
    missing, unexpected = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or unexpected:
        raise IncompatibleAdapter(
            f"{directory}: weights do not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    for key, parameter in wanted.items():
        tensor = weights[key]
        if tensor.shape != parameter.shape:
            raise IncompatibleAdapter(
                f"{directory}: {key} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise IncompatibleAdapter(f"{directory}: {key} holds values that are not finite numbers")
        with torch.no_grad():
            parameter.copy_(tensor)


def adapter_parameters(model: Any, name: str) -> dict[str, torch.nn.Parameter]:
    """LoRA parameters of one adapter under the names that PEFT gives them in a file, in model order."""
    middle = f".{name}."
    return {
        key.replace(middle, "."): parameter
        for key, parameter in model.named_parameters()
        if "lora_" in key and middle in key
    }
