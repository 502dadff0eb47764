"""The sensors that look at traffic and staleness, evaluated as the daemon does, with a real instance."""

import dataclasses
import datetime
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import fleet_location
import pytest
from dagster._core.storage.tags import RUN_KEY_TAG, SENSOR_NAME_TAG
from dagster._core.test_utils import create_run_for_test
from maintenance_world import (
    ADAPTER,
    DATASET,
    REVISION,
    make_evidence,
    make_release,
    make_spec,
    release,
)

import sensors.drift
import sensors.freshness
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import Policy, decide
from ml_assets.decisions.records import Cost, Decision
from ml_assets.decisions.tags import CUSTOMIZATION_TAG, DECISION_TAG
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings
from ml_assets.spec import ScheduleSpec
from ml_assets.traffic.records import TrafficRecord
from ml_assets.traffic.store import TrafficLog
from sensors.schedules import scheduled

NO_WAIT = {2: datetime.timedelta(0), 3: datetime.timedelta(0)}
SPECS = [make_spec(name, drift={"every": fleet_location.EVERY}) for name in ("home", "other")]


class Fleet:
    """An instance, a ledger and a traffic log, and ticks of the real sensors over them."""

    def __init__(self, instance: dg.DagsterInstance, home: Path):
        self.instance, self.home = instance, home
        self.ledger = Ledger(Settings.from_env().ledger_url)
        self.book = DecisionBook(self.ledger)
        self.traffic = TrafficLog(Settings.from_env().traffic_url)
        self.cursors: dict[str, str | None] = {}
        self.load(*SPECS)

    def load(self, *specs: Any) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.defs = fleet_location.definitions(*specs, retry_after=NO_WAIT)

    def tick(self, sensor: str) -> tuple[list[dg.RunRequest], str]:
        """(runs requested, why none)."""
        with dg.build_sensor_context(
            instance_ref=self.instance.get_ref(),
            definitions=self.defs,
            resources=dict(self.defs.resources or {}),
            cursor=self.cursors.get(sensor),
        ) as context:
            data = self.defs.resolve_sensor_def(sensor).evaluate_tick(context)
        self.cursors[sensor] = data.cursor
        return list(data.run_requests or []), data.skip_message or ""

    def execute(self, request: dg.RunRequest, sensor: str = "drift") -> dg.ExecuteInProcessResult:
        """The run of a request, under the tags that the daemon gives it."""
        implicit = self.defs.resolve_implicit_global_asset_job_def()
        named = request.job_name not in (None, implicit.name)
        job = self.defs.resolve_job_def(str(request.job_name)) if named else implicit
        return job.execute_in_process(
            instance=self.instance,
            partition_key=request.partition_key,
            run_config=request.run_config,
            tags={**request.tags, RUN_KEY_TAG: str(request.run_key), SENSOR_NAME_TAG: sensor},
            asset_selection=request.asset_selection,
            raise_on_error=False,
        )

    def decide(self, name: str = "home", **changes: Any) -> Decision:
        """Record what the decision asset would."""
        policy = Policy.of(self.specs[name], Settings.from_env())
        made = dataclasses.replace(decide(make_evidence(), policy), customization=name, **changes)
        return self.book.record(made)

    def ask(self, count: int, name: str = "home") -> None:
        """Requests to an endpoint."""
        start = sum(head.requests for head in self.traffic.heads().values())
        self.traffic.append(
            [
                TrafficRecord(
                    id=f"chatcmpl-{start + n}",
                    at="2026-03-10T12:00:00+00:00",
                    customization=name,
                    key_id="key",
                    adapter_digest=ADAPTER,
                    base_revision=REVISION,
                    messages=[{"role": "user", "content": "hello"}],
                    answer="hi",
                    status=200,
                    finish_reason="stop",
                    prompt_tokens=1,
                    completion_tokens=1,
                    latency_ms=1.0,
                    first_token_ms=1.0,
                    mean_logprob=-0.1,
                )
                for n in range(count)
            ]
        )

    def look_done(self, looked: int, name: str = "home") -> None:
        self.book.note(name, "look", {"adapter": ADAPTER, "to_seq": looked, "looked": looked})

    def ran(self) -> list[dict[str, Any]]:
        file = self.home / "ran.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def fleet(evergreen_home: Path) -> Iterator[Fleet]:
    with dg.instance_for_test() as instance:
        instance.add_dynamic_partitions(str(BASE_MODELS.name), [REVISION])
        fleet = Fleet(instance, evergreen_home)
        release(fleet.ledger)
        release(fleet.ledger, "other")
        yield fleet
        fleet.ledger.close()
        fleet.traffic.close()


