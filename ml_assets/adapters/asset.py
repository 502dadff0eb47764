"""`<name>/adapter`: LoRA weights of one customization on one base revision."""

import time
from dataclasses import replace
from pathlib import Path

import dagster as dg
from pydantic import Field

from ml_assets.adapters.checks import adapter_checks, check_specs
from ml_assets.adapters.incremental import NoUpdate, plan_update, update_recipe
from ml_assets.adapters.kind import resolve_kind
from ml_assets.adapters.manifest import CODE_VERSION
from ml_assets.adapters.pictures import loss_curve
from ml_assets.adapters.train import UNTRAINABLE, AdapterInputs, TrainedAdapter, open_inputs, train_adapter
from ml_assets.artifacts import ArtifactRef, read_json
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.decisions.meter import metered
from ml_assets.decisions.tags import run_cost
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from resources.artifact_store import ARTIFACT_REF, ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.mlflow_tracking import MlflowTracking, TrackedRun, git_commit

PROGRESS_SECONDS = 10.0
"""Between two progress lines in the Dagster log."""

PROJECT_ROOT = Path(__file__).parents[2]


class TrainingConfig(dg.Config):
    """How an adapter is trained."""

    mode: str = Field(
        default="full",
        pattern="^(full|incremental)$",
        description="`full`: from scratch on all training rows. `incremental`: from the champion's weights, "
        "on the rows that are new to it and a sample of the others (`maintenance.replay`).",
    )


def build_adapter_asset(spec: CustomizationSpec) -> dg.AssetsDefinition:
    """The adapter asset of one customization: partitioned by base revision, trained once per input key."""
    key = dg.AssetKey([spec.name, "adapter"])

    how = "" if spec.evaluation.answer_by == "generation" else f"-{spec.evaluation.answer_by}"

    @dg.asset(
        key=key,
        ins={
            "dataset": dg.AssetIn(key=dg.AssetKey([spec.name, "dataset"])),
            "base_model": dg.AssetIn(key=dg.AssetKey("base_model")),
        },
        partitions_def=BASE_MODELS,
        description=(
            f"LoRA adapter of **{spec.name}** for one base revision (rank {spec.adapter.rank}, follows "
            f"{', '.join(spec.base_models)}). Unchanged inputs are never trained twice. {spec.description}"
        ),
        group_name=spec.name,
        owners=spec.owners,
        kinds={"pytorch", "huggingface"},
        tags={"customization": spec.name},
        code_version=spec.version(f"{CODE_VERSION}{how}", "adapter", "prompt"),
        pool="device",
        dagster_type=ARTIFACT_REF,
        check_specs=check_specs(key),
    )
    def adapter(
        context: dg.AssetExecutionContext,
        config: TrainingConfig,
        artifact_store: ArtifactStoreResource,
        mlflow_tracking: MlflowTracking,
        ledger: LedgerResource,
        dataset: ArtifactRef,
        base_model: ArtifactRef,
    ) -> dg.MaterializeResult:
        require_followed(spec, context.partition_key)
        settings, store = Settings.from_env(), artifact_store.store()
        inputs = open_inputs(spec, store, base_model, dataset)
        choice = None
        try:
            if config.mode == "incremental":
                parent = _champion(mlflow_tracking, spec.name)
                inputs = replace(inputs, spec=update_recipe(spec))
                inputs = plan_update(inputs, store, parent, spec.maintenance.replay)
                update = inputs.update
                assert update is not None
                context.log.info(
                    f"from {parent}: {len(update.new)} new rows, {len(update.replayed)} old ones"
                )
            else:
                inputs, choice = resolve_kind(inputs, store, settings.home, context.log.info)
        except UNTRAINABLE as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        with mlflow_tracking.run(
            customization=spec.name,
            base_revision=context.partition_key,
            input_key=inputs.key,
            dagster_run_id=context.run.run_id,
            partition=context.partition_key,
            code_version=CODE_VERSION,
            commit=git_commit(PROJECT_ROOT),
            parameters={**inputs.spec.adapter.model_dump(exclude_none=True), "dataset": dataset.digest},
        ) as tracked:
            said = time.monotonic()

            def tell(progress) -> None:
                nonlocal said
                if progress.step in (1, progress.steps) or time.monotonic() - said >= PROGRESS_SECONDS:
                    said = time.monotonic()
                    context.log.info(
                        f"step {progress.step}/{progress.steps} · loss {progress.loss:.3f} · "
                        f"{progress.tokens_per_second:.0f} tokens/s · ETA {progress.eta_seconds:.0f} s"
                    )

            kind, rows = "training", read_json(inputs.dataset_directory / "manifest.json")["rows"]["train"]
            if inputs.update is not None:
                kind, rows = "incremental", len(inputs.update.rows)
            cost = run_cost(context.run, spec.name, kind, context.partition_key)
            try:
                with metered(ledger.decisions, cost, settings.device_second_price) as meter:
                    trained = train_adapter(inputs, store, settings.home, on_progress=tell)
                    meter.read(0 if trained.reused else trained.record["seconds"], rows)
            except UNTRAINABLE as error:
                raise dg.Failure(str(error), allow_retries=False) from error
            if trained.reused:
                context.log.info(f"{trained.ref}: these inputs were trained before, nothing to do")
            directory = store.open(trained.ref)
            if not tracked.finished_before:
                _log(tracked, trained, directory, spec, inputs)
            version = mlflow_tracking.register_adapter(
                spec.name,
                tracked.run_id,
                trained.ref.digest,
                {"base_revision": context.partition_key, "input_key": inputs.key},
            )
            return dg.MaterializeResult(
                value=trained.ref,
                data_version=dg.DataVersion(trained.ref.digest),
                metadata={
                    **_metadata(trained, directory),
                    "mlflow_run": dg.MetadataValue.url(tracked.url),
                    "mlflow_version": version.version,
                    "input_key": inputs.key,
                    **({"kind_choice": dg.MetadataValue.json(choice)} if choice else {}),
                },
                check_results=adapter_checks(key, trained.record["losses"]),
            )

    return adapter


