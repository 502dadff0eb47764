from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_assets.artifacts import ArtifactRef
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource

BASES = dg.DynamicPartitionsDefinition(name="bases")
KEYS = ["smol-135m.v1@0123456789ab", "smol-135m.v1@ba9876543210"]


def ref(text: str) -> ArtifactRef:
    return ArtifactRef("adapter", text.encode().hex().ljust(64, "0"))


@dg.asset(key=["shop", "dataset"])
def dataset() -> dg.MaterializeResult:
    return dg.MaterializeResult(value=ref("data"), data_version=dg.DataVersion("1"))


@dg.asset(
    key=["shop", "adapter"],
    partitions_def=BASES,
    ins={"data": dg.AssetIn(key=dg.AssetKey(["shop", "dataset"]))},
)
def adapter(context: dg.AssetExecutionContext, data: ArtifactRef) -> dg.MaterializeResult:
    assert data == ref("data")
    return dg.MaterializeResult(value=ref(context.partition_key[-3:]))


@dg.asset(
    key=["shop", "report"],
    partitions_def=BASES,
    ins={"adapter": dg.AssetIn(key=dg.AssetKey(["shop", "adapter"]))},
)
def report(context: dg.AssetExecutionContext, adapter: ArtifactRef) -> dg.MaterializeResult:
    assert adapter == ref(context.partition_key[-3:])
    return dg.MaterializeResult(value=adapter)


def endpoint_that_sees(seen: list[object], annotation: object) -> dg.AssetsDefinition:
    def endpoint(adapters):
        seen.append(adapters)

    endpoint.__annotations__ = {"adapters": annotation, "return": None}
    return dg.asset(
        key=["shop", "endpoint"],
        ins={
            "adapters": dg.AssetIn(
                key=dg.AssetKey(["shop", "adapter"]), partition_mapping=dg.AllPartitionMapping()
            )
        },
    )(endpoint)


@pytest.fixture
def manager(tmp_path: Path) -> ArtifactRefIOManager:
    return ArtifactRefIOManager(root=str(tmp_path / "refs"))


@pytest.fixture
def instance():
    with dg.instance_for_test() as instance:
        instance.add_dynamic_partitions("bases", KEYS)
        yield instance


def materialize(assets, selected, manager, instance, partition=None, **kwargs):
    return dg.materialize(
        assets,
        selection=[dg.AssetKey(["shop", name]) for name in selected],
        resources={"io_manager": manager},
        instance=instance,
        partition_key=partition,
        **kwargs,
    )


@pytest.mark.parametrize("annotation", [dict[str, ArtifactRef], dict, Any])
def test_references_travel_between_assets_and_runs(manager, instance, annotation):
    seen: list[object] = []
    assets = [dataset, adapter, report, endpoint_that_sees(seen, annotation)]
    materialize(assets, ["endpoint"], manager, instance)
    materialize(assets, ["dataset"], manager, instance)
    materialize(assets, ["adapter"], manager, instance, KEYS[0])
    materialize(assets, ["endpoint"], manager, instance)
    materialize(assets, ["adapter", "report"], manager, instance, KEYS[1])
    materialize(assets, ["endpoint"], manager, instance)
    first = {KEYS[0]: ref("9ab")}
    assert seen == [{}, first, first | {KEYS[1]: ref("210")}]


@pytest.mark.parametrize("annotation", [dict[str, ArtifactRef], Any])
def test_one_run_of_partitioned_and_unpartitioned_assets(manager, instance, annotation):
    seen: list[object] = []
    assets = [dataset, adapter, report, endpoint_that_sees(seen, annotation)]
    materialize(assets, ["dataset", "adapter", "report", "endpoint"], manager, instance, KEYS[0])
    assert seen == [{KEYS[0]: ref("9ab")}]


def test_unpartitioned_asset_before_any_partition_exists(manager):
    seen: list[object] = []
    with dg.instance_for_test() as instance:
        materialize([adapter, dataset, endpoint_that_sees(seen, dict)], ["endpoint"], manager, instance)
    assert seen == [{}]


def test_one_reference_asked_of_many_partitions(manager, instance):
    assets = [dataset, adapter, endpoint_that_sees([], ArtifactRef)]
    with pytest.raises(Exception, match="'adapters' asks for 2 partitions of shop/adapter: annotate it dict"):
        materialize(assets, ["endpoint"], manager, instance)


def test_missing_reference_names_the_asset_to_materialize(manager, instance):
    with pytest.raises(Exception, match="materialize asset shop/dataset first"):
        materialize([dataset, adapter], ["adapter"], manager, instance, KEYS[0])
    materialize([dataset, adapter], ["dataset"], manager, instance)
    with pytest.raises(Exception, match=f"materialize asset shop/adapter, partition {KEYS[1]} first"):
        materialize([dataset, adapter, report], ["report"], manager, instance, KEYS[1])


def test_damaged_note_is_named(manager, instance):
    materialize([dataset, adapter], ["dataset"], manager, instance)
    (path,) = Path(manager.root).rglob("*.json")
    path.write_text("{")
    with pytest.raises(
        Exception, match=r"@unpartitioned\.json: expected a reference.*materialize shop/dataset"
    ):
        materialize([dataset, adapter], ["adapter"], manager, instance, KEYS[0])


def test_only_references_are_stored(manager, instance):
    @dg.asset
    def number() -> int:
        return 3

    with pytest.raises(Exception, match="asset number: expected an ArtifactRef, got int"):
        dg.materialize([number], resources={"io_manager": manager}, instance=instance)
    assert not Path(manager.root).exists()


@pytest.mark.parametrize("partition", ["../../outside", "a/b", "ä\0", ".", "..", "@unpartitioned", "a|b"])
def test_any_partition_key_is_a_file_of_its_own(tmp_path, partition):
    manager = ArtifactRefIOManager(root=str(tmp_path / "refs"))
    paths = {manager._path(dg.AssetKey(["shop", "adapter"]), p) for p in (partition, None, *KEYS)}
    assert len(paths) == 4
    for path in paths:
        assert path.parent == tmp_path / "refs" / "shop" / "adapter"


def test_store_defaults_to_the_deployment(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EVERGREEN_ARTIFACTS_URL", raising=False)
    store = ArtifactStoreResource().store()
    given = store.publish("dataset", {"a.txt": b"a"})
    assert (store.open(given) / "a.txt").read_bytes() == b"a"
    assert (tmp_path / "home" / "artifacts" / "dataset" / given.digest).is_dir()
    assert ArtifactRefIOManager().root == str(tmp_path / "home" / "refs")
    monkeypatch.setenv("EVERGREEN_ARTIFACTS_URL", "memory://somewhere")
    assert ArtifactStoreResource().store().cache == tmp_path / "home" / "cache" / "artifacts"


def test_store_reads_environment_variables_at_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("STORE_URL", str(tmp_path / "elsewhere"))

    @dg.asset
    def published(artifact_store: ArtifactStoreResource) -> None:
        artifact_store.store().publish("dataset", {"a.txt": b"a"})

    dg.materialize(
        [published], resources={"artifact_store": ArtifactStoreResource(url=dg.EnvVar("STORE_URL"))}
    )
    assert (tmp_path / "elsewhere" / "dataset").is_dir()
