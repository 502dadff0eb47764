"""The adapter asset on a new base revision: it climbs once, and the eval report is that of the look."""

import dagster as dg
import pytest
from ladder_world import World, specification

from ml_assets.adapters.asset import build_adapter_asset
from ml_assets.artifacts import ArtifactRef, read_json
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.eval_reports.asset import build_eval_report_asset
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.mlflow_tracking import MlflowTracking


def test_a_new_base_revision_is_climbed_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path_factory.mktemp("asset"))
    monkeypatch.setenv("EVERGREEN_HOME", str(world.home))
    spec = specification()
    bases = {}
    for name in ("old", "minor"):
        ref = world.base(name)
        bases[read_json(world.store.open(ref) / "manifest.json")["revision"]] = ref
    old, new = bases

    @dg.asset(name="base_model", partitions_def=BASE_MODELS)
    def base_model(context: dg.AssetExecutionContext) -> dg.MaterializeResult[ArtifactRef]:
        return dg.MaterializeResult(value=bases[context.partition_key])

    @dg.asset(key=["switches", "dataset"])
    def dataset() -> dg.MaterializeResult[ArtifactRef]:
        return dg.MaterializeResult(value=world.dataset)

    instance = dg.DagsterInstance.ephemeral()
    instance.add_dynamic_partitions("base_models", [old, new])
    tracking, ledger = MlflowTracking(), LedgerResource()

    def materialize(partition: str, mode: str = "auto", fails: bool = False) -> dg.ExecuteInProcessResult:
        assets = [base_model, dataset, build_adapter_asset(spec, world.home)]
        return dg.materialize(
            [*assets, build_eval_report_asset(spec, world.home)],
            instance=instance,
            partition_key=partition,
            raise_on_error=not fails,
            run_config={"ops": {"switches__adapter": {"config": {"mode": mode}}}},
            resources={
                "artifact_store": ArtifactStoreResource(),
                "mlflow_tracking": tracking,
                "io_manager": ArtifactRefIOManager(),
                "ledger": ledger,
            },
        )

    def seen(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, dg.MetadataValue]:
        return dict(result.asset_materializations_for_node(f"switches__{asset}")[0].metadata)

    assert not materialize(new, "port", fails=True).success, "no champion to carry over"
    first = seen(materialize(old), "adapter")
    assert first["kind"].value == "lora" and "rungs" not in first
    champion = tracking.find_version("switches", str(first["digest"].value))
    assert champion is not None
    tracking.set_alias("switches", "champion", champion.version)

    result = materialize(new)
    carried, report = seen(result, "adapter"), seen(result, "eval_report")
    assert carried["port"].value["rung"] == "copy"  # type: ignore[index]
    assert [row.data["rung"] for row in carried["rungs"].records] == ["bare", "copy"]  # type: ignore[attr-defined]
    assert report["evaluated_before"].value is True, "the look was the evaluation"
    assert "not shown" in str(report["summary"].value) and report["verdict"].value == "promote"
    with ledger.decisions() as book:
        (climb,) = book.climbs("switches")
        costs = {(cost.kind, cost.partition): cost.device_seconds for cost in book.costs("switches")}
    assert climb.of(str(carried["digest"].value)) is not None and climb.run_id == result.run_id
    assert costs["port", new] == pytest.approx(climb.seconds, rel=0.2)
    assert ("evaluation", new) not in costs and ("training", new) not in costs

    again = materialize(new)
    assert seen(again, "adapter")["digest"].value == carried["digest"].value
    with ledger.decisions() as book:
        assert len(book.climbs("switches")) == 1
        assert len([c for c in book.costs("switches") if c.partition == new]) == 1, "nothing was spent again"

    version = tracking.find_version("switches", str(carried["digest"].value))
    assert version is not None
    tracking.set_alias("switches", "champion", version.version)
    serving = materialize(new)
    assert seen(serving, "adapter")["digest"].value == carried["digest"].value, "what serves is kept"
    assert seen(serving, "adapter")["trained_before"].value is True
    assert seen(serving, "eval_report")["summary"].value == report["summary"].value
    back = seen(materialize(old), "adapter")
    assert back["digest"].value == first["digest"].value, "nor is the old revision trained again"
