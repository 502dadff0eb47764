"""A release moves everything or nothing, whatever fails and whoever comes late."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_world import QUESTION, Made, World, free_port, gateway_in_thread

from ml_assets.artifacts import ArtifactError
from ml_assets.endpoints.gateway.client import GatewayClient, GatewayError
from ml_assets.endpoints.ledger import Fenced, Release
from ml_assets.endpoints.release import (
    ReleaseFailed,
    follow_ledger,
    read_fingerprint,
    release,
    serve_again,
    verify_served,
)


class Setting:
    """A gateway, a client of it, and a registry with one alias."""

    def __init__(self, world: World, url: str, app: Any):
        self.world, self.app = world, app
        self.client = GatewayClient(url, world.admin_key)
        self.alias: str | None = None

    def move_alias(self, version: str | None) -> None:
        self.alias = version

    def release(self, made: Made, version: str = "1", **options: Any) -> Release:
        candidate = made.release(mlflow_version=version, run_id=options.pop("run_id", f"run-{version}"))
        return release(
            candidate,
            expected=self.world.ledger.current("home"),
            ledger=self.world.ledger,
            store=self.world.store,
            **({"gateway": self.client, "move_alias": self.move_alias} | options),
        )

    def serves(self, made: Made | None, version: str | None = None) -> None:
        """Check that gateway, ledger and alias agree that `made` serves (None: nothing)."""
        current = self.world.ledger.current("home")
        digest = made and made.digest
        assert (current and current.adapter_digest) == digest
        assert self.client.serving("home") == digest
        assert self.alias == version
        assert "home" not in self.app.state.engine.staged
        if made:
            answered = self.client.answer("home", QUESTION, 12)
            assert answered.adapter_digest == digest and answered.text in made.answers


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str, Any, list[Made]]]:
    world = World(tmp_path_factory.mktemp("release"))
    made = [world.adapter("home", 1), world.adapter("home", 2), world.adapter("home", 3, fingerprint_of=4)]
    world.record(world.adapter("another", 8))  # so that the base stays in memory from test to test
    with gateway_in_thread(world) as (url, app):
        yield world, url, app, made


@pytest.fixture
def setting(shared: tuple[World, str, Any, list[Made]]) -> Iterator[Setting]:
    world, url, app, made = shared
    yield Setting(world, url, app)
    world.record(made[0], action="withdraw", run_id="end of test")
    GatewayClient(url, world.admin_key).activate("home", None)


@pytest.fixture
def adapters(shared: tuple[World, str, Any, list[Made]]) -> list[Made]:
    return shared[3]


def test_a_release_moves_gateway_ledger_and_alias(setting: Setting, adapters: list[Made]) -> None:
    first, second, _ = adapters
    row = setting.release(first)
    setting.serves(first, "1")
    assert row == setting.world.ledger.current("home") and row.at and row.id
    setting.release(second, "2")
    setting.serves(second, "2")
    assert [r.mlflow_version for r in setting.world.ledger.history("home", 2)] == ["2", "1"]


def test_a_version_with_another_fingerprint_is_refused(setting: Setting, adapters: list[Made]) -> None:
    first, _, wrong = adapters
    setting.release(first)
    with pytest.raises(ReleaseFailed, match=r"nothing changed.*does not answer with its fingerprint"):
        setting.release(wrong, "2")
    setting.serves(first, "1")


def test_a_gateway_that_verifies_nothing_is_not_believed(setting: Setting, adapters: list[Made]) -> None:
    first, _, wrong = adapters
    setting.release(first)

    class Gullible(GatewayClient):
        """What a gateway without checks of its own would answer: what it measured on another adapter."""

        def stage(self, release: Release) -> Any:
            other = adapters[1].release()
            probed = super().stage(other)
            return type(probed)(
                release.adapter_digest, release.base_revision, probed.with_adapter, probed.without
            )

    with pytest.raises(ReleaseFailed, match=r"does not answer with its fingerprint: expected .* measured"):
        setting.release(wrong, "2", gateway=Gullible(setting.client.url, setting.world.admin_key))
    setting.serves(first, "1")


def test_a_fenced_run_moves_nothing(setting: Setting, adapters: list[Made]) -> None:
    first, second, _ = adapters
    setting.release(first)
    setting.world.ledger.fence("dead", "its worker is gone")
    with pytest.raises(Fenced, match=r"run dead may not release 'home' any more: its worker is gone"):
        setting.release(second, "2", run_id="dead")
    setting.serves(first, "1")


def test_a_run_fenced_while_its_version_loads_moves_nothing(setting: Setting, adapters: list[Made]) -> None:
    first, second, _ = adapters
    setting.release(first)
    ledger = setting.world.ledger

    class Slow(GatewayClient):
        def stage(self, release: Release) -> Any:
            probed = super().stage(release)
            ledger.fence(release.run_id, "too slow")
            return probed

    slow = Slow(setting.client.url, setting.world.admin_key)
    with pytest.raises(Fenced, match="too slow"):
        setting.release(second, "2", run_id="slow", gateway=slow)
    setting.serves(first, "1")


def test_a_run_that_was_ended_moves_nothing(setting: Setting, adapters: list[Made]) -> None:
    first, second, _ = adapters
    setting.release(first)

    def ended() -> None:
        raise Fenced("run 2 was ended meanwhile")

    with pytest.raises(Fenced, match="ended meanwhile"):
        setting.release(second, "2", still_wanted=ended)
    setting.serves(first, "1")


def test_an_alias_that_cannot_move_stops_the_release(setting: Setting, adapters: list[Made]) -> None:
    first, second, _ = adapters
    setting.release(first)

    def broken(version: str | None) -> None:
        setting.move_alias(version)
        if version == "2":
            raise ConnectionError("MLflow is away")

    with pytest.raises(ReleaseFailed, match="nothing changed: MLflow is away"):
        setting.release(second, "2", move_alias=broken)
    setting.serves(first, "1")


class Failing(GatewayClient):
    """A gateway that can't be reached at the first activation."""

    def __init__(self, url: str, key: str):
        super().__init__(url, key)
        self.failures = 1

    def activate(self, customization: str, adapter_digest: str | None) -> None:
        if self.failures:
            self.failures -= 1
            raise GatewayError("connection lost")
        super().activate(customization, adapter_digest)


