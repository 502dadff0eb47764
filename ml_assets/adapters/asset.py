"""`<name>/adapter`: LoRA weights of one customization on one base revision."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from ml_assets.adapters.checks import adapter_checks, check_specs
from ml_assets.adapters.incremental import NoUpdate, plan_update, update_recipe
from ml_assets.adapters.kind import resolve_kind
from ml_assets.adapters.ladder import Climbed, NotCarried, climb, trained_before
from ml_assets.adapters.manifest import CODE_VERSION
from ml_assets.adapters.pictures import loss_curve
from ml_assets.adapters.prompted import publish_hosted
from ml_assets.adapters.rungs import Climb
from ml_assets.adapters.train import (
    KIND,
    UNTRAINABLE,
    AdapterInputs,
    TrainedAdapter,
    open_inputs,
    train_adapter,
)
from ml_assets.artifacts import ArtifactError, ArtifactRef, ArtifactStore, read_json
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.code_link import code_link
from ml_assets.decisions.meter import metered
from ml_assets.decisions.tags import DECISION_TAG, run_cost
from ml_assets.engine.hosted import HostedError, is_hosted
from ml_assets.eval_reports.asset import champion_of
from ml_assets.eval_reports.build import Champion
from ml_assets.settings import Settings
from ml_assets.spec import AdapterRecipe, CustomizationSpec, PromptSpec
from resources.artifact_store import ARTIFACT_REF, ArtifactRefIOManager, ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.mlflow_tracking import MlflowTracking, TrackedRun, git_commit

PROGRESS_SECONDS = 10.0
"""Between two progress lines in the Dagster log."""

PAID = ("requests", "money")
"""What choosing examples for a hosted base took."""

PROJECT_ROOT = Path(__file__).parents[2]


class TrainingConfig(dg.Config):
    """How an adapter is trained."""

    mode: str = Field(
        default="auto",
        pattern="^(auto|full|incremental|port)$",
        description="`auto`: what these inputs gave before; else `port`, where the champion sits on another "
        "base revision and has the same prompt; else `full`. `full`: from scratch on all training rows. "
        "`port`: up the port ladder from the champion (`migration`). `incremental`: from the champion's "
        "weights, on the rows that are new to it and a sample of the others (`maintenance.replay`).",
    )


def build_adapter_asset(spec: CustomizationSpec, root: Path) -> dg.AssetsDefinition:
    """The adapter asset of one customization: partitioned by base revision, made once for the same inputs.
    The path of must-pass rows starts at `root`."""
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
            f"{', '.join(spec.base_models)}). On a new base revision it is carried over from the champion, "
            "the cheapest way that is good enough. Unchanged inputs are never trained twice. "
            f"{spec.description}"
        ),
        group_name=spec.name,
        owners=spec.owners,
        kinds={"pytorch", "huggingface"},
        tags={"customization": spec.name},
        metadata=code_link(),
        code_version=spec.version(f"{CODE_VERSION}{how}", "adapter", "prompt", "examples"),
        pool="device",
        dagster_type=ARTIFACT_REF,
        check_specs=check_specs(key),
    )
    def adapter(
        context: dg.AssetExecutionContext,
        config: TrainingConfig,
        artifact_store: ArtifactStoreResource,
        mlflow_tracking: MlflowTracking,
        io_manager: dg.ResourceParam[ArtifactRefIOManager],
        ledger: LedgerResource,
        dataset: ArtifactRef,
        base_model: ArtifactRef,
    ) -> dg.MaterializeResult:
        require_followed(spec, context.partition_key)
        from ml_assets.engine.loading import IncompatibleAdapter

        settings, store = Settings.from_env(), artifact_store.store()
        inputs = open_inputs(spec, store, base_model, dataset)
        said = time.monotonic()

        def tell(progress) -> None:
            nonlocal said
            if progress.step in (1, progress.steps) or time.monotonic() - said >= PROGRESS_SECONDS:
                said = time.monotonic()
                context.log.info(
                    f"step {progress.step}/{progress.steps} · loss {progress.loss:.3f} · "
                    f"{progress.tokens_per_second:.0f} tokens/s · ETA {progress.eta_seconds:.0f} s"
                )

        choice, climbed, hosted = None, None, is_hosted(inputs.base_manifest)
        try:
            version = mlflow_tracking.get_alias(spec.name, "champion") if config.mode != "full" else None
            serving = champion_of(store, io_manager, version, inputs.base_manifest)
            way = "hosted" if hosted else _way(config.mode, inputs, store, serving)
            if isinstance(way, TrainedAdapter):
                trained = way
            elif way == "hosted":
                context.log.info("a hosted base: its adapter is a prompt with examples, nothing is trained")
                trained = _prompted(spec, context, store, ledger, settings, inputs)
            elif way == "port":
                assert serving is not None
                climbed = _climb(
                    spec, root, context, store, ledger, settings, inputs, base_model, serving, tell
                )
                trained = climbed.adapter
                inputs = replace(inputs, spec=_as_trained(spec, store, trained))
            else:
                if way == "incremental":
                    if serving is None:
                        raise NoUpdate(f"{spec.name} has no champion to update: train from scratch")
                    inputs = replace(inputs, spec=update_recipe(spec))
                    policy = spec.maintenance
                    inputs = plan_update(
                        inputs,
                        store,
                        serving.adapter,
                        policy.replay,
                        policy.update_layers,
                        policy.update_weight,
                    )
                    update = inputs.update
                    assert update is not None
                    again = f", {len(update.drilled)} failures again" if update.drilled else ""
                    context.log.info(
                        f"from {serving.adapter}: {len(update.new)} new rows, {len(update.replayed)} old ones"
                        f"{again}"
                    )
                else:
                    inputs, choice = resolve_kind(inputs, store, settings.home, context.log.info)
                trained = _train(spec, context, store, ledger, settings, inputs, tell)
        except HostedError as error:
            raise dg.Failure(str(error), allow_retries=error.transient) from error
        except (*UNTRAINABLE, ArtifactError, IncompatibleAdapter) as error:
            if isinstance(error, NoUpdate) and (decision := context.run.tags.get(DECISION_TAG)):
                with ledger.decisions() as book:  # another attempt would end the same way
                    book.step(decision, "impossible", str(error), context.run.run_id)
            raise dg.Failure(str(error), allow_retries=False) from error
        if trained.reused and climbed is None:
            context.log.info(f"{trained.ref}: these inputs were trained before, nothing to do")
        directory = store.open(trained.ref)
        manifest = read_json(directory / "manifest.json")
        with mlflow_tracking.run(
            customization=spec.name,
            base_revision=context.partition_key,
            input_key=manifest["input_key"],
            dagster_run_id=context.run.run_id,
            partition=context.partition_key,
            code_version=CODE_VERSION,
            commit=git_commit(PROJECT_ROOT),
            parameters={
                **(spec.examples.model_dump() if hosted else manifest["recipe"]),
                "dataset": dataset.digest,
                "rung": manifest["rung"],
            },
        ) as tracked:
            if not tracked.finished_before:
                _log(tracked, trained, directory, spec, inputs)
            version = mlflow_tracking.register_adapter(
                spec.name,
                tracked.run_id,
                trained.ref.digest,
                {"base_revision": context.partition_key, "input_key": manifest["input_key"]},
            )
            return dg.MaterializeResult(
                value=trained.ref,
                data_version=dg.DataVersion(trained.ref.digest),
                metadata={
                    **_metadata(trained, directory),
                    **(_climb_metadata(climbed.climb) if climbed else {}),
                    "mlflow_run": dg.MetadataValue.url(tracked.url),
                    "mlflow_version": version.version,
                    "input_key": manifest["input_key"],
                    **({"kind_choice": dg.MetadataValue.json(choice)} if choice else {}),
                },
                check_results=adapter_checks(key, trained.record["losses"], manifest["rung"]),
            )

    return adapter


def _way(
    mode: str, inputs: AdapterInputs, store: ArtifactStore, serving: Champion | None
) -> TrainedAdapter | str:
    """The adapter that is there already, or how to get one: `full`, `incremental` or `port`."""
    if mode in ("full", "incremental"):
        return mode
    if serving is None:
        if mode == "port":
            raise NotCarried(f"{inputs.spec.name} has no champion to carry over: train in full")
        return "full"
    manifest = read_json(store.open(serving.adapter) / "manifest.json")
    if PromptSpec(**manifest["prompt"]) != inputs.spec.prompt:
        if mode == "port":
            raise NotCarried(f"{inputs.spec.name}: the champion has another prompt: train in full")
        return "full"
    if serving.base_model and is_hosted(read_json(store.open(serving.base_model) / "manifest.json")):
        if mode == "port":
            raise NotCarried(f"{inputs.spec.name}: the champion is a prompt to a hosted base: train in full")
        return "full"
    if serving.base_model is None:
        if mode == "port":
            raise NotCarried(f"{inputs.spec.name}: the champion sits on this base: there is nothing to carry")
        if manifest["dataset"] == inputs.dataset_digest and _same_recipe(manifest["recipe"], inputs.spec):
            known = store.recall(KIND, manifest["input_key"])
            if known and known[0] == serving.adapter:
                return TrainedAdapter(*known, reused=True)
        return "full"
    if mode == "auto":
        known = trained_before(inputs, store, manifest["kind"])
        if known is not None:
            return known
    return "port"


def _same_recipe(recipe: Mapping[str, Any], spec: CustomizationSpec) -> bool:
    then = AdapterRecipe(**recipe)
    wanted = spec.adapter
    return then == wanted or (wanted.kind == "auto" and then.model_copy(update={"kind": "auto"}) == wanted)


def _train(
    spec: CustomizationSpec,
    context: dg.AssetExecutionContext,
    store: ArtifactStore,
    ledger: LedgerResource,
    settings: Settings,
    inputs: AdapterInputs,
    tell: Callable[[Any], None],
) -> TrainedAdapter:
    kind, rows = "training", read_json(inputs.dataset_directory / "manifest.json")["rows"]["train"]
    if inputs.update is not None:
        kind, rows = "incremental", len(inputs.update.rows)
    cost = run_cost(context.run, spec.name, kind, context.partition_key)
    with metered(ledger.decisions, cost, settings.device_second_price) as meter:
        trained = train_adapter(inputs, store, settings.home, on_progress=tell)
        meter.read(0 if trained.reused else trained.record["seconds"], rows)
    return trained


def _prompted(
    spec: CustomizationSpec,
    context: dg.AssetExecutionContext,
    store: ArtifactStore,
    ledger: LedgerResource,
    settings: Settings,
    inputs: AdapterInputs,
) -> TrainedAdapter:
    """The prompt for a hosted base: what is paid for is requests."""
    rows = read_json(inputs.dataset_directory / "manifest.json")["rows"]["train"]
    cost = run_cost(context.run, spec.name, "training", context.partition_key)
    with metered(ledger.decisions, cost, settings.device_second_price) as meter:

        def pay(money: float) -> None:
            meter.money = money

        trained = publish_hosted(inputs, store, settings.home, context.log.info, pay)
        meter.read(0 if trained.reused else trained.record["seconds"], rows)
    return trained


def _climb(
    spec: CustomizationSpec,
    root: Path,
    context: dg.AssetExecutionContext,
    store: ArtifactStore,
    ledger: LedgerResource,
    settings: Settings,
    inputs: AdapterInputs,
    base_model: ArtifactRef,
    champion: Champion,
    tell: Callable[[Any], None],
) -> Climbed:
    """Up the port ladder; the ledger gets the climb, and what it cost."""
    cost = run_cost(context.run, spec.name, "port", context.partition_key)
    with metered(ledger.decisions, cost, settings.device_second_price) as meter:
        climbed = climb(
            spec,
            root,
            store,
            settings.home,
            base_model=base_model,
            dataset=ArtifactRef("dataset", inputs.dataset_digest),
            champion=champion,
            run_id=context.run.run_id,
            tell=context.log.info,
            on_progress=tell,
        )
        meter.read(climbed.seconds, read_json(inputs.dataset_directory / "manifest.json")["rows"]["train"])
    with ledger.decisions() as book:
        book.record_climb(climbed.climb)
    return climbed


def _as_trained(spec: CustomizationSpec, store: ArtifactStore, trained: TrainedAdapter) -> CustomizationSpec:
    recipe = AdapterRecipe(**read_json(store.open(trained.ref) / "manifest.json")["recipe"])
    return spec.model_copy(update={"adapter": recipe})


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
        **({"port": dg.MetadataValue.json(manifest["port"])} if manifest.get("port") else {}),
        **({"search": dg.MetadataValue.json(manifest["search"])} if manifest.get("search") else {}),
        **({name: dg.MetadataValue.float(float(record[name])) for name in PAID if name in record}),
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


def _climb_metadata(climb: Climb) -> dict[str, dg.MetadataValue]:
    found: dict[str, dg.MetadataValue] = {
        "rungs": dg.MetadataValue.table(
            [
                dg.TableRecord(
                    {
                        "rung": rung.rung,
                        "start": rung.start,
                        "verdict": rung.verdict,
                        "candidate": _rounded(rung.candidate),
                        "champion": _rounded(rung.reference),
                        "bare_base": _rounded(rung.bare),
                        "negative_flips": rung.negative_flips,
                        "training_seconds": round(rung.training_seconds, 1),
                        "evaluation_seconds": round(rung.evaluation_seconds, 1),
                        "because": rung.reason[:300],
                    }
                )
                for rung in climb.rungs
            ]
        ),
        "climb_device_seconds": dg.MetadataValue.float(round(climb.seconds, 3)),
    }
    if climb.saved is not None and climb.full_seconds is not None:
        found["full_training_device_seconds"] = dg.MetadataValue.float(round(climb.full_seconds, 3))
        found["saved"] = dg.MetadataValue.float(round(climb.saved, 4))
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
