"""Job `reproduce`: train an adapter again from what its manifest pins, and compare the bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from ml_assets.adapters.incremental import plan_update
from ml_assets.adapters.port import Port
from ml_assets.adapters.train import AdapterInputs, open_inputs, train_adapter
from ml_assets.artifacts import ArtifactRef, ArtifactStore, read_json, sha256_file
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.engine.examples import is_prompted
from ml_assets.settings import Settings
from ml_assets.spec import AdapterRecipe, CustomizationSpec, PromptSpec
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource


def reproduce_inputs(
    spec: CustomizationSpec, store: ArtifactStore, adapter: ArtifactRef, base_model: ArtifactRef
) -> tuple[AdapterInputs, dict[str, Any]]:
    """Inputs of the training that gave `adapter`, and its manifest: data, prompt and recipe as they were
    then, not as the YAML says now."""
    manifest = read_json(store.open(adapter) / "manifest.json")
    then = spec.model_copy(
        update={
            "prompt": PromptSpec(**manifest["prompt"]),
            "adapter": AdapterRecipe(**manifest["recipe"]),
            "feedback": spec.feedback.model_copy(update={"must_pass": manifest.get("must_pass", 0)}),
        }
    )
    inputs = open_inputs(then, store, base_model, ArtifactRef("dataset", manifest["dataset"]))
    if inputs.base_manifest["identity"] != manifest["base_identity"]:
        raise ValueError(
            f"{adapter} was trained on base {manifest['base_identity'][:12]}, "
            f"{base_model} is {inputs.base_manifest['identity'][:12]}"
        )
    inputs = replace(inputs, spec=then)
    if manifest.get("update"):
        parent = ArtifactRef("adapter", manifest["parent"])
        update = manifest["update"]
        layers, weight = update.get("layers", 1.0), update.get("weight", 1.0)
        inputs = plan_update(inputs, store, parent, update["replay"], layers, weight)
    if manifest.get("port"):
        inputs = replace(inputs, port=Port.from_manifest(manifest))
    return inputs, manifest


def compare(
    first: Path, second: Path, names: Sequence[str] = ("adapter_model.safetensors", "adapter_config.json")
) -> dict[str, bool]:
    """{file name: same bytes} of two adapters."""
    return {name: sha256_file(first / name) == sha256_file(second / name) for name in names}


def build_reproduce_job(specs: Sequence[CustomizationSpec]) -> dg.JobDefinition:
    """The job, over all customizations: choose the customization in the launchpad and the base revision as
    the partition."""
    by_name: Mapping[str, CustomizationSpec] = {spec.name: spec for spec in specs}
    names = ", ".join(sorted(by_name))

    class ReproduceConfig(dg.Config):
        customization: str = Field(
            default=min(by_name), description=f"The customization whose adapter is trained again: {names}."
        )

    @dg.op(pool="device", description="Trains the adapter without the memo and compares the bytes.")
    def retrain_and_compare(
        context: dg.OpExecutionContext,
        config: ReproduceConfig,
        artifact_store: ArtifactStoreResource,
        io_manager: dg.ResourceParam[ArtifactRefIOManager],
    ) -> None:
        if config.customization not in by_name:
            raise dg.Failure(
                f"customization {config.customization!r}: expected one of {names}", allow_retries=False
            )
        settings, store = Settings.from_env(), artifact_store.store()
        adapter = io_manager.load(dg.AssetKey([config.customization, "adapter"]), context.partition_key)
        base_model = io_manager.load(dg.AssetKey("base_model"), context.partition_key)
        if is_prompted(read_json(store.open(adapter) / "manifest.json")):
            raise dg.Failure(
                f"{adapter} is a prompt without weights: there is no training to repeat", allow_retries=False
            )
        inputs, manifest = reproduce_inputs(by_name[config.customization], store, adapter, base_model)
        again = train_adapter(inputs, store, settings.home, reuse=False)
        same = compare(store.open(adapter), store.open(again.ref))
        context.add_output_metadata(
            {
                "adapter": adapter.digest,
                "again": again.ref.digest,
                "same_bytes": dg.MetadataValue.json(same),
                "device_seconds": again.record["seconds"],
            }
        )
        if all(same.values()):
            context.log.info(f"{adapter}: same bytes after {again.record['seconds']:.0f} s of training")
            return
        from ml_assets.engine.hardware import hardware_class

        here = hardware_class(settings.home)
        differing = ", ".join(name for name, equal in same.items() if not equal)
        reason = (
            "on the same hardware class, so this is a defect"
            if here == manifest["hardware_class"]
            else f"trained on {manifest['hardware_class']}, here {here}: only the same class promises bytes"
        )
        raise dg.Failure(
            f"{adapter}: retraining gave other bytes in {differing} ({reason})", allow_retries=False
        )

    @dg.job(
        name="reproduce",
        partitions_def=BASE_MODELS,
        description="Retrains the chosen adapter from its manifest, without the memo, and compares bytes.",
    )
    def reproduce() -> None:
        retrain_and_compare()

    return reproduce
