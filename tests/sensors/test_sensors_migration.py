"""From new content of a base model to a backfill and its verdicts: the ticks of the real sensor, evaluated as
the daemon does, with a real instance; the runs in between are executed here."""

import datetime
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import migration_location
import pytest
import sqlalchemy as sa
from dagster._core.events import DagsterEvent, StepMaterializationData
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.storage.tags import BACKFILL_ID_TAG, RUN_KEY_TAG, SENSOR_NAME_TAG
from dagster._core.test_utils import create_run_for_test
from maintenance_world import make_release, make_spec
from migration_location import write_base

from ml_assets.base_models.identity import BaseModelError, identify, revision_key
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.decisions.book import DecisionBook, History
from ml_assets.decisions.diagnosis import Policies
from ml_assets.decisions.records import NO_LIMITS, Cost
from ml_assets.decisions.tags import CUSTOMIZATION_TAG, MIGRATION_TAG
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings
from sensors.base_updates import SENSOR, _page_state
from sensors.dispatch import running
from sensors.migration import PLAN, Fleet

NO_WAIT = {2: datetime.timedelta(0), 3: datetime.timedelta(0)}
BASE = dg.AssetKey("base_model")


def spec(name: str, requests: int = 1000, **blocks: Any) -> Any:
    maintenance = {"requests_per_month": requests, **blocks.pop("maintenance", {})}
    return make_spec(name, maintenance=maintenance, **blocks)


class World:
    """An instance, a book, a family whose content can change, and customizations that serve on it."""

    def __init__(self, instance: dg.DagsterInstance, home: Path):
        self.instance, self.home = instance, home
        self.ledger = Ledger(Settings.from_env().ledger_url)
        self.book = DecisionBook(self.ledger)
        self.cursor: str | None = None
        self.run_keys: dict[str, str] = {}
        self.load(spec("one"), spec("two"))

    def load(self, *specs: Any) -> None:
        self.specs = {one.name: one for one in specs}
        self.defs = migration_location.definitions(*specs, retry_after=NO_WAIT)

    def publish(self, content: str) -> str:
        write_base(content)
        return revision_key("tiny", identify(self.home / "base"))

    def tick(self) -> tuple[list[dg.RunRequest], str]:
        with dg.build_sensor_context(
            instance_ref=self.instance.get_ref(),
            definitions=self.defs,
            resources=dict(self.defs.resources or {}),
            cursor=self.cursor,
        ) as context:
            data = self.defs.resolve_sensor_def(SENSOR).evaluate_tick(context)
        self.cursor = data.cursor
        for request in data.dynamic_partitions_requests or []:
            self.instance.add_dynamic_partitions(str(BASE_MODELS.name), list(request.partition_keys))
        wanted = [
            request for request in data.run_requests or [] if PLAN not in (request.asset_selection or [])
        ]
        self.run_keys |= {str(request.partition_key): str(request.run_key) for request in wanted}
        return wanted, data.skip_message or ""

    def execute(
        self, *keys: dg.AssetKey, partition: str, tags: dict[str, str] | None = None
    ) -> dg.ExecuteInProcessResult:
        job = self.defs.resolve_implicit_global_asset_job_def()
        return job.execute_in_process(
            instance=self.instance,
            partition_key=partition,
            asset_selection=list(keys),
            tags=tags or {},
            raise_on_error=False,
        )

    def settle(self, revision: str) -> None:
        """The revision is materialized, as the tick before asked."""
        self.execute(BASE, partition=revision, tags=self.asked_for(revision))

    def asked_for(self, revision: str) -> dict[str, str]:
        """Tags of the run that a tick asked for to make a revision."""
        return {RUN_KEY_TAG: self.run_keys[revision], SENSOR_NAME_TAG: SENSOR}

    def serve(self, name: str, revision: str, seconds: float = 100.0) -> None:
        """A customization serves on a revision, on which its training took that long for 100 rows."""
        with self.ledger.release_transaction(name, "run") as tx:
            tx.record(make_release(name, adapter=f"{name:a<64}", base_revision=revision))
        self.book.note(name, "dataset", {"digest": "d" * 64, "train_rows": 100, "source_version": "v"})
        facts = {"adapter": f"{name:a<64}", "base_revision": revision, "verdict": "promote"}
        self.book.note(name, "candidate", facts | {"dataset": "d" * 64, "source_version": "v"})
        self.book.record_cost(Cost(name, "training", revision, f"run-{name}", seconds, 100))

    def plan(self, content: str) -> str:
        """A revision that is published, passes its probe, and is planned."""
        revision = self.publish(content)
        self.tick()
        self.settle(revision)
        self.tick()
        return revision

    def first(self) -> str:
        """A first revision on which all customizations serve."""
        revision = self.publish("first")
        self.tick()
        self.settle(revision)
        for name in self.specs:
            self.serve(name, revision)
        assert self.tick()[0] == []
        return revision

    def backfills(self) -> list[PartitionBackfill]:
        return list(self.instance.get_backfills())

    def end(self, backfill: PartitionBackfill, status: BulkActionStatus) -> None:
        self.instance.update_backfill(backfill.with_status(status))

    def decided(self, revision: str) -> dict[str, History]:
        return {one.decision.customization: one for one in reversed(self.book.migrations(revision))}

    def alerts(self) -> list[str]:
        return [alert.title for alert in self.book.undelivered()]