# -- looks ---------------------------------------------------------------------------------------------


def test_a_look_after_enough_requests(fleet: Fleet) -> None:
    requests, why = fleet.tick("drift")
    assert requests == [] and "no requests yet: home, other" in why
    fleet.ask(9)
    assert "too few new requests for a look: home (9 of 10)" in fleet.tick("drift")[1]
    fleet.ask(1)
    ((look,), _) = fleet.tick("drift")
    assert (look.job_name, look.run_key) == ("home__look", f"home:look:{ADAPTER[:12]}:0:1")

    # it is under way: nothing is asked for again
    tags = {CUSTOMIZATION_TAG: "home"}
    run = create_run_for_test(
        fleet.instance, job_name="home__look", status=dg.DagsterRunStatus.STARTED, tags=tags
    )
    assert fleet.tick("drift") == ([], "home: a look is under way")
    fleet.instance.delete_run(run.run_id)
    fleet.look_done(10)
    assert "home (0 of 10)" in fleet.tick("drift")[1]


def test_a_look_that_does_not_happen_is_asked_for_again_and_not_for_ever(fleet: Fleet) -> None:
    fleet.ask(12)
    keys = [fleet.tick("drift")[0][0].run_key for _ in range(3)]
    assert keys == [f"home:look:{ADAPTER[:12]}:0:{attempt}" for attempt in (1, 2, 3)]
    requests, why = fleet.tick("drift")
    assert requests == [] and "3 looks failed; the next one after 10 more requests" in why
    fleet.ask(10)
    assert fleet.tick("drift")[0][0].run_key == f"home:look:{ADAPTER[:12]}:0:4"


def test_looks_that_fail_keep_nobody_waiting(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors.drift, "RUNS_PER_TICK", 1)
    fleet.ask(18)
    for _ in range(3):
        fleet.tick("drift")
    fleet.ask(10, "other")
    ((look,), _) = fleet.tick("drift")
    assert look.job_name == "other__look"


def test_a_tick_leaves_looks_to_the_next(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors.drift, "RUNS_PER_TICK", 1)
    fleet.ask(11)
    fleet.ask(10, "other")
    ((look,), _) = fleet.tick("drift")
    assert look.job_name == "home__look"
    tags = {CUSTOMIZATION_TAG: "home"}
    create_run_for_test(fleet.instance, job_name="home__look", status=dg.DagsterRunStatus.STARTED, tags=tags)
    assert fleet.tick("drift") == ([], "home: a look is under way; 1 looks are left to the next tick")


def test_what_serves_nothing_is_not_looked_at(fleet: Fleet) -> None:
    fleet.load(*SPECS, make_spec("third", drift={"every": 1}))
    fleet.ask(5, "third")
    requests, why = fleet.tick("drift")
    assert requests == [] and "nothing serves yet: third" in why


# -- actions -------------------------------------------------------------------------------------------


def test_a_decision_becomes_one_run(fleet: Fleet) -> None:
    decision = fleet.decide()
    ((request,), _) = fleet.tick("drift")
    assert request.run_key == decision.key
    assert (request.job_name, request.partition_key) == ("home__update", REVISION)
    assert request.tags[DECISION_TAG] == decision.id
    for part in (decision.evidence, DATASET[:12], decision.policy, ":1"):
        assert part in str(request.run_key)

    # the tick's answer was lost: the same run is requested again
    ((again,), _) = fleet.tick("drift")
    assert again.run_key == request.run_key

    assert fleet.execute(request).success
    requests, why = fleet.tick("drift")
    assert requests == [] and "incremental_update succeeded, the gate says promote" in why
    assert fleet.book.get(decision.id).state == "succeeded"
    assert {(line["asset"], line["job"]) for line in fleet.ran()} == {
        (kind, "home__update") for kind in ("dataset", "adapter", "eval_report", "endpoint")
    }
    assert [line["mode"] for line in fleet.ran() if line["asset"] == "adapter"] == ["incremental"]
    assert fleet.tick("drift")[0] == []


