"""From our own adapter to a hosted model and back: each time the endpoint is materialized, nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gateway_world import World, gateway_in_thread
from hosted_servers import KEY, KEY_NAME, Copycat, copycat
from tiny_models import tiny_model

from ml_assets.adapters.asset import build_adapter_asset
from ml_assets.artifacts import ArtifactRef, sha256_bytes
from ml_assets.base_models.asset import build_base_model_asset
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.base_models.register import current_revision
from ml_assets.endpoints.asset import build_endpoint_asset
from ml_assets.endpoints.gateway.keys import ADMIN_KEY_FILE
from ml_assets.eval_reports.asset import build_eval_report_asset
from ml_assets.settings import Settings
from ml_assets.spec import BaseFamily, CustomizationSpec, DirectoryBase
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.base_model_hub import BaseModelHub
from resources.gateway import GatewayResource
from resources.ledger import LedgerResource
from resources.mlflow_tracking import MlflowTracking

SPEC = CustomizationSpec.model_validate(
    {
        "name": "lights",
        "source": {"kind": "jsonl", "path": "rows.jsonl"},
        "prompt": {"user": "{said}", "target": "{meant}"},
        "base_models": ["tiny", "copycat"],
        "adapter": {"rank": 16, "steps": 80, "batch_tokens": 512, "learning_rate": 0.01},
        "examples": {"count": 2, "validation_rows": 8, "max_requests": 60},
        "evaluation": {
            "task": "classification",
            "few_shot": 1,
            "gate": {"margin": 0.3, "max_negative_flips": 1, "max_forgetting": 100},
            "value": {"right": 1.0, "per_1000_tokens": 0.001},
        },
        "endpoint": {"max_new_tokens": 12},
    }
)


class Project:
    """Two base models, one customization, and a gateway."""

    def __init__(self, world: World, url: str, provider: Copycat, instance: dg.DagsterInstance):
        home = world.home
        self.world, self.url, self.provider, self.instance = world, url, provider, instance
        tiny_model("llama", home / "tiny")
        self.families = [
            BaseFamily(name="tiny", source=DirectoryBase(kind="directory", path=str(home / "tiny"))),
            provider.family(),
        ]
        self.tracking = MlflowTracking(
            tracking_uri=f"sqlite:///{home / 'mlflow' / 'mlflow.db'}",
            artifact_location=str(home / "mlflow" / "artifacts"),
        )
        self.resources = {
            "artifact_store": ArtifactStoreResource(url=str(home / "artifacts"), cache=str(home / "cache")),
            "io_manager": ArtifactRefIOManager(root=str(home / "refs")),
            "mlflow_tracking": self.tracking,
            "ledger": LedgerResource(url=world.ledger_url),
            "gateway": GatewayResource(url=url, admin_key_file=str(home / ADMIN_KEY_FILE)),
            "base_model_hub": BaseModelHub(home=str(home)),
        }
        self.dataset_ref = self._dataset()

        @dg.asset(key=["lights", "dataset"])
        def dataset() -> ArtifactRef:
            return self.dataset_ref

        self.assets = [
            dataset,
            build_base_model_asset(self.families, home),
            build_adapter_asset(SPEC, home),
            build_eval_report_asset(SPEC, home),
            build_endpoint_asset(SPEC),
        ]

    def _dataset(self) -> ArtifactRef:
        verbs = [("on", "off")[i % 2] for i in range(96)]
        rows = [{"said": f"turn {verb} light {i // 2}", "meant": verb} for i, verb in enumerate(verbs)]
        for i, row in enumerate(rows):
            row |= {"_row": sha256_bytes(str(i).encode()), "_split": "train" if i < 48 else "evaluation"}
        rows.sort(key=lambda row: row["_row"])
        with self.world.store.staging("dataset") as directory:
            pq.write_table(pa.Table.from_pylist(rows), directory / "rows.parquet")
            manifest = {"rows": {"train": 48, "evaluation": 48}, "source_version": "1"}
            (directory / "manifest.json").write_text(json.dumps(manifest))
            return self.world.store.publish_directory("dataset", directory)

    def revision(self, number: int) -> str:
        found = current_revision(self.families[number], self.world.home, Settings.from_env())
        self.instance.add_dynamic_partitions(str(BASE_MODELS.name), [found])
        return found

    def materialize(self, selection: list[str], partition: str | None = None) -> dg.ExecuteInProcessResult:
        return dg.materialize(
            self.assets,
            selection=[dg.AssetKey(name.split("/")) for name in selection],
            partition_key=partition,
            instance=self.instance,
            resources=self.resources,
        )

    def ask(self, verb: str) -> tuple[str, str]:
        response = httpx.post(
            f"{self.url}/v1/chat/completions",
            headers={"Authorization": f"Bearer {self.world.key}"},
            json={"model": "lights", "messages": [{"role": "user", "content": f"turn {verb} light 50"}]},
            timeout=60,
        )
        answer = response.json()["choices"][0]["message"]["content"]
        return answer, response.headers["x-evergreen-base"]


@pytest.fixture
def project(tmp_path: Path, evergreen_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.setenv(KEY_NAME, KEY)
    world = World(tmp_path / "home")
    monkeypatch.setenv("EVERGREEN_HOME", str(world.home))
    with (
        copycat() as provider,
        gateway_in_thread(world) as (url, _),
        dg.instance_for_test() as instance,
    ):
        yield Project(world, url, provider, instance)


@pytest.mark.slow
def test_there_and_back(project: Project) -> None:
    own, hosted = project.revision(0), project.revision(1)
    project.materialize(["lights/dataset"])
    steps = ["base_model", "lights/adapter", "lights/eval_report"]
    result = project.materialize(steps, own)
    assert verdict(result) == "promote", summary(result)
    project.materialize(["lights/endpoint"])
    assert project.ask("off") == ("off", own)

    result = project.materialize(steps, hosted)
    metadata: Any = result.asset_materializations_for_node("lights__adapter")[0].metadata
    assert metadata["kind"].value == "prompt"
    assert metadata["requests"].value > 0 and metadata["money"].value > 0
    assert verdict(result) == "promote"
    [report] = result.asset_materializations_for_node("lights__eval_report")
    value: dict[str, Any] = {
        arm: report.metadata[f"{arm}_value_per_1000"].value for arm in ("champion", "adapter")
    }
    assert value["champion"] > value["adapter"], "the provider's price counts"
    assert project.ask("off")[1] == own, "nothing moves by itself here"
    project.materialize(["lights/endpoint"])
    before = project.provider.chats
    assert project.ask("off") == ("off", hosted)
    assert project.provider.chats == before + 1

    asked = project.provider.chats
    assert verdict(project.materialize(["lights/eval_report"], own)) == "promote"
    assert project.provider.chats == asked, "its answers were paid for already"
    project.materialize(["lights/endpoint"])
    assert project.ask("off") == ("off", own)

    actions = [(row.action, row.base_revision) for row in project.world.ledger.history("lights", 10)]
    assert actions == [("release", own), ("release", hosted), ("release", own)]
    spent: list[Any] = []
    with project.resources["ledger"].decisions() as book:  # type: ignore[union-attr]
        spent = [cost for cost in book.costs("lights") if cost.partition == hosted]
    assert {cost.kind for cost in spent} == {"training", "evaluation"} and all(c.money > 0 for c in spent)
    files = [path for path in project.world.home.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def summary(result: dg.ExecuteInProcessResult) -> Any:
    [event] = result.asset_materializations_for_node("lights__eval_report")
    return event.metadata["summary"].value


def verdict(result: dg.ExecuteInProcessResult) -> Any:
    [event] = result.asset_materializations_for_node("lights__eval_report")
    return event.metadata["verdict"].value
