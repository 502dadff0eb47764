"""One adapter: from a dataset and a base to a published artifact, or the one that was published before."""

import datetime
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_assets.adapters.fingerprint import choose_probes, make_fingerprint, measure
from ml_assets.adapters.manifest import build_manifest, input_key
from ml_assets.adapters.recipe import (
    answer_labels,
    checkpoint_folder,
    resolve_targets,
    training_examples,
)
from ml_assets.artifacts import ArtifactError, ArtifactRef, ArtifactStore, canonical_json, read_json
from ml_assets.datasets.failures import drilled
from ml_assets.datasets.snapshot import load_rows
from ml_assets.spec import CustomizationSpec

if TYPE_CHECKING:
    from ml_assets.adapters.incremental import Update
    from ml_assets.adapters.port import Port, Prepared
    from ml_assets.engine.training import TrainResult

KIND = "adapter"

UNTRAINABLE = (ValueError, FloatingPointError)
"""What `train_adapter` raises when another attempt on the same inputs would end the same way."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterInputs:
    """What a training reads, opened and verified. With `update`, it goes on from an earlier adapter; with
    `port`, from one on another base."""

    spec: CustomizationSpec
    base_directory: Path
    base_manifest: dict[str, Any]
    dataset_directory: Path
    dataset_digest: str
    update: "Update | None" = None
    port: "Port | None" = None

    @property
    def key(self) -> str:
        """The input key: 64 hex."""
        from ml_assets.engine.training import TRAINING_VERSION

        identity = self.base_manifest["identity"]
        update = self.update.identity() if self.update else None
        port = self.port.identity() if self.port else None
        return input_key(
            self.spec, identity, self.dataset_digest, TRAINING_VERSION, update, port, self.must_pass
        )

    @property
    def must_pass(self) -> int:
        """Production failures that the gate may hold the adapter to; 0 where the dataset has no feedback."""
        told = read_json(self.dataset_directory / "manifest.json").get("feedback")
        return self.spec.feedback.must_pass if told else 0


@dataclass(frozen=True)
class TrainedAdapter:
    """A published adapter. `record` holds what may differ between two trainings of it: `seconds` of the
    process that ended it, `earlier_seconds` of those that it resumed, `tokens_per_second`, `losses`,
    `validation`, `trained_at`, `resumed_from`."""

    ref: ArtifactRef
    record: dict[str, Any]
    reused: bool


def open_inputs(
    spec: CustomizationSpec, store: ArtifactStore, base_model: ArtifactRef, dataset: ArtifactRef
) -> AdapterInputs:
    """Open and verify what a training reads. Raises ArtifactError that names a damaged file."""
    base_directory = store.open(base_model)
    manifest = read_json(base_directory / "manifest.json")
    return AdapterInputs(spec, base_directory, manifest, store.open(dataset), dataset.digest)


def recall_adapter(store: ArtifactStore, key: str) -> TrainedAdapter | None:
    """What the inputs with this key gave before; None where there is nothing, or it is damaged."""
    known = store.recall(KIND, key)
    if known is None:
        return None
    try:
        store.open(known[0])
    except ArtifactError as error:
        _log.warning("made again, because what was published is damaged: %s", error)
        return None
    return TrainedAdapter(*known, reused=True)


def train_adapter(
    inputs: AdapterInputs,
    store: ArtifactStore,
    home: Path,
    *,
    on_progress: Callable[[Any], None] | None = None,
    checkpoint_seconds: float = 30.0,
    reuse: bool = True,
) -> TrainedAdapter:
    """Train and publish, or find what these inputs gave before.

    With `reuse=False` neither the memo nor a checkpoint nor kept prompts are used, and the memo is left as it
    is. `on_progress` gets `ml_assets.engine.training.Progress`.

    Raises:
        BadExample: a row is empty or too long for the base (a ValueError).
        NoEffect: the adapter learned nothing (a ValueError).
        FloatingPointError: the training diverged.
        OSError: the disk is full; nothing is published, and the checkpoint stays for the next run.
    """
    from ml_assets.adapters.port import Prepared, prepare
    from ml_assets.engine import hardware
    from ml_assets.engine.loading import load_base
    from ml_assets.engine.training import TRAINING_VERSION, train_lora

    started = time.monotonic()
    key = inputs.key
    if reuse and (known := recall_adapter(store, key)):
        return known

    hardware.prepare_process()
    spec = inputs.spec
    targets = resolve_targets(spec.adapter, inputs.base_manifest)
    base = load_base(inputs.base_directory, hardware.compute_dtype(home))
    rows = load_rows(inputs.dataset_directory, "train")
    labels = answer_labels(spec, rows)
    checkpoints = checkpoint_folder(home, key)
    with (
        hardware.computing(home),
        store.staging(KIND) as staging,
        store.staging("prompts") as scratch,
    ):
        if inputs.port:
            prepared = prepare(inputs, inputs.port, base, store, home, reuse)
        else:
            chosen = inputs.update.rows if inputs.update else [*rows, *drilled(rows, inputs.must_pass)]
            start = inputs.update.parent_directory if inputs.update else None
            prepared = Prepared(start, training_examples(base, spec.prompt, chosen), spec.adapter, None)
        if inputs.port and inputs.port.rung == "copy":
            result = _copied(prepared.start, staging)
        else:
            result = train_lora(
                base,
                prepared.examples,
                prepared.recipe,
                targets,
                staging,
                checkpoints=checkpoints if reuse else None,
                checkpoint_seconds=checkpoint_seconds,
                prompt_cache=home / "prompt_cache" if reuse else scratch,
                start=prepared.start,
                last_layers=inputs.update.layers if inputs.update else 1.0,
                weight=inputs.update.weight if inputs.update else 1.0,
                stopping=prepared.stopping,
                on_progress=on_progress,
            )
        manifest = build_manifest(
            spec=spec,
            base_manifest=inputs.base_manifest,
            dataset_digest=inputs.dataset_digest,
            key=key,
            targets=targets,
            training_version=TRAINING_VERSION,
            hardware_class=hardware.hardware_class(home),
            steps=result.steps,
            trained_tokens=result.tokens,
            fingerprint=_fingerprint(base, spec, inputs.dataset_directory, staging),
            labels=labels,
            update=inputs.update,
            port=_ported(inputs, prepared, result),
            must_pass=inputs.must_pass,
        )
        (staging / "manifest.json").write_bytes(canonical_json(manifest) + b"\n")
        ref = store.publish_directory(KIND, staging)
    record = {
        "trained_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started if inputs.port else result.seconds, 3),
        "earlier_seconds": round(result.earlier_seconds, 3),
        "tokens_per_second": round(result.tokens / max(result.seconds + result.earlier_seconds, 1e-9), 1),
        "resumed_from": result.resumed_from,
        "losses": [round(loss, 5) for loss in result.losses],
        "validation": [[step, round(loss, 5)] for step, loss in result.validation],
    }
    if reuse:
        store.remember(KIND, key, ref, record)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return TrainedAdapter(ref, record, reused=False)


def _copied(start: Path | None, staging: Path) -> "TrainResult":
    """A start as it is."""
    from ml_assets.engine.training import TrainResult

    assert start is not None
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(start / name, staging / name)
    return TrainResult(0, 0, [], 0.0, 0)


def _ported(inputs: AdapterInputs, prepared: "Prepared", result: "TrainResult") -> dict[str, Any] | None:
    """The manifest's `port`: where the adapter comes from, and what it was trained on."""
    if inputs.port is None:
        return None
    return inputs.port.identity() | {"rows": len(prepared.examples), "best_step": result.best_step}


def _fingerprint(base: Any, spec: CustomizationSpec, dataset: Path, adapter: Path) -> dict[str, Any]:
    """Measure the probes bare and with the adapter as it was written, not as it was in memory."""
    from ml_assets.engine.prompting import render_messages, render_target

    rows = load_rows(dataset, "train")
    probes = choose_probes(
        [(render_messages(spec.prompt, row), render_target(spec.prompt, row)) for row in rows[:8]]
    )
    pins = {
        "base_identity": base.manifest["identity"],
        "tokenizer_sha256": base.manifest["tokenizer_sha256"],
        "chat_template_sha256": base.manifest["chat_template_sha256"],
    }
    (adapter / "manifest.json").write_bytes(canonical_json(pins))
    without = measure(base, probes)
    base.attach("fingerprint", adapter)
    try:
        with base.active("fingerprint"):
            with_adapter = measure(base, probes)
    finally:
        base.detach("fingerprint")
    return make_fingerprint(probes, with_adapter, without)