def test_a_fleet_without_jobs_runs_the_same_assets(fleet: Fleet) -> None:
    fleet.defs = fleet_location.definitions(*SPECS, with_jobs=False, retry_after=NO_WAIT)
    fleet.ask(12)
    decision = fleet.decide("other")
    requests, _ = fleet.tick("drift")
    by_key = {request.run_key: request for request in requests}
    update, look = by_key.pop(decision.key), next(iter(by_key.values()))
    assert {key.to_user_string() for key in look.asset_selection} == {
        "home/traffic",
        "home/drift_report",
        "home/decision",
    }
    assert fleet.execute(look).success and fleet.execute(update).success
    fleet.look_done(12)
    assert "incremental_update succeeded, the gate says promote" in str(fleet.tick("drift"))
    assert [line["asset"] for line in fleet.ran()] == [
        *("traffic", "drift_report", "decision"),
        *("dataset", "adapter", "eval_report", "endpoint"),
    ]
    run = create_run_for_test(
        fleet.instance,
        job_name="__ASSET_JOB",
        status=dg.DagsterRunStatus.STARTED,
        tags={CUSTOMIZATION_TAG: "other"},
        asset_selection=frozenset({dg.AssetKey(["other", "adapter"])}),
    )
    fleet.decide("other", evidence="later")
    assert f"waits for run {run.run_id[:8]}" in fleet.tick("drift")[1]


@pytest.mark.usefixtures("dies_before_alerts")
def test_a_failed_run_is_tried_again_with_another_key_and_then_given_up(fleet: Fleet) -> None:
    (fleet.home / "fail").touch()
    first = fleet.decide()
    keys = []
    for _ in range(3):
        ((request,), _) = fleet.tick("drift")
        keys.append(request.run_key)
        assert not fleet.execute(request).success
    assert len(set(keys)) == 3
    requests, why = fleet.tick("drift")
    assert requests == [] and "gave_up" in why
    assert fleet.tick("drift")[0] == []
    assert [h.state for h in fleet.book.latest("home", 5)] == ["gave_up", "failed", "failed"]
    (alert,) = fleet.book.undelivered()
    assert "is not tried again" in alert.title
    assert first.evidence in {h.decision.evidence for h in fleet.book.latest("home", 5)}


def test_attempts_wait(fleet: Fleet) -> None:
    fleet.defs = fleet_location.definitions(*SPECS)
    fleet.decide(attempt=2)
    requests, why = fleet.tick("drift")
    assert requests == [] and "attempt 2 of incremental_update waits 0:05:00" in why


def test_a_rejected_candidate_is_followed_by_a_retrain_once(fleet: Fleet) -> None:
    (fleet.home / "verdict").write_text("reject")
    fleet.decide()
    ((request,), _) = fleet.tick("drift")
    fleet.execute(request)
    ((retrain,), _) = fleet.tick("drift")
    assert retrain.run_config == {"ops": {"home__adapter": {"config": {"mode": "full"}}}}
    fleet.execute(retrain)
    assert fleet.tick("drift")[0] == []
    assert [(h.decision.action, h.state, h.verdict) for h in fleet.book.latest("home", 5)] == [
        ("full_retrain", "succeeded", "reject"),
        ("incremental_update", "succeeded", "reject"),
    ]


