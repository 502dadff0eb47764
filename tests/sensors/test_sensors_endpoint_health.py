"""A gateway that is away, serves something else, or answers wrongly, with a real gateway."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import fleet_location
import pytest
import torch
from dagster._core.test_utils import create_run_for_test
from endpoints.gateway_world import World, gateway_in_thread
from maintenance_world import make_spec

from ml_assets.artifacts import write_atomic
from ml_assets.cli.launcher import identity
from ml_assets.cli.supervisor import restart_path, state_path
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.tags import CUSTOMIZATION_TAG
from ml_assets.endpoints.gateway.keys import ADMIN_KEY_FILE
from ml_assets.endpoints.release import serve_again
from ml_assets.settings import Settings
from resources.artifact_store import ArtifactStoreResource
from resources.gateway import GatewayResource
from resources.ledger import LedgerResource
from sensors.endpoint_health import build_endpoint_health_sensor, in_turn

SPEC = make_spec()


class Health:
    """The sensor over one customization, and a home with a gateway."""

    def __init__(self, world: World, url: str, instance: dg.DagsterInstance):
        self.instance, self.cursor = instance, None
        assets, jobs = fleet_location.customization("home")
        sensor = build_endpoint_health_sensor([SPEC], jobs, down_seconds=0.0)
        self.resources = {
            "ledger": LedgerResource(url=world.ledger_url),
            "gateway": GatewayResource(url=url, admin_key_file=str(world.home / ADMIN_KEY_FILE)),
            "artifact_store": ArtifactStoreResource(
                url=str(world.home / "artifacts"), cache=str(world.home / "cache")
            ),
        }
        self.defs = dg.Definitions(assets=assets, jobs=jobs, sensors=[sensor], resources=self.resources)

    def tick(self) -> tuple[list[dg.RunRequest], str]:
        with dg.build_sensor_context(
            instance_ref=self.instance.get_ref(),
            definitions=self.defs,
            resources=self.resources,
            cursor=self.cursor,
        ) as context:
            data = self.defs.resolve_sensor_def("endpoint_health").evaluate_tick(context)
        self.cursor = data.cursor
        return list(data.run_requests or []), data.skip_message or ""


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture
def world(evergreen_home: Path) -> World:
    return World(evergreen_home)


def supervised() -> None:
    """As if this process were the supervisor."""
    state = {"urls": {}, "supervisor": identity(os.getpid()), "processes": {}}
    write_atomic(state_path(Settings.from_env()), json.dumps(state).encode())


def test_the_life_of_a_gateway(world: World, instance: dg.DagsterInstance) -> None:
    made = world.adapter("home", 1)
    with gateway_in_thread(world) as (url, app):
        health = Health(world, url, instance)
        assert health.tick() == ([], "nothing was released yet")

        # released, and the gateway does not know: the endpoint is materialized
        world.record(made)
        ((request,), _) = health.tick()
        assert request.job_name == "home__main"
        assert request.asset_selection == [dg.AssetKey(["home", "endpoint"])]
        assert str(request.run_key).startswith(f"home:health:{made.digest[:12]}:")
        assert health.tick()[0][0].run_key == request.run_key, "once in ten minutes"
        tags = {CUSTOMIZATION_TAG: "home"}
        run = create_run_for_test(
            instance, job_name="home__main", status=dg.DagsterRunStatus.STARTED, tags=tags
        )
        requests, why = health.tick()
        assert requests == [] and "is at work" in why
        instance.report_run_canceled(run)

        with health.resources["gateway"].client() as client:
            client.stage(made.release())
            client.activate("home", made.digest)
        requests, why = health.tick()
        assert requests == [] and "asked for fingerprints: home" in why
        assert "serves all 1 as the ledger says" in why

        # released again with other limits, by a run that was killed before the gateway followed
        changed = world.record(made, max_new_tokens=3)
        ((request,), why) = health.tick()
        assert request.asset_selection == [dg.AssetKey(["home", "endpoint"])]
        assert f":{changed.id}:" in str(request.run_key)
        with health.resources["gateway"].client() as client:
            assert serve_again(changed, store=world.store, gateway=client)
        requests, why = health.tick()
        assert requests == [] and "serves all 1 as the ledger says" in why

        # its weights are damaged in memory: it says that it serves, and answers something else
        supervised()
        engine: Any = app.state.engine
        base = engine.served["home"].ready.base
        with torch.no_grad():
            for parameter in base.model.parameters():
                parameter.mul_(0.5)
        requests, why = health.tick()
        assert requests == [] and "home: does not answer with its fingerprint" in why
        assert restart_path(Settings.from_env(), "gateway").exists()
        (alert,) = DecisionBook(world.ledger).undelivered()
        assert alert.title == "the gateway answers wrongly and is restarted"


def test_a_silent_gateway(world: World, instance: dg.DagsterInstance) -> None:
    world.record(world.adapter("home", 1))
    health = Health(world, "http://127.0.0.1:9", instance)
    _, why = health.tick()
    assert "no supervisor runs here" in why
    supervised()
    _, why = health.tick()
    assert "it is ended and started again" in why
    assert restart_path(Settings.from_env(), "gateway").exists()
    assert {alert.title for alert in DecisionBook(world.ledger).undelivered()} == {
        "the gateway does not answer"
    }


def test_ticks_that_take_a_few_each_come_to_all() -> None:
    names, taken, last = {"c", "a", "e", "b", "d"}, [], ""
    for _ in range(3):
        taken += in_turn(names, last)[:2]
        last = taken[-1]
    assert taken == ["a", "b", "c", "d", "e", "a"]
    assert in_turn([], "x") == [] and in_turn(["a"], "gone") == ["a"]
