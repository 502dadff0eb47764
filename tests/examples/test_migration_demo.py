"""The demonstration of a migration: its project loads, and its report says what moved."""

import dataclasses

import dagster as dg
import pytest

from examples.base_revisions.migration.definitions import defs
from examples.base_revisions.migration.run import FOLLOWED, PAGE, Moved, quality, report
from ml_assets.adapters.rungs import Climb, RungResult
from ml_assets.artifacts import ArtifactStore, canonical_json
from ml_assets.endpoints.ledger import Release

RELEASE = Release("commands", "base@000000000000", "b" * 64, "a" * 64, "c" * 64, "1", "", "", "")


def test_the_project_is_whole(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLLOWED, str(tmp_path / "followed"))
    repository = defs().get_repository_def()
    keys = repository.asset_graph.get_all_asset_keys()
    assert {PAGE, dg.AssetKey(["commands", "endpoint"]), dg.AssetKey(["topics", "endpoint"])} <= keys
    assert "base_updates" in {sensor.name for sensor in repository.sensor_defs}


def test_the_report_tells_what_moved_and_what_it_saved(capsys):
    rungs = (
        RungResult("copy", "copy", "reject", "", evaluation_seconds=20.0, looks=2),
        RungResult("tune", "copy", "promote", "", training_seconds=5.0, evaluation_seconds=5.0, looks=2),
    )
    climb = Climb("c" * 64, "commands", "base@1", "d" * 64, "base@0", "e" * 64, rungs, 120.0)
    after = dataclasses.replace(RELEASE, base_revision="base@111111111111")
    moved = [
        Moved("commands", RELEASE, after, 93.4, {"before": 0.9, "after": 0.875, "bare": 0.01}, climb),
        Moved("topics", RELEASE, after, 120.0),
    ]
    urls = {name: f"http://{name}" for name in ("dagster", "mlflow", "gateway")}
    report(moved, "/data/page.html", urls, print)
    text = capsys.readouterr().out
    assert "| commands | tune | 90.0% | 87.5% | 1.0% | 30 | 120 | 0.75 | 93 s |" in text
    assert "| topics | - | - | - | - | - | - | - | 120 s |" in text
    assert "S = 1 - 30 / 120 = 0.75" in text
    assert "Migration page: /data/page.html" in text
    assert "http://dagster/assets/fleet/migration_plan" in text


def test_quality_comes_from_the_report(tmp_path):
    store = ArtifactStore(str(tmp_path / "artifacts"))
    arms = {
        name: {"metrics": {"accuracy": {"mean": value}}}
        for name, value in {"zero_shot": 0.2, "few_shot": 0.4, "adapter": 0.8, "champion": 0.9}.items()
    }
    summary = {"arms": arms, "metric": "accuracy"}
    ref = store.publish("eval_report", {"summary.json": canonical_json(summary)})
    assert quality(store, ref.digest) == {"before": 0.9, "after": 0.8, "bare": 0.4}
    assert quality(store, "f" * 64) == {}


@pytest.mark.parametrize("name", ["commands", "topics"])
def test_both_customizations_follow_the_directory(name, monkeypatch, tmp_path):
    monkeypatch.setenv(FOLLOWED, str(tmp_path))
    graph = defs().get_repository_def().asset_graph
    parents = graph.get(dg.AssetKey([name, "adapter"])).parent_keys
    assert dg.AssetKey(["base_model"]) in parents