def test_an_update_that_is_impossible_is_followed_by_a_retrain_at_once(fleet: Fleet) -> None:
    (fleet.home / "fail").touch()
    decision = fleet.decide()
    ((request,), _) = fleet.tick("drift")
    fleet.book.step(decision.id, "impossible", "the recipe changed: train from scratch", "run")
    fleet.execute(request)
    ((retrain,), _) = fleet.tick("drift")
    assert retrain.run_config == {"ops": {"home__adapter": {"config": {"mode": "full"}}}}
    then, first = fleet.book.latest("home", 5)
    assert (first.state, first.end.detail) == ("gave_up", "the recipe changed: train from scratch")
    assert "the recipe changed" in then.decision.reason and then.decision.attempt == 2
    assert fleet.book.undelivered() == [], "it is being repaired"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter_digest": "f" * 64}, "serves since"),
        ({"policy": "00000000"}, "the policy changed"),
        ({"base_revision": "gone@000000000000"}, "is not a partition any more"),
    ],
)
def test_a_decision_that_does_not_hold_any_more_is_dropped(fleet: Fleet, changes: dict, reason: str) -> None:
    decision = fleet.decide(**changes)
    good = fleet.decide("other")
    requests, _ = fleet.tick("drift")
    assert [request.run_key for request in requests] == [good.key], "one bad decision stops no other"
    history = fleet.book.get(decision.id)
    assert history.state == "dropped" and reason in history.end.detail


def retrain_at_its_time(fleet: Fleet, at: str = "2026-11-01T03:00") -> Decision:
    """What the schedule of `home` decides."""
    block, current = ScheduleSpec(cron="0 3 1 * *", run="retrain"), fleet.ledger.current("home")
    assert current is not None
    return fleet.book.record(scheduled(fleet.specs["home"], block, at, current, fleet.ledger))


def exhaust(fleet: Fleet) -> None:
    """The budget of `home` is spent."""
    fleet.load(make_spec("home", maintenance={"device_seconds_per_month": 1}), SPECS[1])
    fleet.book.record_cost(Cost("home", "training", REVISION, "a run", 5.0, 10))


@pytest.mark.parametrize("what", ["adapter", "base", "policy"])
def test_what_a_schedule_decided_is_about_what_serves_when_it_begins(fleet: Fleet, what: str) -> None:
    first, newer = retrain_at_its_time(fleet), "tiny@ba9876543210"
    if what == "policy":
        fleet.load(make_spec("home", maintenance={"min_new_rows": 7}), SPECS[1])
    else:
        changes = {"base_revision": newer} if what == "base" else {}
        fleet.instance.add_dynamic_partitions(str(BASE_MODELS.name), [newer])
        with fleet.ledger.release_transaction("home", "run") as tx:
            tx.record(make_release("home", "b" * 64, **changes))
    assert "full_retrain is dropped" in fleet.tick("drift")[1]
    ((request,), _) = fleet.tick("drift")
    assert request.partition_key == (newer if what == "base" else REVISION)
    anew, before = fleet.book.latest("home", 5)
    assert (before.decision.id, before.state, anew.state) == (first.id, "dropped", "under way")
    assert request.run_key == anew.decision.key != first.key
    assert fleet.execute(request).success
    for _ in range(2):
        assert fleet.tick("drift")[0] == []
    assert len(fleet.book.latest("home", 5)) == 2


@pytest.mark.usefixtures("dies_before_alerts")
def test_a_schedule_that_is_blocked_when_it_is_decided_anew_is_told(fleet: Fleet) -> None:
    retrain_at_its_time(fleet)
    exhaust(fleet)
    fleet.tick("drift")
    assert [h.state for h in fleet.book.latest("home", 5)] == ["blocked_by_budget", "dropped"]
    (alert,) = fleet.book.undelivered()
    assert "full_retrain blocked by the budget" in alert.title


def test_what_was_claimed_for_a_partition_that_is_gone_is_dropped(fleet: Fleet) -> None:
    decision = fleet.decide()
    fleet.tick("drift")  # its run was never made
    fleet.instance.delete_dynamic_partition(str(BASE_MODELS.name), REVISION)
    requests, why = fleet.tick("drift")
    assert requests == [] and "is not a partition any more" in why
    assert fleet.book.get(decision.id).state == "dropped" and fleet.book.claims() == []


