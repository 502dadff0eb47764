"""Loaded tiny bases with the manifest that a base model artifact has."""

import json
from pathlib import Path

import torch
from tiny_models import CONTEXT, tiny_model

from ml_assets.artifacts import sha256_bytes
from ml_assets.engine.loading import Base, load_base

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "lfm2": ["in_proj", "out_proj", "q_proj", "w1", "w2"],
    "bamba": ["in_proj", "q_proj", "v_proj", "up_proj", "down_proj"],
    "mamba": ["in_proj", "x_proj"],
    "recurrent_gemma": ["linear_x", "linear_out", "q_proj", "up_proj", "down_proj"],
    "rwkv": ["key", "value", "output"],
}
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_base(
    architecture: str,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    chat_template: bool = True,
    seed: int = 0,
) -> Base:
    """A random base of this architecture, ready to compute."""
    tiny_model(architecture, directory, chat_template, seed)
    manifest = {
        "revision": f"tiny-{architecture}@{seed:012d}",
        "identity": sha256_bytes(f"{architecture}{seed}".encode()),
        "tokenizer_sha256": "t",
        "chat_template_sha256": "c",
        "context_length": CONTEXT,
        "eos_token_ids": [],
        "lora_targets": {"all-linear": TARGETS.get(architecture, LLAMA_TARGETS)},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return load_base(directory, dtype)