@pytest.fixture
def world(evergreen_home: Path) -> Iterator[World]:
    with dg.instance_for_test() as instance:
        world = World(instance, evergreen_home)
        yield world
        world.ledger.close()


def test_a_new_revision_is_probed_planned_shown_and_then_one_backfill(world: World) -> None:
    first = world.first()
    assert world.book.migrations() == [] and world.backfills() == []
    world.load(spec("one", 10), spec("two", 5000), spec("three", 10))
    world.serve("three", first, seconds=20)
    second = world.publish("second")

    [request], _ = world.tick()
    assert request.partition_key == second
    assert request.asset_selection == [BASE]
    assert second in world.instance.get_dynamic_partitions("base_models")
    [repeated], _ = world.tick()  # it was never started: the same request, which Dagster starts once
    assert repeated.run_key == request.run_key
    world.settle(second)

    assert world.tick()[0] == []
    assert {one.state for one in world.decided(second).values()} == {"to do"}
    assert world.backfills() == [], "the plan is seen before anything starts"
    shown = world.instance.get_latest_materialization_event(PLAN)
    assert shown is not None and shown.asset_materialization is not None
    assert shown.asset_materialization.metadata["predicted_device_seconds"].value == 220

    world.tick()
    [backfill] = world.backfills()
    assert backfill.title == f"Migration to {second}"
    assert "220 device seconds" in str(backfill.description)
    assert backfill.tags["evergreen/predicted_device_seconds"] == "220"
    assert set(backfill.asset_selection or []) == {
        dg.AssetKey([name, kind]) for name in world.specs for kind in ("adapter", "eval_report")
    }
    data = backfill.asset_backfill_data
    assert data is not None
    assert data.target_subset.num_partitions_and_non_partitioned_assets == 6
    assert {claim.customization for claim in world.book.claims()} == set(world.specs)
    assert world.tick()[0] == [] and len(world.backfills()) == 1

    # what the eval report of one of them says frees that one, while the others go on
    decision = world.decided(second)["two"].decision
    world.book.step(decision.id, "judged", "promote", "run")
    world.tick()
    assert world.decided(second)["two"].state == "succeeded"
    assert {claim.customization for claim in world.book.claims()} == {"one", "three"}
    world.book.step(world.decided(second)["one"].decision.id, "judged", "reject", "run")
    world.end(backfill, BulkActionStatus.COMPLETED_FAILED)
    world.tick()
    assert world.decided(second)["one"].end.detail == "the gate says reject"
    states = sorted((h.decision.attempt, h.state) for h in world.book.migrations(second))
    assert states[:1] == [(1, "failed")] and (2, "under way") in states, "the one that failed is tried again"
    assert len(world.backfills()) == 2
    assert world.backfills()[0].asset_selection == [
        dg.AssetKey(["three", "adapter"]),
        dg.AssetKey(["three", "eval_report"]),
    ]


