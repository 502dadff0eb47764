"""What an adapter is made of: its input key, and the manifest that travels with its weights."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.spec import CustomizationSpec

if TYPE_CHECKING:
    from ml_assets.adapters.incremental import Update

CODE_VERSION = "1"
"""Raise when the rendering of prompts or the choice of rows changes; the trainer has a version of its own."""


def input_key(
    spec: CustomizationSpec,
    base_identity: str,
    dataset_digest: str,
    training_version: str,
    update: Mapping[str, Any] | None = None,
    port: Mapping[str, Any] | None = None,
    must_pass: int = 0,
) -> str:
    """64 hex: the hash of all that goes into a training. Equal keys need no second training. `update` names
    what an incremental update goes on from, `port` how an adapter comes from another base, `must_pass` how
    many production failures get more of the training."""
    parts: dict[str, Any] = {
        "customization": spec.name,
        "base_identity": base_identity,
        "dataset": dataset_digest,
        "prompt": spec.prompt.model_dump(),
        "recipe": spec.adapter.model_dump(),
        "code": [CODE_VERSION, training_version],
    }
    if spec.evaluation.answer_by != "generation":  # how an adapter answers is part of it
        parts["answer_by"] = spec.evaluation.answer_by
    if update is not None:
        parts["update"] = update
    if port is not None:
        parts["port"] = port
    if must_pass:
        parts["must_pass"] = must_pass
    return sha256_bytes(canonical_json(parts))


def build_manifest(
    *,
    spec: CustomizationSpec,
    base_manifest: Mapping[str, Any],
    dataset_digest: str,
    key: str,
    targets: list[str],
    training_version: str,
    hardware_class: str,
    steps: int,
    trained_tokens: int,
    fingerprint: Mapping[str, Any],
    labels: list[str],
    update: "Update | None" = None,
    port: Mapping[str, Any] | None = None,
    must_pass: int = 0,
) -> dict[str, Any]:
    """The adapter's manifest.json. It holds nothing that differs between two trainings of the same inputs on
    the same hardware class: times and costs are in the artifact store's index record."""
    return {
        "customization": spec.name,
        "kind": spec.adapter.kind,
        "base_revision": base_manifest["revision"],
        "base_identity": base_manifest["identity"],
        "weights_sha256": base_manifest["weights_sha256"],
        "tokenizer_sha256": base_manifest["tokenizer_sha256"],
        "chat_template_sha256": base_manifest["chat_template_sha256"],
        "chat_template": base_manifest["chat_template"],
        "dataset": dataset_digest,
        "prompt": spec.prompt.model_dump(),
        "answer_by": spec.evaluation.answer_by,
        "labels": labels,
        "recipe": spec.adapter.model_dump(),
        "seed": spec.adapter.seed,
        "targets": targets,
        "code_version": f"{CODE_VERSION}.{training_version}",
        "libraries": library_versions(),
        "hardware_class": hardware_class,
        "parent": update.parent.digest if update else port["parent"] if port else None,
        "rung": "incremental_update" if update else port["rung"] if port else "full_training",
        "update": {
            "generation": update.generation,
            "replay": update.replay,
            "layers": update.layers,
            "weight": update.weight,
            "new_rows": len(update.new),
            "replayed_rows": len(update.replayed),
        }
        if update
        else None,
        **({"port": dict(port)} if port else {}),
        "must_pass": must_pass,
        "steps": steps,
        "trained_tokens": trained_tokens,
        "input_key": key,
        "fingerprint": dict(fingerprint),
    }


def library_versions() -> dict[str, str]:
    """Versions of what training runs on."""
    found = {"python": platform.python_version()}
    for package in ("evergreen", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
