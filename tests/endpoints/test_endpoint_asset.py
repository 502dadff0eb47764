"""The endpoint asset in Dagster: with MLflow, artifact store, ledger and a gateway that serves."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest
from gateway_world import QUESTION, Made, World, gateway_in_thread
from maintenance_world import make_release

from ml_assets.artifacts import ArtifactRef
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.endpoints.asset import actor, build_endpoint_asset, may_move
from ml_assets.endpoints.gateway.client import GatewayClient
from ml_assets.endpoints.gateway.keys import ADMIN_KEY_FILE
from ml_assets.endpoints.ledger import Release
from ml_assets.spec import CustomizationSpec, MigrationSpec
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.gateway import GatewayResource
from resources.ledger import LedgerResource
from resources.mlflow_tracking import MlflowTracking, VersionInfo

SPEC = CustomizationSpec.model_validate(
    {
        "name": "home",
        "source": {"kind": "jsonl", "path": "x.jsonl"},
        "prompt": {"user": "{text}", "target": "{answer}"},
        "base_models": ["tiny-llama"],
        "evaluation": {"task": "text"},
        "freshness": {"endpoint": "36h"},
        "endpoint": {"max_new_tokens": 12, "max_prompt_tokens": 100},
    }
)


class Project:
    """What lies upstream of the endpoint, and the asset itself."""

    def __init__(self, world: World, url: str):
        self.world = world
        home = world.home
        self.tracking = MlflowTracking(
            tracking_uri=f"sqlite:///{home / 'mlflow' / 'mlflow.db'}",
            artifact_location=str(home / "mlflow" / "artifacts"),
        )
        self.io_manager = ArtifactRefIOManager(root=str(home / "refs"))
        self.resources = {
            "artifact_store": ArtifactStoreResource(url=str(home / "artifacts"), cache=str(home / "cache")),
            "io_manager": self.io_manager,
            "mlflow_tracking": self.tracking,
            "ledger": LedgerResource(url=world.ledger_url),
            "gateway": GatewayResource(url=url, admin_key_file=str(home / ADMIN_KEY_FILE)),
        }
        self.reports: dict[str, ArtifactRef] = {}
        self.bases: dict[str, ArtifactRef] = {}
        self.instance = dg.DagsterInstance.ephemeral()

    def evaluate(self, made: Made, verdict: str, champion: str | None, alias: bool = True) -> str:
        """Publish an eval report, register the version, set the challenger; returns the version."""
        decision = {"verdict": verdict, "reasons": [f"it is {verdict}ed because."]}
        about = {"candidate": made.digest, "champion": champion}
        report = self.world.store.publish(
            "eval_report",
            {
                "decision.json": json.dumps(decision).encode(),
                "summary.json": json.dumps({"about": about}).encode(),
            },
        )
        self.reports[made.base_revision] = report
        self.bases[made.base_revision] = ArtifactRef("base_model", made.base_digest)
        with self.tracking.run(
            customization="home", base_revision=made.base_revision, input_key=made.digest
        ) as run:
            tags = {"base_revision": made.base_revision, "report_digest": report.digest}
            version = self.tracking.register_adapter("home", run.run_id, made.digest, tags).version
        if alias:
            self.tracking.set_alias("home", "challenger", version)
        return version

    def materialize(self, spec: CustomizationSpec = SPEC, **options: Any) -> dg.ExecuteInProcessResult:
        @dg.asset(partitions_def=BASE_MODELS)
        def base_model(context: dg.AssetExecutionContext) -> ArtifactRef:
            return self.bases[context.partition_key]

        @dg.asset(key=dg.AssetKey(["home", "eval_report"]), partitions_def=BASE_MODELS)
        def eval_report(context: dg.AssetExecutionContext) -> ArtifactRef:
            return self.reports[context.partition_key]

        endpoint = build_endpoint_asset(spec)
        for revision in self.reports:
            self.instance.add_dynamic_partitions("base_models", [revision])
            upstream = dg.materialize(
                [base_model, eval_report],
                partition_key=revision,
                instance=self.instance,
                resources={"io_manager": self.io_manager},
            )
            assert upstream.success
        return dg.materialize(
            [base_model, eval_report, endpoint],
            selection=[endpoint],
            instance=self.instance,
            resources=self.resources,
            raise_on_error=False,
            **options,
        )


def failure(result: dg.ExecuteInProcessResult) -> str:
    """The reason of a failed endpoint step, which its check must show too."""
    assert not result.success
    [event] = result.get_step_failure_events()
    error = event.step_failure_data.error
    assert error is not None
    return (
        error.message
        if "Failure" not in str(error.cls_name)
        else str(event.step_failure_data.user_failure_data)
    )


def check(result: dg.ExecuteInProcessResult) -> Any:
    [evaluation] = result.get_asset_check_evaluations()
    assert evaluation.check_name == "serves_champion"
    return evaluation


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    world = World(tmp_path_factory.mktemp("endpoint"))
    with gateway_in_thread(world) as (url, _):
        yield Project(world, url)


def test_the_life_of_an_endpoint(project: Project) -> None:
    world, tracking = project.world, project.tracking

    # nothing was evaluated, then nothing accepted
    assert "no eval report was materialized yet" in failure(project.materialize())
    first, second = world.adapter("home", 1), world.adapter("home", 2)
    project.evaluate(first, "reject", None, alias=False)
    reasons = failure(project.materialize())
    assert "no version was accepted yet" in reasons
    assert f"{first.base_revision}: reject. it is rejected because." in reasons

    # the first version is promoted
    version = project.evaluate(first, "promote", None)
    result = project.materialize(tags={"user": "ada@example.org"})
    assert result.success and check(result).passed
    champion = tracking.get_alias("home", "champion")
    assert champion and champion.version == version
    row = world.ledger.current("home")
    assert row and (row.adapter_digest, row.mlflow_version) == (first.digest, version)
    assert row.actor == "user ada@example.org" and row.run_id == result.run_id
    assert (row.max_new_tokens, row.max_prompt_tokens) == (12, 100)
    [materialization] = result.asset_materializations_for_node("home__endpoint")
    metadata = materialization.metadata
    assert (
        metadata["adapter"].value == first.digest and metadata["base_revision"].value == first.base_revision
    )
    assert f"/#/models/home/versions/{version}" in str(metadata["mlflow_version"].value)
    assert "/runs/" in str(metadata["mlflow_run"].value)
    assert "curl " in str(metadata["try_it"].value) and '"model": "home"' in str(metadata["try_it"].value)
    assert len(metadata["history"].value.records) == 1  # type: ignore[union-attr]
    assert materialization.tags and materialization.tags["dagster/data_version"] == first.digest

    # nothing new: the same version is proven again, and no row is added
    again = project.materialize()
    assert again.success and check(again).passed and len(world.ledger.history("home")) == 1

    # other limits, or another engine: the same version, as a release of its own
    limits = SPEC.model_dump(mode="json") | {"endpoint": {"max_new_tokens": 3, "max_prompt_tokens": 100}}
    changed = project.materialize(CustomizationSpec.model_validate(limits))
    assert changed.success and check(changed).passed
    row = world.ledger.current("home")
    assert row and (row.adapter_digest, row.max_new_tokens, row.action) == (first.digest, 3, "release")
    assert row.report_digest == world.ledger.history("home")[1].report_digest
    limits["endpoint"] = {"engine": "vllm"}
    refused = project.materialize(CustomizationSpec.model_validate(limits))
    assert "EVERGREEN_VLLM_URLS" in failure(refused) and world.ledger.current("home") == row
    assert project.materialize().success and served(project) == first.digest

    # a challenger whose report compared it with something else does not move
    project.evaluate(second, "promote", None)
    stale = project.materialize()
    assert "materialize home/eval_report again" in failure(stale) and not check(stale).passed
    assert served(project) == first.digest

    # a challenger that beat the champion moves
    project.evaluate(second, "promote", first.digest)
    assert project.materialize().success
    assert served(project) == second.digest
    moved = tracking.get_alias("home", "champion")
    assert moved and moved.adapter_digest == second.digest

    # one that the gateway refuses does not, and the reason is in the check
    wrong = world.adapter("home", 3, fingerprint_of=4)
    project.evaluate(wrong, "promote", second.digest)
    refused = project.materialize()
    assert "does not answer with its fingerprint" in failure(refused)
    assert not check(refused).passed and "fingerprint" in (check(refused).description or "")
    assert served(project) == second.digest
    kept = tracking.get_alias("home", "champion")
    assert kept and kept.adapter_digest == second.digest


@contextlib.contextmanager
def serving_the_first(folder: Path) -> Iterator[tuple[Project, Made, Made]]:
    """A project of its own with two adapters, of which the first one serves."""
    world = World(folder)
    with gateway_in_thread(world) as (url, _):
        project = Project(world, url)
        first, second = world.adapter("home", 1), world.adapter("home", 2)
        project.evaluate(first, "promote", None)
        assert project.materialize().success
        yield project, first, second


def test_a_release_in_between_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_the_first(tmp_path) as (project, _, second):
        world = project.world
        stage = GatewayClient.stage

        def slow(client: GatewayClient, release: Release) -> Any:
            world.record(second, run_id="another run")
            return stage(client, release)

        monkeypatch.setattr(GatewayClient, "stage", slow)
        limits = SPEC.model_dump(mode="json") | {"endpoint": {"max_new_tokens": 3}}
        late = failure(project.materialize(CustomizationSpec.model_validate(limits)))
        assert f"adapter {second.digest[:12]} on" in late and "released meanwhile" in late
        row = world.ledger.current("home")
        assert row and row.adapter_digest == second.digest


def by_hand(**config: Any) -> dict[str, Any]:
    return {"run_config": {"ops": {"home__endpoint": {"config": config}}}}


def test_a_person_goes_back_withdraws_and_serves_again(tmp_path: Path) -> None:
    with serving_the_first(tmp_path) as (project, first, second):
        world = project.world
        project.evaluate(second, "promote", first.digest)
        assert project.materialize().success and served(project) == second.digest
        number = world.ledger.history("home")[-1].id

        for named in ("99", first.digest[:5], "home"):
            wrong = failure(project.materialize(**by_hand(serve=named)))
            assert "expected the number of a release of home or at least 6 characters" in wrong
            assert f"{number} (adapter {first.digest[:12]})" in wrong
        assert "expected one of them" in failure(project.materialize(**by_hand(serve="1", withdraw=True)))
        assert served(project) == second.digest and len(world.ledger.history("home")) == 2

        result = project.materialize(**by_hand(serve=str(number)), tags={"user": "ada"})
        assert result.success and check(result).passed and served(project) == first.digest
        row = world.ledger.current("home")
        assert row and (row.action, row.actor, row.reason) == (
            "rollback", "user ada", f"by hand: what release {number} served"
        )  # fmt: skip
        champion = project.tracking.get_alias("home", "champion")
        assert champion and champion.adapter_digest == first.digest
        assert project.materialize().success and served(project) == first.digest, "it stays"
        assert project.materialize(**by_hand(serve=first.digest[:12])).success
        assert len(world.ledger.history("home")) == 3, "what serves already is only proven"

        gone = project.materialize(**by_hand(withdraw=True))
        assert gone.success and not check(gone).passed and "was withdrawn" in check(gone).description
        assert world.ledger.current("home") is None and project.tracking.get_alias("home", "champion") is None
        assert ask(project).status_code == 404
        assert "nothing to withdraw" in failure(project.materialize(**by_hand(withdraw=True)))
        assert f"`serve: {first.digest[:12]}`" in failure(project.materialize())
        assert project.materialize(**by_hand(serve=second.digest)).success
        assert served(project) == second.digest


def served(project: Project) -> str:
    return ask(project).headers["x-evergreen-adapter"]


def ask(project: Project) -> httpx.Response:
    url, key = project.resources["gateway"].url, project.world.key
    return httpx.post(
        f"{url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}"},
        json={"model": "home", "messages": QUESTION, "max_tokens": 1},
        timeout=60,
    )


def test_without_a_gateway(project: Project, tmp_path: Path) -> None:
    resources = dict(project.resources)
    try:
        project.resources["gateway"] = GatewayResource(
            url="http://127.0.0.1:9", admin_key_file=str(tmp_path / "no")
        )
        assert "start the gateway with `make up`" in failure(project.materialize())
    finally:
        project.resources.update(resources)


def test_definition() -> None:
    endpoint = build_endpoint_asset(SPEC)
    spec = endpoint.specs_by_key[dg.AssetKey(["home", "endpoint"])]
    assert spec.group_name == "home" and spec.freshness_policy is not None
    assert [dep.asset_key.path for dep in spec.deps] == [["home", "eval_report"]]
    assert [c.name for c in endpoint.check_specs] == ["serves_champion"]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, "dagster"),
        ({"user": "ada"}, "user ada"),
        ({"dagster/sensor_name": "drift", "dagster/backfill": "x"}, "sensor drift"),
        ({"dagster/schedule_name": "nightly"}, "schedule nightly"),
        ({"dagster/backfill": "abc"}, "backfill abc"),
    ],
)
def test_who_moved_it(tags: dict[str, str], expected: str) -> None:
    assert actor(tags) == expected


def test_a_move_that_waits_for_a_person_is_made_by_nobody_else() -> None:
    challenger = VersionInfo("home", "2", "run", {"base_revision": "tiny@000000000002"})
    serves = make_release("home", base_revision="tiny@000000000001")
    manual = SPEC.model_copy(update={"migration": MigrationSpec(move="manual")})
    by_hand, by_sensor = {}, {"dagster/sensor_name": "endpoint_health"}
    assert may_move(manual, challenger, serves, by_hand)
    assert not may_move(manual, challenger, serves, by_sensor)
    assert may_move(SPEC, challenger, serves, by_sensor)
    assert may_move(manual, challenger, None, by_sensor), "the first release is no move"
    same = make_release("home", base_revision="tiny@000000000002")
    assert may_move(manual, challenger, same, by_sensor), "nor is another adapter on the same revision"
