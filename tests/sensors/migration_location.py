"""A code location with the sensor `base_updates` over small customizations, whose assets write down that they
were made.

The family `tiny` is the folder EVERGREEN_HOME/base, any files in the Hugging Face layout. Files in
EVERGREEN_HOME say what happens: `failed_checks` holds the names of checks that fail, `fail_<customization>`
fails its adapter, `kill` holds `<moment> <process ids>`: these are killed when the moment comes. The
moments: `planned`, `claimed`, `started` (a tick has done that, and its answer never arrives), and the name of
a customization (its adapter is being made).
"""

import json
import os
import signal
import time
from typing import Any

import dagster as dg
import fleet_location
from fleet_location import home
from maintenance_world import make_spec

import sensors.base_updates
import sensors.migration
from ml_assets.base_models.asset import CHECKS
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.fleet.asset import build_fleet_assets
from ml_assets.spec import BaseFamily, DirectoryBase
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.base_model_hub import BaseModelHub
from resources.executor import by_value_executor
from resources.gateway import GatewayResource
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource
from sensors.base_updates import build_base_updates_sensor

FAMILY = "tiny"
NAMES = ("one", "two", "three")


def write_base(content: str) -> None:
    """A new revision; only its hash matters here."""
    folder = home() / "base"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}})
    data = len(header).to_bytes(8, "little") + header.encode() + content.encode()
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text("{}")


def kill(moment: str) -> None:
    path = home() / "kill"
    if path.exists() and (wanted := path.read_text().split())[0] == moment:
        path.unlink()
        for process in wanted[1:]:  # 0: the process that does this
            os.kill(int(process) or os.getpid(), signal.SIGKILL)
        time.sleep(5)  # nothing else is done before it is gone


def base_model() -> dg.AssetsDefinition:
    @dg.asset(
        name="base_model",
        partitions_def=BASE_MODELS,
        check_specs=[
            dg.AssetCheckSpec(
                name, asset="base_model", partitions_def=BASE_MODELS, blocking=name == "finite_logits"
            )
            for name in CHECKS
        ],
        pool="device",
    )
    def base_model(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        fleet_location.ran(context, partition=context.partition_key)
        said = home() / "failed_checks"
        failing = said.read_text().split() if said.exists() else []
        return dg.MaterializeResult(
            check_results=[
                dg.AssetCheckResult(
                    check_name=name,
                    passed=name not in failing,
                    description=f"said {name}",
                    severity=dg.AssetCheckSeverity.ERROR
                    if name == "finite_logits"
                    else dg.AssetCheckSeverity.WARN,
                )
                for name in CHECKS
            ]
        )

    return base_model


def fallible(asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
    """The adapter of a customization, which fails or kills when it is told to."""
    name = asset.key.path[0]

    @dg.asset(
        key=asset.key, deps=list(asset.asset_deps[asset.key]), partitions_def=BASE_MODELS, pool="device"
    )
    def adapter(context: dg.AssetExecutionContext) -> None:
        kill(name)
        fleet_location.ran(context, partition=context.partition_key, customization=name)
        if (home() / f"fail_{name}").exists():
            raise dg.Failure("told to fail", allow_retries=False)
        time.sleep(float(os.environ.get("ADAPTER_SECONDS", "0")))

    return adapter


def definitions(*specs: Any, interval: int = 1, **limits: Any) -> dg.Definitions:
    assets = []
    for spec in specs:
        made, _ = fleet_location.customization(spec.name)
        assets += [fallible(one) if one.key.path[-1] == "adapter" else one for one in made]
    families = [BaseFamily(name=FAMILY, source=DirectoryBase(kind="directory", path="base"))]
    return dg.Definitions(
        assets=[base_model(), *assets, *build_fleet_assets(specs)],
        sensors=[build_base_updates_sensor(families, home(), specs, interval=interval, **limits)],
        resources={
            "ledger": LedgerResource(),
            "traffic_log": TrafficLogResource(),
            "gateway": GatewayResource(),
            "artifact_store": ArtifactStoreResource(),
            "io_manager": ArtifactRefIOManager(),
            "base_model_hub": BaseModelHub(),
        },
        executor=by_value_executor,
    )


@dg.definitions
def defs() -> dg.Definitions:
    _kill_after(sensors.base_updates, "make_plan", "planned")
    _kill_after(sensors.migration, "_claim", "claimed")
    _kill_after(sensors.migration, "_add_backfill", "started")
    return definitions(*(make_spec(name) for name in NAMES))


def _kill_after(module: Any, function: str, moment: str) -> None:
    original = getattr(module, function)

    def wrapped(*arguments: Any) -> Any:
        result = original(*arguments)
        if result or moment == "started":
            kill(moment)
        return result

    setattr(module, function, wrapped)
