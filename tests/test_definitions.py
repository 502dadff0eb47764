"""What the code location offers to the UI, and what loading it costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from customizations import COLOURS_YAML, Project, base_models_yaml, colour_rows

from ml_assets.definitions import build_definitions

REPOSITORY = Path(__file__).parent.parent
SCHEDULES = """\
  schedules:
    - {cron: "*/30 * * * *", run: look}
    - {cron: "0 3 * * 1", run: retrain}
"""
HEAVY = ("torch", "transformers", "peft", "mlflow", "datasets", "matplotlib", "scipy", "sklearn", "pandas")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.create(tmp_path_factory.mktemp("shop"))
    project.write("bases", base_models_yaml({"tiny": project.root / "tiny"}))
    project.write("colours", COLOURS_YAML, colour_rows(30))
    scheduled = COLOURS_YAML.replace("name: colours", "name: places") + SCHEDULES
    project.write("places", scheduled, colour_rows(30))
    return project


@pytest.fixture(scope="module")
def repository(project: Project) -> dg.RepositoryDefinition:
    definitions = project.definitions()
    dg.Definitions.validate_loadable(definitions)
    return definitions.get_repository_def()


def test_assets_of_a_customization(repository: dg.RepositoryDefinition) -> None:
    graph = repository.asset_graph
    seen = {}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        partitions = node.partitions_def
        seen[key.to_user_string()] = {
            "group": node.group_name,
            "owners": sorted(node.owners),
            "partitions": partitions.name if isinstance(partitions, dg.DynamicPartitionsDefinition) else None,
            "parents": sorted(parent.to_user_string() for parent in node.parent_keys),
            "pool": bool(node.pools),
        }
        assert node.kinds and node.description, key
    assert seen == {
        "base_model": _asset("base_models", [], "base_models", owners=[], pool=True),
        "fleet/overview": _asset("fleet", [], None, owners=[]),
        "fleet/cost_ledger": _asset("fleet", [], None, owners=[]),
        "fleet/migration_plan": _asset("fleet", [], None, owners=[]),
        **{
            f"{name}/{kind}": _asset(name, parents, partitions, pool=kind in POOLED)
            for name in ("colours", "places")
            for kind, parents, partitions in (
                ("source", [], None),
                ("dataset", [f"{name}/source"], None),
                ("adapter", ["base_model", f"{name}/dataset"], "base_models"),
                ("eval_report", ["base_model", f"{name}/adapter", f"{name}/dataset"], "base_models"),
                ("endpoint", [f"{name}/eval_report"], None),
                ("traffic", [f"{name}/endpoint"], None),
                ("drift_report", [f"{name}/endpoint", f"{name}/traffic"], None),
                ("decision", [f"{name}/dataset", f"{name}/drift_report"], None),
            )
        },
    }


POOLED = ("adapter", "eval_report", "drift_report")


def _asset(
    group: str,
    parents: list[str],
    partitions: str | None,
    owners: list[str] | None = None,
    pool: bool = False,
) -> dict[str, object]:
    return {
        "group": group,
        "owners": ["team:shop"] if owners is None else owners,
        "partitions": partitions,
        "parents": parents,
        "pool": pool,
    }


def test_checks_have_the_partitions_of_their_asset(repository: dg.RepositoryDefinition) -> None:
    graph = repository.asset_graph
    checked = set()
    for key in graph.asset_check_keys:
        check = graph.get(key)
        assert check.partitions_def == graph.get(key.asset_key).partitions_def, key
        assert check.description, key
        # a broken base and dishonest data stop training in the same run; what follows from an adapter's
        # verdict is for the endpoint to decide
        assert not check.blocking or key.asset_key.path[-1] in ("base_model", "dataset"), key
        checked.add(key.asset_key.to_user_string())
    assert {f"colours/{kind}" for kind in ("dataset", "adapter", "eval_report", "drift_report")} <= checked


def test_one_job_brings_a_customization_up_to_date_for_a_base_revision(
    repository: dg.RepositoryDefinition,
) -> None:
    job = repository.get_job("colours__main")
    kinds = ("dataset", "adapter", "eval_report", "endpoint")
    assert job.asset_layer.selected_asset_keys == {dg.AssetKey(["colours", kind]) for kind in kinds}
    graph = repository.asset_graph
    checks = {k for k in graph.asset_check_keys if k.asset_key in job.asset_layer.selected_asset_keys}
    assert checks and job.asset_layer.asset_graph.asset_check_keys == checks
    assert job.partitions_def is not None and job.partitions_def.name == "base_models"  # type: ignore[union-attr]
    assert repository.has_job("reproduce")
    assert repository.has_sensor_def("base_updates")


def test_the_jobs_that_maintain_a_customization(repository: dg.RepositoryDefinition) -> None:
    def selected(kind: str) -> set[str]:
        job = repository.get_job(f"colours__{kind}")
        assert job.tags["evergreen/customization"] == "colours"
        return {key.path[-1] for key in job.asset_layer.selected_asset_keys}

    assert selected("update") == selected("main")
    assert selected("look") == {"traffic", "drift_report", "decision"}
    assert selected("observe") == {"source"}


def test_sensors_and_schedules_are_on_and_say_what_they_do(repository: dg.RepositoryDefinition) -> None:
    names = {"base_updates", "stale_data", "drift", "feedback_quality", "endpoint_health", "run_failures"}
    assert {sensor.name for sensor in repository.sensor_defs} == names
    for sensor in repository.sensor_defs:
        assert sensor.default_status == dg.DefaultSensorStatus.RUNNING and sensor.description
    schedules = {schedule.name: schedule for schedule in repository.schedule_defs}
    off = {"weekly_garbage_collection"}  # what deletes is turned on by a person
    assert set(schedules) == {"fleet_overview", "places__look__0", "places__retrain__1"} | off
    for name, schedule in schedules.items():
        on = schedule.default_status == dg.DefaultScheduleStatus.RUNNING
        assert on == (name not in off)
        assert schedule.execution_timezone == "UTC"
    assert schedules["places__retrain__1"].job_name == "places__update"


def test_assets_link_to_their_yaml_and_code(repository: dg.RepositoryDefinition, project: Project) -> None:
    metadata = repository.asset_graph.get(dg.AssetKey(["colours", "dataset"])).metadata
    references = metadata["dagster/code_references"].code_references
    files = [reference.file_path for reference in references]
    assert str(project.defs / "colours" / "defs.yaml") in files
    assert str(REPOSITORY / "ml_assets" / "datasets" / "asset.py") in files


def test_a_process_that_loads_again_drops_what_it_had_loaded(project: Project) -> None:
    """The collector leaves definitions alone, which are full of cycles: until the next load, not for ever."""
    program = f"""
