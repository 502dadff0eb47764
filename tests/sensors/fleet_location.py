"""A code location with the real sensors over small customizations, whose jobs write down that they ran.

The customizations are those of FLEET (names separated by commas). What the jobs do is told by files in
EVERGREEN_HOME: `fail` fails every run, `verdict` holds what the gate says, `kill` holds the id of a process
that is killed: by the tick that wants a run (`kill_in_tick`), or by the first step of a run (`kill_in_run`).
"""

import json
import os
import signal
from pathlib import Path
from typing import Any, Literal

import dagster as dg
from maintenance_world import make_spec

import sensors.drift
import sensors.freshness
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.tags import CUSTOMIZATION_TAG, DECISION_TAG
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings
from resources.artifact_store import ArtifactStoreResource
from resources.gateway import GatewayResource
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource
from sensors.drift import build_drift_sensor
from sensors.freshness import build_stale_data_sensor

EVERY = 10


class AdapterConfig(dg.Config):
    mode: Literal["full", "incremental"] = "full"


def home() -> Path:
    return Path(os.environ["EVERGREEN_HOME"])


def ran(context: dg.AssetExecutionContext, **more: Any) -> None:
    """One line in `ran.jsonl`."""
    kill("kill_in_run")
    line = {
        "run": context.run.run_id,
        "job": context.run.job_name,
        "asset": context.asset_key.path[-1],
        "decision": context.run.tags.get(DECISION_TAG),
    }
    with (home() / "ran.jsonl").open("a") as file:
        file.write(json.dumps(line | more) + "\n")
    if (home() / "fail").exists():
        raise dg.Failure("told to fail", allow_retries=False)


def kill(name: str) -> None:
    try:
        pid = int((home() / name).read_text())
        (home() / name).unlink()
    except FileNotFoundError:
        return
    os.kill(pid, signal.SIGKILL)


def customization(name: str) -> tuple[list[Any], list[Any]]:
    """(assets, jobs) with the names of a customization's."""

    def key(kind: str) -> dg.AssetKey:
        return dg.AssetKey([name, kind])

    @dg.asset(key=key("source"))
    def source(context: dg.AssetExecutionContext) -> None:
        ran(context)

    @dg.asset(key=key("dataset"), deps=[source])
    def dataset(context: dg.AssetExecutionContext) -> None:
        ran(context)

    @dg.asset(key=key("adapter"), deps=[dataset], partitions_def=BASE_MODELS)
    def adapter(context: dg.AssetExecutionContext, config: AdapterConfig) -> None:
        ran(context, mode=config.mode, partition=context.partition_key)

    @dg.asset(key=key("eval_report"), deps=[adapter], partitions_def=BASE_MODELS)
    def eval_report(context: dg.AssetExecutionContext) -> None:
        ran(context)
        said = home() / "verdict"
        ledger = Ledger(Settings.from_env().ledger_url)
        book = DecisionBook(ledger)
        decision = context.run.tags.get(DECISION_TAG)
        if decision or (decision := book.migrating(name, context.partition_key)):
            book.step(
                decision, "judged", said.read_text() if said.exists() else "promote", context.run.run_id
            )
        ledger.close()

    @dg.asset(key=key("endpoint"), deps=[eval_report])
    def endpoint(context: dg.AssetExecutionContext) -> None:
        ran(context)

    @dg.asset(key=key("decision"), deps=[dataset, key("drift_report")])
    def decision(context: dg.AssetExecutionContext) -> None:
        ran(context)

    # nothing to do, but they belong to a look
    @dg.asset(key=key("traffic"))
    def traffic(context: dg.AssetExecutionContext) -> None:
        ran(context)

    @dg.asset(key=key("drift_report"), deps=[traffic])
    def drift_report(context: dg.AssetExecutionContext) -> None:
        ran(context)

    def job(kind: str, *assets: Any) -> Any:
        selection = dg.AssetSelection.assets(*assets)
        return dg.define_asset_job(f"{name}__{kind}", selection, tags={CUSTOMIZATION_TAG: name})

    look = (traffic, drift_report, decision)
    main = (dataset, adapter, eval_report, endpoint)
    jobs = [job("main", *main), job("update", *main), job("look", *look), job("observe", source)]
    return [source, *main, *look], jobs


def definitions(*specs: Any, with_jobs: bool = True, **limits: Any) -> dg.Definitions:
    """The location over these customizations; a large one has no jobs."""
    parts = [customization(spec.name) for spec in specs]
    jobs = [job for _, some in parts for job in some if with_jobs]
    return dg.Definitions(
        assets=[asset for assets, _ in parts for asset in assets],
        jobs=jobs,
        sensors=[
            build_drift_sensor(specs, jobs, interval=1, **limits),
            build_stale_data_sensor(specs, jobs, interval=1, **limits),
        ],
        resources={
            "ledger": LedgerResource(),
            "traffic_log": TrafficLogResource(),
            "gateway": GatewayResource(),
            "artifact_store": ArtifactStoreResource(),
        },
        executor=dg.in_process_executor,
    )


@dg.definitions
def defs() -> dg.Definitions:
    for module in (sensors.drift, sensors.freshness):
        module.tick_result = _killing(module.tick_result)  # type: ignore[attr-defined]
    return definitions(*(make_spec(name) for name in os.environ["FLEET"].split(",")))


def _killing(original: Any) -> Any:
    """The tick's result is made, and never arrives."""

    def tick_result(context: Any, requests: Any, *rest: Any, **named: Any) -> dg.SensorResult:
        result = original(context, requests, *rest, **named)
        if requests:
            kill("kill_in_tick")
        return result

    return tick_result