@pytest.mark.parametrize("status", ["record_only", "blocked_by_budget", "no_action"])
def test_what_would_have_been_done_is_not_done(fleet: Fleet, status: str) -> None:
    fleet.decide(status=status)
    assert fleet.tick("drift")[0] == []


@pytest.mark.usefixtures("dies_before_alerts")
def test_an_exhausted_budget_at_the_last_moment(fleet: Fleet) -> None:
    limited = make_spec("home", maintenance={"device_seconds_per_month": 50})
    fleet.load(limited, SPECS[1])
    fleet.decide(status="to_do", device_seconds=60.0)
    requests, why = fleet.tick("drift")
    assert requests == [] and "the budget of this customization" in why
    (alert,) = fleet.book.undelivered()
    assert "blocked by the budget" in alert.title


def test_a_run_by_hand_comes_first(fleet: Fleet) -> None:
    fleet.decide()
    run = create_run_for_test(
        fleet.instance,
        job_name="home__main",
        status=dg.DagsterRunStatus.STARTED,
        tags={CUSTOMIZATION_TAG: "home"},
    )
    requests, why = fleet.tick("drift")
    assert requests == [] and f"waits for run {run.run_id[:8]}" in why
    fleet.instance.report_run_canceled(run)
    assert len(fleet.tick("drift")[0]) == 1


def test_a_run_that_a_person_canceled_is_not_repeated(fleet: Fleet) -> None:
    decision = fleet.decide()
    ((request,), _) = fleet.tick("drift")
    run = create_run_for_test(
        fleet.instance, job_name="home__update", status=dg.DagsterRunStatus.STARTED, tags=dict(request.tags)
    )
    fleet.instance.report_run_canceled(run)
    requests, why = fleet.tick("drift")
    assert requests == [] and "canceled" in why and fleet.book.get(decision.id).state == "canceled"