def test_a_person_who_cancels_the_backfill_is_obeyed(world: World) -> None:
    world.first()
    second = world.plan("second")
    world.tick()
    [backfill] = world.backfills()
    world.end(backfill, BulkActionStatus.CANCELED)
    for _ in range(3):
        world.tick()
    assert {one.state for one in world.decided(second).values()} == {"canceled"}
    assert len(world.backfills()) == 1


@pytest.mark.parametrize("check", ["finite_logits", "tokenizer_round_trip"])
def test_a_broken_revision_stops_and_does_not_hold_up_the_next(world: World, check: str) -> None:
    world.first()
    broken = world.publish("broken")
    world.tick()
    (world.home / "failed_checks").write_text(check)
    world.settle(broken)
    (world.home / "failed_checks").unlink()
    _, message = world.tick()
    assert f"{broken} stops at its probe: {check}" in message
    assert f"base revision {broken} can't be used" in world.alerts()
    world.tick()
    assert world.book.migrations() == [] and world.backfills() == []

    good = world.publish("good")
    assert [request.partition_key for request in world.tick()[0]] == [good]
    world.settle(good)
    world.tick(), world.tick()
    assert [backfill.tags["evergreen/base_revision"] for backfill in world.backfills()] == [good]


def test_a_check_that_fails_on_what_serves_too_is_no_reason(world: World) -> None:
    (world.home / "failed_checks").write_text("tokenizer_round_trip")
    world.first()
    world.plan("second")
    world.tick()
    assert len(world.backfills()) == 1


def test_a_revision_that_can_not_be_made_stops(world: World) -> None:
    world.first()
    broken = world.publish("broken")
    world.tick()
    (world.home / "fail").write_text("")
    world.settle(broken)
    (world.home / "fail").unlink()
    _, message = world.tick()
    assert f"{broken} stops at its probe: told to fail" in message and world.backfills() == []
    world.execute(BASE, partition=broken)  # a person has repaired it
    world.tick(), world.tick()
    assert len(world.backfills()) == 1


@pytest.mark.usefixtures("dies_before_alerts")
def test_what_does_not_fit_the_budget_is_recorded_and_the_rest_starts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.load(
        spec("one", 10),
        spec("two", 10, maintenance={"device_seconds_per_month": 150}),
        spec("three", 10, migration={"mode": "record"}),
    )
    world.first()
    second = world.plan("second")
    world.tick()
    states = {name: one.state for name, one in world.decided(second).items()}
    assert states == {"one": "under way", "two": "blocked_by_budget", "three": "record_only"}
    assert any("two" in title and "budget" in title for title in world.alerts())
    [backfill] = world.backfills()
    assert {key.path[0] for key in backfill.asset_selection or []} == {"one"}
    # a person who raises the limit, or lets it be automatic, is followed
    world.load(spec("one", 10), spec("two", 10), spec("three", 10))
    world.tick(), world.tick()
    assert {key.path[0] for key in world.backfills()[0].asset_selection or []} == {"two", "three"}


