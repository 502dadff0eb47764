"""Job `collect_garbage`, and the same for the command line."""

import datetime
from collections.abc import Sequence

import dagster as dg
from pydantic import Field

from ml_assets.artifacts import ArtifactStore
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.endpoints.ledger import Ledger
from ml_assets.fleet.retention import UNUSED_DAYS, Aliased, because_of, collect, describe, find_garbage
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from resources.artifact_store import ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.mlflow_tracking import ADAPTER_DIGEST, MlflowTracking

SCHEDULE = "30 4 * * 0"
ENDED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
UNFINISHED = [status for status in dg.DagsterRunStatus if status not in ENDED]


class GarbageConfig(dg.Config):
    """What may go."""

    dry_run: bool = Field(default=True, description="only tell what would go, and why the rest stays")
    retire: bool = Field(
        default=False,
        description="also base revisions that no release names inside its `migration.retention`: their "
        "partitions are deleted",
    )
    unused_days: float = Field(
        default=UNUSED_DAYS,
        ge=1,
        le=36500,
        description="what nothing names stays that long after its last use",
    )


def collect_garbage(
    config: GarbageConfig,
    instance: dg.DagsterInstance,
    store: ArtifactStore,
    ledger: Ledger,
    tracking: MlflowTracking,
    specs: Sequence[CustomizationSpec],
    own_run: str | None = None,
) -> list[str]:
    """What went or would go, with sizes, and why the rest stays; the last line says what was done."""
    started = datetime.datetime.now(datetime.UTC)
    aliases = [
        Aliased(
            alias,
            version.customization,
            version.adapter_digest,
            version.tags.get("report_digest"),
            version.tags.get("base_revision", ""),
        )
        for alias, version in tracking.aliased()
        if ADAPTER_DIGEST in version.tags  # else it is a model of somebody else
    ]
    unused = datetime.timedelta(days=config.unused_days)
    partitions = str(BASE_MODELS.name)
    garbage = find_garbage(
        store,
        Settings.from_env().refs,
        instance.get_dynamic_partitions(partitions),
        ledger,
        aliases,
        specs,
        started,
        unused,
        config.retire,
    )
    lines = describe(garbage)

    def blocking() -> list[str]:
        filters = (dg.RunsFilter(statuses=UNFINISHED), dg.RunsFilter(updated_after=started))
        runs = {run for one in filters for run in instance.get_run_ids(one)} - {own_run}
        return sorted(run[:8] for run in runs)

    if config.dry_run:
        runs = blocking()
        refused = f", nor would it be {because_of(runs)}" if runs else ""
        return [*lines, f"a dry run: nothing is removed{refused}"]

    def delete_partition(revision: str) -> None:
        instance.delete_dynamic_partition(partitions, revision)

    return [*lines, collect(store, garbage, unused, blocking, delete_partition)]


def build_garbage_job(specs: Sequence[CustomizationSpec]) -> dg.Definitions:
    """The job, a dry run unless its config says otherwise, and a schedule for it that a person turns on."""

    @dg.op(description="Removes artifacts that nothing names any more, or tells what would go.")
    def sweep_artifacts(
        context: dg.OpExecutionContext,
        config: GarbageConfig,
        artifact_store: ArtifactStoreResource,
        ledger: LedgerResource,
        mlflow_tracking: MlflowTracking,
    ) -> None:
        with ledger.opened() as opened:
            lines = collect_garbage(
                config,
                context.instance,
                artifact_store.store(),
                opened,
                mlflow_tracking,
                specs,
                context.run_id,
            )
        for line in lines:
            context.log.info(line.strip())
        context.add_output_metadata(
            {"done": lines[-1], "artifacts": dg.MetadataValue.md("```text\n" + "\n".join(lines) + "\n```")}
        )

    @dg.job(
        name="collect_garbage",
        description="Removes artifacts that no alias, release inside its retention, partition or open "
        "decision names, directly or through others. A dry run unless `dry_run` is false.",
    )
    def job() -> None:
        sweep_artifacts()

    weekly = dg.ScheduleDefinition(
        "weekly_garbage_collection",
        job=job,
        cron_schedule=SCHEDULE,
        execution_timezone="UTC",
        run_config={"ops": {"sweep_artifacts": {"config": {"dry_run": False}}}},
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Removes what nothing names any more, every Sunday, once a person has turned it on.",
    )
    return dg.Definitions(jobs=[job], schedules=[weekly])