import gc, json
from pathlib import Path
from ml_assets.definitions import build_definitions

class Cycle:
    alive = 0
    def __init__(self):
        self.itself = self
        Cycle.alive += 1
    def __del__(self):
        Cycle.alive -= 1

found = []
for _ in range(3):
    Cycle()
    build_definitions(Path({str(project.defs)!r}))
    gc.collect()
    found.append((gc.isenabled(), gc.get_freeze_count() > 10_000, Cycle.alive))
print(json.dumps(found))
"""
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(project.root), str(REPOSITORY)])},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    # the first load freezes what is garbage already, the next one collects it and what became garbage since
    assert json.loads(printed) == [[True, True, 1], [True, True, 0], [True, True, 0]]


def test_loading_is_light_and_quiet(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """No heavy library is imported, and Dagster's warnings about preview features are not printed."""
    program = f"""
import json, sys, time
start = time.perf_counter()
import dagster
framework = time.perf_counter() - start
from {project.package}.definitions import defs
import dagster as dg
dg.Definitions.validate_loadable(defs())
heavy = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps({{"heavy": heavy, "dagster": framework, "all": time.perf_counter() - start}}))
"""
    path = os.pathsep.join([str(project.root), str(REPOSITORY)])
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    with capsys.disabled():
        sys.stdout.write(
            f"\nloading two customizations: {seen['all']:.1f} s, {seen['dagster']:.1f} s of it dagster\n"
        )
    assert seen["heavy"] == []
    assert "Warning" not in result.stderr, result.stderr


def test_the_repository_itself_loads() -> None:
    from ml_assets.definitions import defs

    dg.Definitions.validate_loadable(defs())


def test_the_repository_itself_loads_where_vllm_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERGREEN_ENGINE", "vllm")
    monkeypatch.setenv("EVERGREEN_VLLM_URLS", "http://127.0.0.1:1")
    dg.Definitions.validate_loadable(build_definitions(REPOSITORY / "ml_assets"))