def _champion(tracking: MlflowTracking, customization: str) -> ArtifactRef:
    champion = tracking.get_alias(customization, "champion")
    if champion is None:
        raise NoUpdate(f"{customization} has no champion to update: train from scratch")
    return ArtifactRef("adapter", champion.adapter_digest)


def require_followed(spec: CustomizationSpec, partition_key: str) -> None:
    """Refuse a base revision of a family that the customization does not follow."""
    family = partition_key.rpartition("@")[0]
    if family not in spec.base_models:
        raise dg.Failure(
            f"{spec.name} does not follow base model {family!r}; it follows: {', '.join(spec.base_models)}",
            allow_retries=False,
        )


def _log(
    tracked: TrackedRun,
    trained: TrainedAdapter,
    directory: Path,
    spec: CustomizationSpec,
    inputs: AdapterInputs,
) -> None:
    """Record a training in its MLflow run: what peft needs to load it, how it went, what it was made of."""
    losses = trained.record["losses"]
    for step, loss in enumerate(losses, start=1):
        tracked.log_metrics(step, {"loss": loss})
    tracked.log_metrics(
        len(losses), {name: trained.record[name] for name in ("seconds", "tokens_per_second")}
    )
    tracked.log_artifacts(directory, "adapter")
    rows = read_json(inputs.dataset_directory / "manifest.json")["rows"]["train"]
    tracked.log_dataset(f"{spec.name}/dataset", inputs.dataset_digest, str(inputs.dataset_directory), rows)


def _metadata(trained: TrainedAdapter, directory: Path) -> dict[str, dg.MetadataValue]:
    manifest, record = read_json(directory / "manifest.json"), trained.record
    return {
        "digest": dg.MetadataValue.text(trained.ref.digest),
        "trained_before": dg.MetadataValue.bool(trained.reused),
        **({"final_loss": dg.MetadataValue.float(record["losses"][-1])} if record["losses"] else {}),
        "kind": dg.MetadataValue.text(manifest["kind"]),
        **({"update": dg.MetadataValue.json(manifest["update"])} if manifest.get("update") else {}),
        "steps": dg.MetadataValue.int(manifest["steps"]),
        "trained_tokens": dg.MetadataValue.int(manifest["trained_tokens"]),
        "device_seconds": dg.MetadataValue.float(record["seconds"]),
        "tokens_per_second": dg.MetadataValue.float(record["tokens_per_second"]),
        **({"loss_curve": dg.MetadataValue.md(loss_curve(record["losses"]))} if record["losses"] else {}),
        "fingerprint": dg.MetadataValue.table(
            [
                dg.TableRecord({"answer": p["answer"][:80], "with": p["with"], "without": p["without"]})
                for p in manifest["fingerprint"]["probes"]
            ]
        ),
        "manifest": dg.MetadataValue.json(manifest),
        "path": dg.MetadataValue.path(str(directory)),
    }
