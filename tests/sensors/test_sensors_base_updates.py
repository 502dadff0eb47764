"""The sensor that notices new revisions of base models."""

import threading
import time
from pathlib import Path

import dagster as dg
import pytest
from tiny_models import tiny_model

from ml_assets.base_models import identity
from ml_assets.base_models.identity import BaseModelError, identify, revision_key
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.spec import BaseFamily, DirectoryBase
from resources.artifact_store import ArtifactStoreResource
from resources.base_model_hub import BaseModelHub
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource
from sensors import base_updates
from sensors.base_updates import build_base_updates_sensor

RESOURCES = {
    "base_model_hub": BaseModelHub(),
    "ledger": LedgerResource(),
    "traffic_log": TrafficLogResource(),
    "artifact_store": ArtifactStoreResource(),
}


@pytest.fixture
def instance():
    with dg.instance_for_test() as instance:
        yield instance


def family(name: str) -> BaseFamily:
    return BaseFamily(name=name, source=DirectoryBase(kind="directory", path=name))


def tick(sensor: dg.SensorDefinition, instance: dg.DagsterInstance) -> tuple[list[str], str | None]:
    """Evaluate as the daemon does: (partitions added, why nothing else was done)."""
    context = dg.build_sensor_context(instance=instance, resources=RESOURCES, definitions=definitions(sensor))
    data = sensor.evaluate_tick(context)
    assert not data.run_requests
    added = [key for request in data.dynamic_partitions_requests or [] for key in request.partition_keys]
    instance.add_dynamic_partitions(str(BASE_MODELS.name), added)
    return added, data.skip_message


def definitions(sensor: dg.SensorDefinition) -> dg.Definitions:
    @dg.asset(name="base_model", partitions_def=BASE_MODELS)
    def base_model() -> None: ...

    return dg.Definitions(assets=[base_model], sensors=[sensor], resources=RESOURCES)


def test_new_content_becomes_a_partition_once(tmp_path: Path, instance: dg.DagsterInstance):
    one = tiny_model("llama", tmp_path / "one")
    tiny_model("gpt2", tmp_path / "two")
    sensor = build_base_updates_sensor([family("one"), family("two")], tmp_path)
    first = revision_key("one", identify(one))
    added, _ = tick(sensor, instance)
    assert len(added) == 2 and first in added
    assert tick(sensor, instance) == ([], f"unchanged: {', '.join(added)}")

    (one / "chat_template.jinja").write_text("{{ messages }}")
    second = revision_key("one", identify(one))
    assert tick(sensor, instance) == ([second], f"new base revisions: {second}")
    assert second != first
    assert set(instance.get_dynamic_partitions("base_models")) == {*added, second}


def test_a_broken_source_does_not_hold_up_the_others(tmp_path: Path, instance: dg.DagsterInstance):
    tiny_model("llama", tmp_path / "good")
    sensor = build_base_updates_sensor([family("bad"), family("good")], tmp_path)
    added, _ = tick(sensor, instance)
    assert [key.partition("@")[0] for key in added] == ["good"]
    with pytest.raises(BaseModelError, match=r"bad: .*no such directory"):
        tick(sensor, instance)


def test_a_source_that_is_being_written_is_looked_at_again(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
):
    one = tiny_model("llama", tmp_path / "one")
    sensor = build_base_updates_sensor([family("one")], tmp_path)
    with monkeypatch.context() as patch:

        def meanwhile(path: Path) -> str:
            found = identify(path)
            (one / "chat_template.jinja").write_text("{{ messages }}")
            return found

        patch.setattr(identity, "identify", meanwhile)
        added, why = tick(sensor, instance)
    assert added == [] and why is not None and "is being written" in why
    assert tick(sensor, instance)[0] == [revision_key("one", identify(one))]


def test_a_slow_source_goes_on_between_ticks(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
):
    release = threading.Event()
    calls: list[str] = []
    current = base_updates.current_revision

    def slow(family: BaseFamily, *arguments) -> str:
        calls.append(family.name)
        assert release.wait(20)
        return current(family, *arguments)

    monkeypatch.setattr(base_updates, "current_revision", slow)
    tiny_model("llama", tmp_path / "large")
    sensor = build_base_updates_sensor([family("large")], tmp_path, patience=0.05)
    assert tick(sensor, instance) == ([], "still being downloaded or hashed: large")
    assert tick(sensor, instance) == ([], "still being downloaded or hashed: large")
    assert calls == ["large"]
    release.set()
    for _ in range(100):
        added, _ = tick(sensor, instance)
        if added:
            break
        time.sleep(0.05)
    assert added == [revision_key("large", identify(tmp_path / "large"))]


def test_it_runs_by_itself(tmp_path: Path):
    sensor = build_base_updates_sensor([family("one")], tmp_path)
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    assert sensor.minimum_interval_seconds == 60
    definitions(sensor).get_repository_def()
