"""The main job on a tiny model, with the real parts: a base model, a dataset, an adapter that learns, an
evaluation that decides, MLflow, and a gateway process that answers over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import httpx
import pytest
from customizations import COLOURS_YAML, Project, base_models_yaml, colour_rows
from tiny_models import tiny_model

from ml_assets.artifacts import ArtifactRef, ArtifactStore
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.base_models.register import register_revisions
from ml_assets.customization import BaseModels
from ml_assets.endpoints.gateway.keys import ADMIN_KEY_FILE
from ml_assets.settings import Settings
from resources.artifact_store import ArtifactRefIOManager
from resources.mlflow_tracking import MlflowTracking

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
LEARNS = COLOURS_YAML.replace(
    "  evaluation:\n",
    "  adapter: {rank: 64, alpha: 64, steps: 140, batch_tokens: 512, learning_rate: 0.005}\n  evaluation:\n"
    "    few_shot: 1\n    max_new_tokens: 6\n    gate: {max_forgetting: 20}\n",
)


@dataclass(frozen=True)
class World:
    """A project, the instance that runs it, and the gateway that serves it."""

    project: Project
    instance: dg.DagsterInstance
    settings: Settings
    revision: str
    gateway: "Gateway"

    def run(self, job: str, *, expect: bool = True) -> dg.ExecuteInProcessResult:
        """Run a job of the project for the base revision, from definitions loaded anew."""
        definitions = self.project.definitions()
        if job == "base_model":
            whole = definitions.resolve_implicit_global_asset_job_def()
            chosen = whole.get_subset(asset_selection={dg.AssetKey("base_model")})
        else:
            chosen = definitions.resolve_job_def(job)
        result = chosen.execute_in_process(
            instance=self.instance, partition_key=self.revision, raise_on_error=expect
        )
        assert result.success == expect
        return result

    def champion(self) -> str | None:
        """Digest of the adapter behind the alias."""
        version = MlflowTracking().get_alias("colours", "champion")
        return version.adapter_digest if version else None

    def versions(self) -> int:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.settings.mlflow_uri)
        return len(client.search_model_versions("name='colours'"))

    def store(self) -> ArtifactStore:
        return ArtifactStore(self.settings.artifacts_url)

    def ref(self, kind: str) -> ArtifactRef:
        """What the asset of the base revision is now."""
        return ArtifactRefIOManager().load(dg.AssetKey(["colours", kind]), self.revision)

    def ask(self, text: str) -> httpx.Response:
        key = (self.settings.home / ADMIN_KEY_FILE).read_text().strip()
        return httpx.post(
            f"{self.settings.gateway_url}/v1/chat/completions",
            headers={"Authorization": f"Bearer {key}"},
            json={"model": "colours", "messages": [{"role": "user", "content": text}], "temperature": 0},
            timeout=60,
        )


@pytest.fixture
def world(tmp_path: Path, evergreen_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("EVERGREEN_GATEWAY_PORT", str(probe.getsockname()[1]))
    project = Project.create(tmp_path / "shop")
    project.write("bases", base_models_yaml({"tiny": tiny_model("llama", tmp_path / "tiny")}))
    project.write("colours", LEARNS, colour_rows(400))
    tree = project.definitions().component_tree
    assert tree is not None
    (bases,) = tree.get_all_components(BaseModels)
    settings = Settings.from_env()
    with dg.instance_for_test() as instance:
        (revision,) = register_revisions(
            bases.spec.families,
            bases.origin.file.parent,
            settings,
            lambda names: instance.add_dynamic_partitions(str(BASE_MODELS.name), names),
        )
        # a revision that nothing was made for yet must not be in the way
        instance.add_dynamic_partitions(str(BASE_MODELS.name), ["tiny@000000000000"])
        gateway = Gateway(settings)
        gateway.start()
        try:
            yield World(project, instance, settings, revision, gateway)
        finally:
            gateway.kill()


class Gateway:
    """The gateway program."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log = settings.home / "gateway.log"

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ml_assets.endpoints.gateway"],
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.settings.gateway_url}/healthz/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def made(result: dg.ExecuteInProcessResult) -> dict[str, dict[str, object]]:
    """{asset: metadata} of what a run materialized."""
    return {
        event.asset_key.to_user_string(): {
            name: value.value
            for name, value in event.step_materialization_data.materialization.metadata.items()
        }
        for event in result.get_asset_materialization_events()
        if event.asset_key
    }


def test_one_yaml_becomes_a_served_model_and_stays_served(world: World) -> None:
    world.run("base_model")
    first = world.run("colours__main")

    assert set(made(first)) == {f"colours/{k}" for k in ("dataset", "adapter", "eval_report", "endpoint")}
    failed = [check for check in first.get_asset_check_evaluations() if not check.passed]
    assert [check.check_name for check in failed if check.severity == dg.AssetCheckSeverity.ERROR] == []
    champion = world.ref("adapter").digest
    assert world.champion() == champion and world.versions() == 1
    report = world.store().open(world.ref("eval_report"))
    rows = [json.loads(line) for line in (report / "rows.jsonl").read_text().splitlines()]
    answered = [row for row in rows if row["arm"] == "adapter"]
    assert sum(row["right"] for row in answered) > len(answered) / 3
    for row in answered[:5]:  # the endpoint says what the evaluation saw
        response = world.ask(row["prompt"])
        assert response.status_code == 200, response.text
        assert champion.startswith(response.json()["system_fingerprint"])
        assert response.json()["choices"][0]["message"]["content"] == row["answer"]
    asked = answered[0]

    # a second run of unchanged inputs trains, evaluates and registers nothing
    start = time.monotonic()
    second = world.run("colours__main")
    seconds = time.monotonic() - start
    assert made(second)["colours/adapter"]["trained_before"] is True
    assert world.versions() == 1 and world.champion() == champion
    sys.stdout.write(f"\nthe second run took {seconds:.1f} s\n")

    # an adapter whose training was cut short is rejected, in the report, in its check and at the endpoint
    world.project.write("colours", LEARNS.replace("steps: 140", "steps: 8"))
    third = world.run("colours__main")
    candidate = world.ref("adapter").digest
    assert candidate != champion
    verdicts = [c for c in third.get_asset_check_evaluations() if c.asset_key.path[-1] == "eval_report"]
    assert any(not check.passed and check.severity == dg.AssetCheckSeverity.ERROR for check in verdicts)
    assert world.champion() == champion and world.versions() == 2
    response = world.ask(asked["prompt"])
    assert champion.startswith(response.json()["system_fingerprint"])

    # a gateway that was killed comes back with what it served
    world.gateway.kill()
    world.gateway.start()
    response = world.ask(asked["prompt"])
    assert champion.startswith(response.json()["system_fingerprint"])
    assert response.json()["choices"][0]["message"]["content"] == asked["answer"]


def test_too_few_rows_stop_the_run_before_training(world: World) -> None:
    """The dataset's blocking check fails, so nothing behind it runs."""
    world.run("base_model")
    world.project.write("colours", LEARNS, colour_rows(15))
    result = world.run("colours__main", expect=False)
    assert "colours/adapter" not in made(result)
    failed = {check.check_name for check in result.get_asset_check_evaluations() if not check.passed}
    assert failed, json.dumps([event.message for event in result.all_events if event.is_failure])
    assert world.champion() is None