def test_a_failure_after_the_record_goes_back_on_the_record(setting: Setting, adapters: list[Made]) -> None:
    first, second, _ = adapters
    setting.release(first)
    failing = Failing(setting.client.url, setting.world.admin_key)
    with pytest.raises(ReleaseFailed, match=r"failed after its release: connection lost; .* serves again"):
        setting.release(second, "2", gateway=failing)
    setting.serves(first, "1")
    rows = setting.world.ledger.history("home", 3)
    assert [(row.action, row.mlflow_version) for row in rows] == [
        ("rollback", "1"),
        ("release", "2"),
        ("release", "1"),
    ]
    assert "connection lost" in rows[0].reason and rows[0].run_id == "run-2"


def test_a_first_release_that_fails_leaves_nothing_serving(setting: Setting, adapters: list[Made]) -> None:
    failing = Failing(setting.client.url, setting.world.admin_key)
    with pytest.raises(ReleaseFailed, match="connection lost; nothing serves"):
        setting.release(adapters[0], gateway=failing)
    setting.serves(None)
    assert setting.world.ledger.history("home", 1)[0].action == "withdraw"


def test_another_release_in_between_stays(setting: Setting, adapters: list[Made]) -> None:
    first, second, _ = adapters
    setting.release(first)

    class Overtaken(GatewayClient):
        def activate(self, customization: str, adapter_digest: str | None) -> None:
            setting.release(first, "3")
            super().activate(customization, adapter_digest)

    overtaken = Overtaken(setting.client.url, setting.world.admin_key)
    with pytest.raises(ReleaseFailed, match="another release came in between and stays"):
        setting.release(second, "2", gateway=overtaken)
    setting.serves(first, "3")


