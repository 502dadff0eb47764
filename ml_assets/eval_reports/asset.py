"""`<name>/eval_report`: what an adapter is worth on one base revision, and whether it may serve."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from ml_assets.adapters.ladder import known_climb
from ml_assets.artifacts import ArtifactError, ArtifactRef, ArtifactStore
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.code_link import code_link
from ml_assets.decisions.meter import metered
from ml_assets.decisions.staleness import note_candidate
from ml_assets.decisions.tags import DECISION_TAG, run_cost
from ml_assets.engine.hosted import HostedError
from ml_assets.eval_reports.build import REPORT_VERSION, BuiltReport, Champion, build_report, with_climb
from ml_assets.eval_reports.checks import check_results, check_specs
from ml_assets.eval_reports.metrics import MetricError
from ml_assets.eval_reports.report import headline
from ml_assets.eval_reports.runner import EvaluationError
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from resources.artifact_store import ARTIFACT_REF, ArtifactRefIOManager, ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.mlflow_tracking import MlflowTracking, TrackedRun, VersionInfo

CHAMPION, CHALLENGER = "champion", "challenger"
PROGRESS_SECONDS = 10.0
"""Between two progress lines in the Dagster log."""


def build_eval_report_asset(spec: CustomizationSpec, root: Path) -> dg.AssetsDefinition:
    """The eval report asset of one customization; the path of must-pass rows starts at `root`."""
    key = dg.AssetKey([spec.name, "eval_report"])

    @dg.asset(
        key=key,
        dagster_type=ARTIFACT_REF,
        ins={
            "adapter": dg.AssetIn(key=dg.AssetKey([spec.name, "adapter"])),
            "dataset": dg.AssetIn(key=dg.AssetKey([spec.name, "dataset"])),
            "base_model": dg.AssetIn(key=dg.AssetKey("base_model")),
        },
        partitions_def=BASE_MODELS,
        description=(
            f"Compares the adapter of **{spec.name}** with the bare base (asked, and shown examples) and "
            "with the champion on the same frozen rows, and decides whether it may serve: `promote`, "
            "`reject` or `undecided`."
        ),
        group_name=spec.name,
        owners=spec.owners,
        kinds={"report"},
        tags={"customization": spec.name},
        metadata=code_link(),
        code_version=spec.version(REPORT_VERSION, "evaluation", "prompt"),
        pool="device",
        check_specs=check_specs(key),
    )
    def eval_report(
        context: dg.AssetExecutionContext,
        artifact_store: ArtifactStoreResource,
        mlflow_tracking: MlflowTracking,
        io_manager: dg.ResourceParam[ArtifactRefIOManager],
        ledger: LedgerResource,
        adapter: ArtifactRef,
        dataset: ArtifactRef,
        base_model: ArtifactRef,
    ) -> Iterator[dg.MaterializeResult]:
        from ml_assets.engine.loading import IncompatibleAdapter, read_json

        settings, store = Settings.from_env(), artifact_store.store()
        manifest = read_json(store.open(adapter) / "manifest.json")
        try:
            version = mlflow_tracking.get_alias(spec.name, CHAMPION)
            champion = champion_of(store, io_manager, version, manifest, "base_identity")
        except ArtifactError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        climb = known_climb(
            spec,
            root,
            store,
            settings.home,
            base_model=base_model,
            dataset=dataset,
            champion=champion,
        )
        rung = climb.of(adapter.digest) if climb else None
        said = time.monotonic()

        def tell(arm: str, done: int, total: int) -> None:
            nonlocal said
            if done == total or time.monotonic() - said >= PROGRESS_SECONDS:
                said = time.monotonic()
                context.log.info(f"{arm}: {done} of {total} answers")

        cost = run_cost(context.run, spec.name, "evaluation", context.partition_key)
        try:
            with metered(ledger.decisions, cost, settings.device_second_price) as meter:
                paid: dict[str, dict[str, float]] = {}
                try:
                    built = build_report(
                        spec,
                        root,
                        store,
                        settings.home,
                        adapter=adapter,
                        dataset=dataset,
                        base_model=base_model,
                        champion=champion,
                        looks=rung.looks if rung and rung.looks else 1,
                        look=rung.look if rung and rung.looks else 1,
                        paid=paid,
                        on_progress=tell,
                    )
                finally:
                    meter.money = sum(base["money"] for base in paid.values())
                if climb and rung:
                    built = with_climb(built, climb, spec, root, store, settings.home)
                meter.rows = built.summary["rows"]
                if built.reused:
                    meter.device_seconds = 0
        except (EvaluationError, MetricError, IncompatibleAdapter) as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        except HostedError as error:
            raise dg.Failure(str(error), allow_retries=error.transient) from error
        if built.reused:
            context.log.info(f"{built.ref}: these inputs were evaluated before, nothing to do")
        context.log.info(headline(built.decision))
        with mlflow_tracking.run(
            customization=spec.name,
            base_revision=context.partition_key,
            input_key=manifest["input_key"],
            dagster_run_id=context.run.run_id,
            partition=context.partition_key,
        ) as tracked:
            version = record(mlflow_tracking, tracked, spec.name, adapter, manifest, built)
        snapshot = read_json(store.open(dataset) / "manifest.json")
        with ledger.decisions() as book:
            facts = {
                "adapter": adapter.digest,
                "base_revision": context.partition_key,
                "dataset": dataset.digest,
                "source_version": snapshot["source_version"],
                "verdict": built.decision["verdict"],
            }
            note_candidate(book, spec.name, facts)
            decision = context.run.tags.get(DECISION_TAG)
            if decision or (decision := book.migrating(spec.name, context.partition_key)):
                book.step(decision, "judged", built.decision["verdict"], context.run.run_id)
        yield dg.MaterializeResult(
            value=built.ref,
            data_version=dg.DataVersion(built.ref.digest),
            metadata={
                **_metadata(built),
                "report": dg.MetadataValue.url(f"{tracked.url}/artifacts/eval_report/report.html"),
                "mlflow_run": dg.MetadataValue.url(tracked.url),
                "mlflow_version": dg.MetadataValue.url(mlflow_tracking.version_url(version)),
            },
            check_results=check_results(key, built.decision),
        )

    return eval_report


def champion_of(
    store: ArtifactStore,
    references: ArtifactRefIOManager,
    version: VersionInfo | None,
    candidate: Mapping[str, Any],
    identity: str = "identity",
) -> Champion | None:
    """The adapter behind the alias, with the base it sits on where that is not the candidate's, whose
    `identity` is in a field of its manifest. Raises ArtifactError when it is damaged or gone."""
    from ml_assets.engine.loading import read_json

    if version is None:
        return None
    adapter = ArtifactRef("adapter", version.adapter_digest)
    try:
        manifest = read_json(store.open(adapter) / "manifest.json")
        if manifest["base_identity"] == candidate[identity]:
            return Champion(adapter, None)
        return Champion(adapter, references.load(dg.AssetKey("base_model"), manifest["base_revision"]))
    except (ArtifactError, FileNotFoundError) as error:
        raise ArtifactError(f"the champion (version {version.version}) is gone: {error}") from error


def record(
    tracking: MlflowTracking,
    tracked: TrackedRun,
    customization: str,
    adapter: ArtifactRef,
    manifest: dict[str, Any],
    built: BuiltReport,
) -> VersionInfo:
    """Put the report into the adapter's MLflow run and its verdict on the version. Safe to repeat.

    The alias `challenger` is that of the last promoted candidate: set on `promote`, removed when this
    candidate holds it and is no longer to be promoted.
    """
    decision = built.decision
    version = tracking.find_version(customization, adapter.digest) or tracking.register_adapter(
        customization,
        tracked.run_id,
        adapter.digest,
        {"base_revision": manifest["base_revision"], "input_key": manifest["input_key"]},
    )
    if version.tags.get("report_digest") != built.ref.digest:
        tracked.log_metrics(0, metrics_for_mlflow(built.summary))
        tracked.flush()
        for name in ("report.html", "rows.jsonl", "decision.json"):
            tracked.log_bytes((built.directory / name).read_bytes(), f"eval_report/{name}")
        tracked.log_text(json.dumps(built.record), "eval_report/latency.json")
        version = tracking.tag_version(
            version, {"report_digest": built.ref.digest, "verdict": decision["verdict"]}
        )
    champion = tracking.get_alias(customization, CHAMPION)
    challenger = tracking.get_alias(customization, CHALLENGER)
    serves = champion is not None and champion.version == version.version
    if decision["verdict"] == "promote" and not serves:
        tracking.set_alias(customization, CHALLENGER, version.version)
    elif challenger is not None and challenger.version == version.version and not serves:
        tracking.delete_alias(customization, CHALLENGER)
    return version


def metrics_for_mlflow(summary: dict[str, Any]) -> dict[str, float]:
    """Flat metrics: `eval/<arm>/<metric>` with `_lower` and `_upper`, and value per 1,000 requests."""
    found: dict[str, float] = {}
    for arm, entry in summary["arms"].items():
        for name, interval in [*entry["metrics"].items(), ("value_per_1000", entry["value"])]:
            if interval is not None:
                short = f"eval/{arm}/{name.replace(':', '.')}"
                found |= {
                    short: interval["mean"],
                    f"{short}_lower": interval["lower"],
                    f"{short}_upper": interval["upper"],
                }
    decision = summary["decision"]
    if decision["difference"]:
        found["eval/difference"] = decision["difference"]["estimate"]
    if decision["forgetting"] is not None:
        found["eval/forgetting"] = decision["forgetting"]
    return found


def _metadata(built: BuiltReport) -> dict[str, dg.MetadataValue]:
    decision, summary = built.decision, built.summary
    metadata: dict[str, dg.MetadataValue] = {
        "verdict": dg.MetadataValue.text(decision["verdict"]),
        "summary": dg.MetadataValue.md(built.markdown),
        "path": dg.MetadataValue.path(str(built.directory)),
        "evaluated_before": dg.MetadataValue.bool(built.reused),
        "rows": dg.MetadataValue.int(summary["rows"]),
    }
    if summary["transfer"]:
        metadata["transfer"] = dg.MetadataValue.table(
            [
                # a summary that was read has its names in the order of the alphabet
                dg.TableRecord(
                    {
                        name: round(part[name], 4) if isinstance(part[name], float) else part[name]
                        for name in ("rows_are", "segment", "before", "after", "change", "rows")
                    }
                )
                for part in summary["transfer"]
            ]
        )
    for arm, entry in summary["arms"].items():
        if found := entry["metrics"][summary["metric"]]:
            metadata[f"{arm}_{summary['metric'].rpartition(':')[2]}"] = dg.MetadataValue.float(
                round(found["mean"], 4)
            )
        if entry["value"]:
            metadata[f"{arm}_value_per_1000"] = dg.MetadataValue.float(round(entry["value"]["mean"], 4))
    return metadata
