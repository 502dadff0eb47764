"""The code location: everything below a defs folder, with this deployment's resources."""

import contextlib
import gc
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from ml_assets.adapters.reproduce import build_reproduce_job
from ml_assets.customization import BaseModels, Customization
from ml_assets.fleet.asset import build_fleet_assets
from ml_assets.fleet.garbage_job import build_garbage_job
from ml_assets.mistakes import SpecError, check_files
from ml_assets.settings import RUN_ASSETS_VARIABLE, Settings
from ml_assets.spec import CustomizationSpec
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.base_model_hub import BaseModelHub
from resources.executor import by_value_executor
from resources.gateway import GatewayResource
from resources.ledger import LedgerResource
from resources.mlflow_tracking import MlflowTracking
from resources.traffic_log import TrafficLogResource
from sensors.base_updates import build_base_updates_sensor
from sensors.drift import build_drift_sensor
from sensors.endpoint_health import build_endpoint_health_sensor
from sensors.feedback_quality import build_feedback_quality_sensor
from sensors.freshness import build_stale_data_sensor
from sensors.run_failures import build_run_failures_sensor

# Used on purpose, in every asset check of a base revision and every job: the notes would bury real warnings.
warnings.filterwarnings("ignore", r"Parameter `partitions_def` of .*AssetCheckSpec", dg.PreviewWarning)
warnings.filterwarnings("ignore", r"Parameter `owners` of .*(Job|to_job)", dg.BetaWarning)


def build_definitions(project: Path) -> dg.Definitions:
    """The definitions of the project around `project` (a path below its pyproject.toml or dg.toml).

    Raises SpecError, one line for each mistake in its files.
    """
    with _without_collector():
        if RUN_ASSETS_VARIABLE in os.environ:
            with contextlib.suppress(Exception):
                definitions = _build(project)
                definitions.get_repository_def()
                return definitions
            # a user's own schedule, say, has a job that was left out; or there is a mistake to tell
            del os.environ[RUN_ASSETS_VARIABLE]
        return _build(project)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Definitions stay: looking for garbage among them again and again takes long where there are many, here
    and later, where Dagster makes millions of objects more for their snapshots. What a process that loads a
    project again no longer needs is collected first."""
    collecting = gc.isenabled()
    if gc.get_freeze_count():
        gc.unfreeze()
        gc.collect()
    gc.disable()
    try:
        yield
        gc.freeze()
        gc.set_threshold(10_000, 20, 10)
    finally:
        if collecting:
            gc.enable()


def _build(project: Path) -> dg.Definitions:
    folder = _load(project)
    tree = folder.component_tree
    specs = [component.spec for component in tree.get_all_components(Customization)] if tree else []
    deployment = dg.Definitions(
        resources={
            "artifact_store": ArtifactStoreResource(),
            "io_manager": ArtifactRefIOManager(),
            "mlflow_tracking": MlflowTracking(),
            "ledger": LedgerResource(),
            "gateway": GatewayResource(),
            "traffic_log": TrafficLogResource(),
            "base_model_hub": BaseModelHub(),
        },
        executor=by_value_executor,
    )
    fleet = [_fleet(specs, list(folder.jobs or [])), build_garbage_job(specs)] if specs else []
    bases = tree.get_all_components(BaseModels) if tree else []
    if bases:
        updates = build_base_updates_sensor(
            bases[0].spec.families,
            bases[0].origin.file.parent,
            specs,
            interval=Settings.from_env().sensor_seconds,
        )
        fleet.append(dg.Definitions(sensors=[updates]))
    return dg.Definitions.merge(folder, deployment, *fleet)


def _fleet(specs: Sequence[CustomizationSpec], jobs: Sequence[Any]) -> dg.Definitions:
    """What is about all customizations. What a tick of these sensors asks the databases does not grow with
    their number."""

    def named(*kinds: str) -> list[Any]:
        return [job for job in jobs if job.name.rpartition("__")[2] in kinds]

    assets = build_fleet_assets(specs)
    daily = dg.ScheduleDefinition(
        "fleet_overview",
        target=dg.AssetSelection.assets(*assets),
        cron_schedule="0 6 * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="The tables over all customizations, every day.",
    )
    return dg.Definitions(
        assets=assets,
        jobs=[build_reproduce_job(specs)],
        schedules=[daily],
        sensors=[
            build_stale_data_sensor(specs, named("main", "observe")),
            build_drift_sensor(specs, named("look", "update"), Settings.from_env().sensor_seconds),
            build_feedback_quality_sensor(specs),
            build_endpoint_health_sensor(specs, named("main")),
            build_run_failures_sensor(),
        ],
    )


def _load(project: Path) -> dg.Definitions:
    check_files(project)
    try:
        return dg.load_from_defs_folder(path_within_project=project)
    except Exception as error:
        # Dagster wraps what a component raises in one exception for each folder above it
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SpecError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause.with_traceback(None) from None


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions(Path(__file__).parent)