@pytest.mark.parametrize("what", ["a new version", "only other settings"])
def test_what_was_released_meanwhile_is_not_replaced(
    setting: Setting, adapters: list[Made], what: str
) -> None:
    first, second, _ = adapters
    setting.release(first)

    class Slow(GatewayClient):
        def stage(self, release: Release) -> Any:
            setting.release(second, "2")
            return super().stage(release)

    slow = Slow(setting.client.url, setting.world.admin_key)
    late = setting.world.adapter("home", 4) if what == "a new version" else first
    with pytest.raises(ReleaseFailed, match=r"nothing changed: adapter .* was released meanwhile: mater"):
        setting.release(late, "3", gateway=slow)
    setting.serves(second, "2")


def test_what_was_withdrawn_meanwhile_stays_away(setting: Setting, adapters: list[Made]) -> None:
    first, second, _ = adapters
    setting.release(first)

    class Slow(GatewayClient):
        def stage(self, release: Release) -> Any:
            probed = super().stage(release)
            setting.world.record(first, action="withdraw", run_id="by hand")
            return probed

    slow = Slow(setting.client.url, setting.world.admin_key)
    with pytest.raises(ReleaseFailed, match="a withdrawal was released meanwhile"):
        setting.release(second, "2", gateway=slow)
    assert setting.world.ledger.current("home") is None


def test_a_damaged_adapter_is_named(setting: Setting) -> None:
    made = setting.world.adapter("home", 9)
    path = setting.world.home / "artifacts" / "adapter" / made.digest / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: hash is .*, expected"):
        setting.release(made)
    setting.serves(None)


def test_without_a_gateway(setting: Setting, adapters: list[Made], tmp_path: Path) -> None:
    nobody = GatewayClient(f"http://127.0.0.1:{free_port()}", setting.world.admin_key)
    with pytest.raises(ReleaseFailed, match=r"gateway not reachable at http.*start it with `make up`"):
        setting.release(adapters[0], gateway=nobody)
    setting.serves(None)
    with pytest.raises(GatewayError, match=r"no admin key of the gateway in .*make up"):
        GatewayClient.from_key_file("http://127.0.0.1:1", tmp_path / "none")


def test_what_the_gateway_lost_serves_again(setting: Setting, adapters: list[Made]) -> None:
    row = setting.release(adapters[0])
    assert not serve_again(row, store=setting.world.store, gateway=setting.client)
    setting.app.state.engine.activate("home", None)
    with pytest.raises(GatewayError, match="does not exist"):
        verify_served(row, read_fingerprint(setting.world.store, row.adapter_digest), setting.client)
    assert serve_again(row, store=setting.world.store, gateway=setting.client)
    setting.serves(adapters[0], "1")


def test_other_settings_that_were_recorded_and_no_more_are_followed(
    setting: Setting, adapters: list[Made]
) -> None:
    row = setting.release(adapters[0])
    # what a release of the same adapter leaves that is killed right after its commit
    row = setting.world.record(adapters[0], max_new_tokens=2, max_prompt_tokens=9)
    assert serve_again(row, store=setting.world.store, gateway=setting.client)
    version = setting.app.state.engine.served["home"]
    assert (version.max_new_tokens, version.max_prompt_tokens, version.release) == (2, 9, row.id)
    assert not serve_again(row, store=setting.world.store, gateway=setting.client)


def test_a_gateway_that_was_started_again_is_at_the_row_that_it_read(tmp_path: Path) -> None:
    world = World(tmp_path)
    row = world.record(world.adapter("home", 1))
    with gateway_in_thread(world) as (url, _), GatewayClient(url, world.admin_key) as client:
        assert client.health()["served"]["home"]["release"] == row.id
        assert not serve_again(row, store=world.store, gateway=client)


def test_the_alias_follows_the_ledger(setting: Setting, adapters: list[Made]) -> None:
    ledger = setting.world.ledger
    row = setting.release(adapters[0])
    setting.alias = "2"  # what a release leaves that is killed before its commit
    assert follow_ledger("home", "2", "run", ledger, setting.move_alias) == row
    assert setting.alias == "1"
    ledger.fence("late", "its worker is gone")
    setting.alias = "2"
    with pytest.raises(Fenced):
        follow_ledger("home", "2", "late", ledger, setting.move_alias)
    assert setting.alias == "2"
    assert follow_ledger("nothing", "7", "run", ledger, setting.move_alias) is None
    assert setting.alias is None
