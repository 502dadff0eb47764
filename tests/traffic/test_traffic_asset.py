"""`<name>/traffic` as Dagster shows it."""

import warnings
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
import sqlalchemy as sa
from traffic_records import record, spec

from ml_assets.traffic.asset import build_traffic_asset
from ml_assets.traffic.store import TrafficLog
from ml_assets.traffic.summary import malformed, summarize
from resources.traffic_log import TrafficLogResource

KEY = dg.AssetKey(["home", "traffic"])


def observe(instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    definitions = dg.Definitions(
        assets=[build_traffic_asset(spec(owners=["team:voice"]))],
        resources={"traffic_log": TrafficLogResource()},
    )
    job = definitions.resolve_implicit_global_asset_job_def()
    return job.execute_in_process(instance=instance, raise_on_error=False)


def test_an_observation_says_what_is_new() -> None:
    with dg.instance_for_test() as instance:
        assert observe(instance).success
        observation = newest(instance)
        assert observation.tags["dagster/data_version"] == "0"
        assert observation.metadata["requests"].value == 0

        log = TrafficLog(TrafficLogResource().url)
        start = datetime.now(UTC) - timedelta(days=2)

        def at(hours: int) -> str:
            return (start + timedelta(hours=hours)).isoformat(timespec="microseconds")

        asked = [record(at=at(n), latency_ms=float(n + 1), answer="on") for n in range(48)]
        asked += [record(at=at(48), status=504), record(at=at(48), answer=" ")]
        log.append(asked, {"home": 3})
        log.give_feedback(asked[0].id, asked[0].key_id, 1, None)
        log.give_feedback(asked[49].id, asked[49].key_id, -1, "off")
        assert observe(instance).success
        observation = newest(instance)
        shown = {name: value.value for name, value in observation.metadata.items()}
        assert observation.tags["dagster/data_version"] == str(log.heads()["home"].last_seq)
        assert (shown["requests"], shown["requests_not_stored"], shown["labelled"]) == (50, 3, 1)
        assert shown["requests_per_day"] == pytest.approx(25, rel=0.01)
        assert shown["failed_share"] == pytest.approx(0.02)
        assert shown["malformed_share"] == pytest.approx(1 / 49)
        assert (shown["rated"], shown["rated_up_share"], shown["right_answers"]) == (2, 0.5, 1)
        assert 20 < shown["latency_p50_ms"] < 28 < shown["latency_p99_ms"] <= 48
        assert shown["over_time"].startswith("![requests over time](data:image/png;base64,")
        assert len(shown["over_time"]) < 60_000
        first = observation.metadata["sample"].records[0].data
        assert (first["status"], first["rating"], first["right_answer"]) == ("200 malformed", "down", "off")
        log.close()


def newest(instance: dg.DagsterInstance) -> dg.AssetObservation:
    found = instance.fetch_observations(KEY, limit=1).records[0].asset_observation
    assert found is not None
    return found


def test_a_database_that_cannot_be_read_is_one_clear_failure() -> None:
    log = TrafficLog(TrafficLogResource().url)
    with log.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with dg.instance_for_test() as instance:
        result = observe(instance)
        assert not result.success
        (event,) = [event for event in result.all_events if event.is_step_failure]
        assert "revision 9999" in str(event.step_failure_data.user_failure_data)


def test_it_is_described() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", dg.BetaWarning)
        asset = build_traffic_asset(spec(owners=["team:voice"], traffic={"retention": "30d"}))
    assert asset.is_observable
    found = asset.specs_by_key[KEY]
    assert [dep.asset_key for dep in found.deps] == [dg.AssetKey(["home", "endpoint"])]
    assert (found.group_name, found.owners, found.tags["customization"]) == ("home", ["team:voice"], "home")
    assert found.kinds and "30d" in (found.description or "")


def test_malformed() -> None:
    commands = spec(prompt={"user": "{u}", "target": "{call}"}, evaluation={"task": "json"})
    assert malformed(commands, "turn it on") and malformed(commands, "") and not malformed(commands, "{}")
    forms = spec(prompt={"user": "{u}", "target": "<{label}>"})
    assert malformed(forms, "on") and not malformed(forms, "<on>")


def test_one_request_is_a_summary_too() -> None:
    summary = summarize(spec(), [record(status=499, mean_logprob=None)], {})
    assert summary.requests == 1 and summary.numbers["latency_p50_ms"] is None
    assert summary.numbers["cancelled_share"] == 1