def test_the_fleets_budget_goes_to_the_most_valuable(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERGREEN_FLEET_DEVICE_SECONDS", "350")  # 200 of it are spent
    world.first()
    second = world.publish("second")
    worth = {"one": 5.0, "two": 50.0}
    monkeypatch.setattr("sensors.migration.value_per_1000", lambda summary: worth[summary["name"]])
    monkeypatch.setattr("sensors.migration.read_json", lambda path: {"name": path.parent.name})
    monkeypatch.setattr("ml_assets.artifacts.ArtifactStore.open", lambda self, ref: Path("/") / ref.digest)
    for name in worth:  # the report that let it serve is about that customization
        with world.ledger.release_transaction(name, "run") as tx:
            current = tx.current()
            assert current is not None
            tx.record(
                make_release(
                    name, current.adapter_digest, base_revision=current.base_revision, report_digest=name
                )
            )
    world.tick()
    world.settle(second)
    world.tick()
    states = {name: one.decision.status for name, one in world.decided(second).items()}
    assert states == {"one": "blocked_by_budget", "two": "to_do"}


def test_claimed_and_then_dead(world: World) -> None:
    """A tick that dies after it has claimed, or after it has put decisions together: nothing is lost and
    nothing is done twice."""
    world.first()
    second = world.plan("second")
    decisions = [one.decision for one in world.decided(second).values()]
    for decision in decisions:
        assert world.book.claim(decision, NO_LIMITS, NO_LIMITS, 0.0) is None
    world.tick()
    [backfill] = world.backfills()
    assert world.book.start_together([decision.id for decision in decisions]) == backfill.backfill_id
    for _ in range(2):
        world.tick()
    assert [one.backfill_id for one in world.backfills()] == [backfill.backfill_id]


def test_a_customization_that_is_busy_is_carried_over_later(world: World) -> None:
    world.first()
    world.plan("second")
    run = create_run_for_test(
        world.instance,
        job_name="one__update",
        status=dg.DagsterRunStatus.STARTED,
        tags={CUSTOMIZATION_TAG: "one"},
    )
    world.tick()
    [backfill] = world.backfills()
    assert {key.path[0] for key in backfill.asset_selection or []} == {"two"}
    world.instance.report_run_failed(run)
    world.tick()
    assert {key.path[0] for key in world.backfills()[0].asset_selection or []} == {"one"}


def test_a_newer_revision_takes_the_place_of_one_that_was_not_begun(world: World) -> None:
    world.first()
    second = world.plan("second")
    third = world.publish("third")
    world.tick()
    assert {one.state for one in world.decided(second).values()} == {"to do"}, "it is not known to be better"
    world.settle(third)
    world.tick()
    assert {one.state for one in world.decided(second).values()} == {"dropped"}
    world.tick()
    assert [one.tags["evergreen/base_revision"] for one in world.backfills()] == [third]


def test_a_newer_revision_that_is_broken_does_not_take_that_place(world: World) -> None:
    world.first()
    second = world.plan("second")
    broken = world.publish("broken")
    for _ in range(2):
        world.tick()
    assert world.backfills() == [] and {one.state for one in world.decided(second).values()} == {"to do"}
    (world.home / "failed_checks").write_text("finite_logits")
    world.settle(broken)
    (world.home / "failed_checks").unlink()
    world.tick()
    assert [one.tags["evergreen/base_revision"] for one in world.backfills()] == [second]


def carry_to(world: World, revision: str) -> None:
    """All customizations are migrated to a planned revision."""
    world.tick()
    carry(world, revision)


def carry(world: World, revision: str) -> None:
    """All customizations are migrated to a revision whose migration is under way."""
    for name, history in world.decided(revision).items():
        world.book.step(history.decision.id, "judged", "promote", "run")
        world.serve(name, revision)
    world.tick()


def test_a_revision_that_is_published_again_is_migrated_to_again(world: World) -> None:
    world.first()
    second = world.plan("second")
    third = world.plan("third")
    world.tick()
    assert {one.state for one in world.decided(second).values()} == {"dropped"}
    carry(world, third)
    assert {one.state for one in world.decided(third).values()} == {"succeeded"}
    for revision in (second, third, second):  # the publisher can't decide
        world.publish({second: "second", third: "third"}[revision])
        world.tick(), world.tick()
        assert {one.state for one in world.decided(revision).values()} == {"under way"}, revision
        carry(world, revision)
    assert len(world.backfills()) == 4
    for _ in range(3):
        world.tick()
    assert len(world.backfills()) == 4


def test_a_source_that_is_away_after_a_step_back_carries_nothing_forward(world: World) -> None:
    first = world.first()
    carry_to(world, second := world.plan("second"))
    world.publish("first")  # the publisher withdraws it
    world.tick(), world.tick()
    carry(world, first)
    made = len(world.backfills())
    shutil.move(world.home / "base", world.home / "away")
    for _ in range(3):
        with pytest.raises(BaseModelError):  # it says that the source can't be read, and nothing else
            world.tick()
    assert len(world.backfills()) == made
    assert {one.state for one in world.decided(second).values()} == {"succeeded"}


def test_what_a_source_holds_has_to_be_known(world: World) -> None:
    """Before it was read for the first time, nothing is planned and nothing begins."""
    world.first()
    second = world.publish("second")
    world.tick()
    world.settle(second)
    shutil.move(world.home / "base", world.home / "away")
    forget = sa.text("DELETE FROM notes WHERE customization = 'base:tiny'")
    with world.ledger.engine.begin() as connection:
        connection.execute(forget)
    with pytest.raises(BaseModelError):
        world.tick()
    assert world.book.migrations() == []
    shutil.move(world.home / "away", world.home / "base")
    world.tick()
    shutil.move(world.home / "base", world.home / "away")
    with world.ledger.engine.begin() as connection:
        connection.execute(forget)
    _, message = world.tick()
    assert f"its migration to {second} waits until the source of tiny was read" in message
    assert world.backfills() == []
    shutil.move(world.home / "away", world.home / "base")
    world.tick()
    assert len(world.backfills()) == 1


def fail_probe(world: World, revision: str) -> None:
    """A person materializes it again, and it fails."""
    (world.home / "failed_checks").write_text("finite_logits")
    world.execute(BASE, partition=revision)
    (world.home / "failed_checks").unlink()


@pytest.mark.parametrize("newer", [False, True])
def test_a_revision_that_fails_its_probe_after_the_plan(world: World, newer: bool) -> None:
    world.first()
    second = world.plan("second")
    if newer:
        broken = world.publish("broken")
        world.tick()
        fail_probe(world, broken)
    fail_probe(world, second)
    world.tick(), world.tick()
    ends = [one.end for one in world.decided(second).values()]
    assert {(end.step, end.detail) for end in ends if end} == {("dropped", "it failed its probe")}
    assert world.backfills() == []
    world.publish("second")
    world.execute(BASE, partition=second)  # repaired
    world.tick(), world.tick()
    assert {one.state for one in world.decided(second).values()} == {"under way"}


def test_claimed_for_a_revision_that_fails_its_probe_meanwhile(world: World) -> None:
    world.first()
    second = world.plan("second")
    for one in world.decided(second).values():
        assert world.book.claim(one.decision, NO_LIMITS, NO_LIMITS, 0.0) is None
    fail_probe(world, second)
    world.tick()
    assert world.backfills() == [] and world.book.claims() == []


def test_a_probe_that_dies_before_its_checks(world: World) -> None:
    """Dagster stores that an asset was made before it stores what its checks say."""
    world.first()
    second = world.publish("second")
    world.tick()
    run = create_run_for_test(
        world.instance,
        job_name="__ASSET_JOB",
        status=dg.DagsterRunStatus.STARTED,
        tags=world.asked_for(second),
    )
    made = DagsterEvent(
        event_type_value="ASSET_MATERIALIZATION",
        job_name="__ASSET_JOB",
        step_key="base_model",
        event_specific_data=StepMaterializationData(dg.AssetMaterialization(BASE, partition=second)),
    )
    world.instance.report_dagster_event(made, run.run_id)
    assert f"{second} is being probed" in world.tick()[1]
    world.instance.report_run_failed(run)
    for _ in range(3):
        assert f"{second} stops at its probe" in world.tick()[1]
    assert world.book.migrations() == [] and world.backfills() == []


def test_a_probe_that_was_never_submitted_is_asked_for_again(world: World) -> None:
    world.first()
    second = world.publish("second")
    world.tick()
    create_run_for_test(
        world.instance,
        job_name="__ASSET_JOB",
        status=dg.DagsterRunStatus.NOT_STARTED,
        tags=world.asked_for(second),
    )
    [request], _ = world.tick()
    assert request.run_key == world.asked_for(second)[RUN_KEY_TAG]


def test_a_partition_that_was_retired_is_made_anew(world: World) -> None:
    first = world.first()
    carry_to(world, world.plan("second"))
    world.instance.delete_dynamic_partition(str(BASE_MODELS.name), first)
    key = world.run_keys[first]
    world.publish("first")
    for _ in range(2):
        [request], _ = world.tick()
        assert (request.partition_key, request.run_key == key) == (first, False)
    assert len({world.run_keys[first], request.run_key}) == 1
    assert world.decided(first) == {}, "what was made for it is gone"
    world.settle(first)
    world.tick(), world.tick()
    assert {one.state for one in world.decided(first).values()} == {"under way"}


def test_what_could_not_be_made_is_tried_again_when_it_is_published_again(world: World) -> None:
    """Its source may have been exchanged while it was downloaded."""
    world.first()
    second = world.publish("second")
    world.tick()
    (world.home / "fail").write_text("")
    world.settle(second)
    (world.home / "fail").unlink()
    assert world.tick()[0] == []
    world.publish("first"), world.tick()
    world.publish("second")
    assert [request.partition_key for request in world.tick()[0]] == [second]
    world.settle(second)
    world.tick(), world.tick()
    assert len(world.backfills()) == 1


@pytest.mark.parametrize("together", [False, True])
def test_a_customization_that_is_removed_after_it_was_claimed_holds_up_no_other(
    world: World, together: bool
) -> None:
    world.first()
    second = world.plan("second")
    decisions = [one.decision for one in world.decided(second).values()]
    for decision in decisions:
        assert world.book.claim(decision, NO_LIMITS, NO_LIMITS, 0.0) is None
    if together:
        world.book.start_together([decision.id for decision in decisions])
    world.load(spec("two"))
    world.tick()
    [backfill] = world.backfills()
    assert {key.path[0] for key in backfill.asset_selection or []} == {"two"}
    assert [claim.customization for claim in world.book.claims()] == ["two"]
    assert world.decided(second)["one"].state == "dropped"


@pytest.mark.usefixtures("dies_before_alerts")
def test_what_is_closed_by_a_budget_or_given_up_is_told(world: World) -> None:
    world.load(spec("one", maintenance={"device_seconds_per_month": 250}), spec("two"))
    world.first()
    second = world.plan("second")
    world.book.record_cost(Cost("one", "training", "x", "another", 100.0, 100))
    world.tick()
    [blocked] = world.alerts()
    assert blocked.startswith("one: its migration") and "blocked by the budget" in blocked
    for _ in range(3):
        world.end(world.backfills()[0], BulkActionStatus.COMPLETED_FAILED)
        world.tick()
    assert world.decided(second)["two"].decision.attempt == 3
    assert "failed and is not tried again" in world.alerts()[-1]


def test_the_page_is_made_again_when_an_earlier_adapter_serves_again(world: World) -> None:
    world.first()
    second = world.plan("second")
    for one in world.decided(second).values():
        world.book.step(one.decision.id, "succeeded")
    seen = []
    for revision in ("x@0", "y@0", "x@0"):
        world.serve("one", revision)
        serving = world.ledger.current_all()
        fleet = Fleet(
            world.instance, world.book, world.specs, Policies([]), world.ledger, serving, Settings.from_env()
        )
        seen.append(_page_state(fleet))
    assert len(set(seen)) == 3


def test_what_left_a_family_is_not_carried_back(world: World) -> None:
    """It follows two families, came from one of them and serves on the other."""
    first = world.first()
    world.serve("one", "other@0123456789ab")
    for _ in range(3):
        world.tick()
    assert world.book.migrations() == []
    second = world.plan("second")
    assert set(world.decided(second)) == {"one", "two"} and world.decided(first) == {}


def test_what_a_backfills_run_still_changes(world: World) -> None:
    """A run over many customizations has no customization's tag; each is free once its own steps ended."""
    first = world.first()
    run_ids: list[dict[str, str]] = []

    @dg.asset(key=["two", "adapter"], partitions_def=BASE_MODELS)
    def adapter(context: dg.AssetExecutionContext) -> None:
        run_ids.append(running(context.instance, ["one", "two", "three"]))

    @dg.asset(key=["one", "eval_report"], partitions_def=BASE_MODELS)
    def eval_report() -> None: ...

    @dg.asset(key=["two", "eval_report"], deps=[adapter, eval_report], partitions_def=BASE_MODELS)
    def last(context: dg.AssetExecutionContext) -> None:
        run_ids.append(running(context.instance, ["one", "two", "three"]))

    defs = dg.Definitions(assets=[adapter, eval_report, last])
    job = defs.resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(
        instance=world.instance,
        partition_key=first,
        asset_selection=[adapter.key, eval_report.key, last.key],
        tags={BACKFILL_ID_TAG: "x", MIGRATION_TAG: "x"},
    )
    assert run_ids[-1] == {"two": result.run_id}
    assert set(run_ids[0]) <= {"one", "two"} and "two" in run_ids[0]
    assert running(world.instance, ["one", "two"]) == {}