def test_two_sensors_that_want_the_same_customization_at_once(fleet: Fleet) -> None:
    """Both ticks at the same time on two threads, four times: one run, and the other decision waits."""
    for number in range(4):
        fleet.decide(evidence=f"look-{number}")
        refresh = {"action": "refresh_source", "evidence": f"source-{number}"}
        fleet.decide(**refresh)
        start, found = threading.Barrier(2), []

        def tick(sensor: str, start: threading.Barrier, found: list) -> None:
            start.wait()
            found.extend((sensor, request) for request in fleet.tick(sensor)[0])

        threads = [
            threading.Thread(target=tick, args=(name, start, found)) for name in ("drift", "stale_data")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 1, [request.run_key for _, request in found]
        assert len(fleet.book.claims()) == 1
        sensor, request = found[0]
        fleet.execute(request, sensor)
        # the other one follows when the first has ended
        ((late, _), _) = (fleet.tick(sensor), fleet.tick("stale_data" if sensor == "drift" else "drift"))
        assert late == []
        other = "stale_data" if sensor == "drift" else "drift"
        ((second,), _) = fleet.tick(other)
        fleet.execute(second, other)
        fleet.tick(other)
        assert fleet.book.claims() == []


# -- staleness -----------------------------------------------------------------------------------------


def note_all(fleet: Fleet, source: str, made_of: str) -> None:
    fleet.book.note("home", "source", {"version": source})
    fleet.book.note("home", "dataset", {"digest": DATASET, "source_version": made_of, "train_rows": 10})
    facts = {"adapter": ADAPTER, "base_revision": REVISION, "dataset": DATASET, "source_version": made_of}
    fleet.book.note("home", "candidate", facts | {"verdict": "promote"})
    fleet.book.note("home", "accepted", facts | {"verdict": "promote"})


def test_other_rows_in_the_source_start_the_main_job_once(fleet: Fleet) -> None:
    note_all(fleet, "v1", "v1")
    requests, why = fleet.tick("stale_data")
    assert requests == [] and why.startswith("2 customizations are up to date")
    note_all(fleet, "v2", "v1")
    ((request,), _) = fleet.tick("stale_data")
    assert (request.job_name, request.partition_key) == ("home__main", REVISION)
    fleet.execute(request, "stale_data")
    requests, why = fleet.tick("stale_data")
    assert requests == [] and "refresh_source succeeded" in why
    assert fleet.tick("stale_data")[0] == [], "what it led to is for the gate, not for another run"


@pytest.mark.usefixtures("dies_before_alerts")
def test_other_rows_that_a_budget_does_not_allow_for_are_told(fleet: Fleet) -> None:
    exhaust(fleet)
    note_all(fleet, "v2", "v1")
    assert fleet.tick("stale_data")[0] == []
    (alert,) = fleet.book.undelivered()
    assert "refresh_source is blocked by the budget" in alert.title


def test_a_source_that_never_rests_is_followed_once_in_a_cooldown(fleet: Fleet) -> None:
    note_all(fleet, "v2", "v1")
    ((request,), _) = fleet.tick("stale_data")
    fleet.execute(request, "stale_data")
    fleet.tick("stale_data")
    note_all(fleet, "v3", "v2")
    requests, why = fleet.tick("stale_data")
    assert requests == [] and "home: the source has other rows; the cooldown lasts until" in why


def test_an_old_dataset_is_built_again_and_nothing_else(fleet: Fleet) -> None:
    note_all(fleet, "v1", "v1")
    fleet.load(make_spec("home", freshness={"dataset": "1m"}), SPECS[1])
    import sqlalchemy as sa

    with fleet.ledger.engine.begin() as connection:
        old = "2020-01-01T00:00:00.000000+00:00"
        connection.execute(sa.text(f"UPDATE notes SET at = '{old}' WHERE subject = 'dataset'"))
    ((request,), _) = fleet.tick("stale_data")
    assert request.asset_selection == [dg.AssetKey(["home", "dataset"])] and request.partition_key is None
    assert fleet.execute(request, "stale_data").success
    assert [line["asset"] for line in fleet.ran()] == ["dataset"]


def test_an_endpoint_that_lags_is_released(fleet: Fleet) -> None:
    note_all(fleet, "v1", "v1")
    facts = {"adapter": "n" * 64, "base_revision": REVISION, "dataset": DATASET, "source_version": "v1"}
    fleet.book.note("home", "accepted", facts | {"verdict": "promote"})
    ((request,), _) = fleet.tick("stale_data")
    assert request.asset_selection == [dg.AssetKey(["home", kind]) for kind in ("eval_report", "endpoint")]
    assert fleet.execute(request, "stale_data").success
    assert [line["asset"] for line in fleet.ran()] == ["eval_report", "endpoint"]


def test_sources_are_looked_at_once_in_an_interval(fleet: Fleet) -> None:
    fleet.load(make_spec("home", freshness={"source": "1h"}), SPECS[1])
    ((request,), _) = fleet.tick("stale_data")
    assert request.job_name == "home__observe" and str(request.run_key).startswith("home:observe:")
    assert fleet.tick("stale_data")[0] == [], "also where it fails"
    fleet.cursors.clear()
    ((again,), _) = fleet.tick("stale_data")
    assert again.run_key == request.run_key, "a tick whose cursor was lost: the daemon makes one run of it"
    fleet.book.note("home", "source", {"version": "v1"})
    assert fleet.tick("stale_data")[0] == []


def test_in_a_fleet_too_large_for_a_tick_every_source_gets_its_turn(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors.freshness, "RUNS_PER_TICK", 1)
    fleet.load(*(make_spec(name, freshness={"source": "1m"}) for name in ("home", "other")))
    minute = int(datetime.datetime.now(datetime.UTC).timestamp() // 60)
    fleet.cursors["stale_data"] = json.dumps({"home": minute - 1, "other": minute - 3})
    ((request,), _) = fleet.tick("stale_data")
    assert request.job_name == "other__observe", "it was not asked for the longest, and home is due again"
    tags = {CUSTOMIZATION_TAG: "home"}
    create_run_for_test(
        fleet.instance, job_name="home__observe", status=dg.DagsterRunStatus.STARTED, tags=tags
    )
    fleet.cursors["stale_data"] = json.dumps({"home": minute - 3, "other": minute - 1})
    ((request,), _) = fleet.tick("stale_data")
    assert request.job_name == "other__observe", "home is being looked at"
