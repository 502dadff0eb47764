"""Alerts reach a webhook once, whatever happens to it; unusual feedback is told."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.storage.tags import WILL_RETRY_TAG
from dagster._core.test_utils import create_run_for_test
from maintenance_world import make_spec, release
from traffic_records import record

import sensors.run_failures
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.records import Alert
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings
from ml_assets.traffic.store import TrafficLog
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource
from sensors.feedback_quality import PER_TICK, build_feedback_quality_sensor
from sensors.run_failures import build_run_failures_sensor


class Webhook:
    """A receiver of alerts: `got` what it took, `status` what it answers, `refuses` what it says to some."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.status = 200
        self.refuses: dict[str, int] = {}
        self.drips = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status = outer.refuses.get(body["id"], outer.status)
                if status == 200:
                    outer.got.append(body)
                self.send_response(status)
                if outer.drips:
                    self.send_header("content-length", str(outer.drips))
                self.end_headers()
                with contextlib.suppress(OSError):  # nobody waits for it
                    for _ in range(outer.drips):
                        self.wfile.write(b"x")
                        time.sleep(0.1)

            def log_message(self, *_: Any) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    found = Webhook()
    monkeypatch.setenv("EVERGREEN_ALERT_WEBHOOK", found.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


class Ticks:
    """A sensor evaluated again and again."""

    def __init__(self, sensor: dg.SensorDefinition, instance: dg.DagsterInstance):
        self.instance, self.name, self.cursor = instance, sensor.name, None
        resources = {"ledger": LedgerResource(), "traffic_log": TrafficLogResource()}
        self.defs = dg.Definitions(sensors=[sensor], resources=resources)

    def __call__(self, keep_cursor: bool = True) -> str:
        with dg.build_sensor_context(
            instance_ref=self.instance.get_ref(),
            definitions=self.defs,
            resources=dict(self.defs.resources or {}),
            cursor=self.cursor,
        ) as context:
            data = self.defs.resolve_sensor_def(self.name).evaluate_tick(context)
        assert not data.run_requests
        if keep_cursor:
            self.cursor = data.cursor
        return data.skip_message or ""


@dg.job
def broken_job():
    @dg.op
    def broken() -> None:
        raise dg.Failure("row 3: expected a name", allow_retries=False)

    broken()


def test_a_failed_run_is_told_once(instance: dg.DagsterInstance, webhook: Webhook) -> None:
    tick = Ticks(build_run_failures_sensor(), instance)
    assert tick() == "nothing failed"
    run_id = broken_job.execute_in_process(instance=instance, raise_on_error=False).run_id
    assert tick(keep_cursor=False) == "1 runs failed; 1 alerts sent"
    assert tick() == "nothing failed", "also where the tick's cursor was lost"
    assert tick() == "nothing failed"
    (alert,) = webhook.got
    assert alert["title"] == "broken_job failed" and alert["details"] == "row 3: expected a name"
    assert alert["text"].startswith("[error] broken_job failed\nrow 3") and run_id in alert["url"]


def test_of_many_that_fail_at_once_all_are_told(
    instance: dg.DagsterInstance, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors.run_failures, "RUNS_PER_TICK", 5)
    started = [create_run_for_test(instance, status=dg.DagsterRunStatus.STARTED) for _ in range(12)]
    failed = {run.run_id for run in started}
    for run in started:
        instance.report_run_failed(run)
    tick = Ticks(build_run_failures_sensor(), instance)
    told = [tick() for _ in range(4)]
    assert [line.split(" runs")[0] for line in told] == ["5", "4", "3", "nothing failed"]
    assert {alert["id"] for alert in webhook.got} == {f"run:{run_id}" for run_id in failed}
    assert len(webhook.got) == len(failed)


def test_a_run_that_is_repeated_is_not_told(instance: dg.DagsterInstance, webhook: Webhook) -> None:
    create_run_for_test(instance, status=dg.DagsterRunStatus.FAILURE, tags={WILL_RETRY_TAG: "true"})
    assert Ticks(build_run_failures_sensor(), instance)() == "nothing failed"
    create_run_for_test(instance, status=dg.DagsterRunStatus.FAILURE, tags={WILL_RETRY_TAG: "false"})
    assert Ticks(build_run_failures_sensor(), instance)().startswith("1 runs failed")


def test_what_the_webhook_does_not_take_waits(instance: dg.DagsterInstance, webhook: Webhook) -> None:
    book = DecisionBook(Ledger(Settings.from_env().ledger_url))
    book.alert(Alert("a", "first", "text"), Alert("b", "second", "text"))
    tick = Ticks(build_run_failures_sensor(), instance)
    webhook.status = 500
    why = tick()
    assert "did not take the next one (HTTPStatusError 500)" in why and "secret" not in why
    webhook.status = 200
    assert tick() == "2 alerts sent"
    assert [alert["title"] for alert in webhook.got] == ["first", "second"]
    webhook.server.shutdown()
    webhook.server.server_close()
    book.alert(Alert("c", "third", "text"))
    assert "(ConnectError), it waits" in tick()
    assert [alert.id for alert in book.undelivered()] == ["c"]


def test_a_webhook_whose_answer_takes_long_is_not_waited_for(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    book = DecisionBook(Ledger(Settings.from_env().ledger_url))
    book.alert(Alert("a", "first", "text"))
    webhook.drips = 100
    began = time.monotonic()
    assert Ticks(build_run_failures_sensor(), instance)() == "1 alerts sent"
    assert time.monotonic() - began < 8


def test_a_tick_ends_while_alerts_wait(
    instance: dg.DagsterInstance, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = DecisionBook(Ledger(Settings.from_env().ledger_url))
    book.alert(Alert("a", "first", "text"), Alert("b", "second", "text"))
    tick = Ticks(build_run_failures_sensor(), instance)
    with monkeypatch.context() as patch:
        patch.setattr(sensors.run_failures, "PATIENCE", 0.0)
        assert "the webhook is slow, the others wait" in tick()
    tick()
    assert [alert["id"] for alert in webhook.got] == ["a", "b"]


@pytest.mark.parametrize("url", ["https://hooks.example.com:port/secret", "hooks.example.com/secret"])
def test_a_webhook_that_is_no_address_is_told_in_the_tick(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("EVERGREEN_ALERT_WEBHOOK", url)
    book = DecisionBook(Ledger(Settings.from_env().ledger_url))
    book.alert(Alert("a", "first", "text"))
    why = Ticks(build_run_failures_sensor(), instance)()
    assert "the webhook did not take the next one" in why and "secret" not in why
    assert len(book.undelivered()) == 1


def test_a_webhook_from_a_file_with_a_newline(
    instance: dg.DagsterInstance, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERGREEN_ALERT_WEBHOOK", f"{webhook.url}\n")
    DecisionBook(Ledger(Settings.from_env().ledger_url)).alert(Alert("a", "first", "text"))
    assert Ticks(build_run_failures_sensor(), instance)() == "1 alerts sent"


@pytest.mark.parametrize(("status", "taken"), [(400, ["b"]), (413, ["b"]), (401, []), (503, [])])
def test_an_alert_that_the_webhook_refuses_holds_up_no_other(
    instance: dg.DagsterInstance, webhook: Webhook, status: int, taken: list[str]
) -> None:
    book = DecisionBook(Ledger(Settings.from_env().ledger_url))
    book.alert(Alert("a", "first", "text"), Alert("b", "second", "text"))
    webhook.refuses["a"] = status
    tick = Ticks(build_run_failures_sensor(), instance)
    told = tick()
    assert ("1 alerts refused by the webhook; 1 alerts sent" in told) == bool(taken)
    assert [alert["id"] for alert in webhook.got] == taken
    webhook.refuses.clear()
    tick()
    assert [alert["id"] for alert in webhook.got] == (taken or ["a", "b"])


def test_without_a_webhook_alerts_are_logged(instance: dg.DagsterInstance) -> None:
    book = DecisionBook(Ledger(Settings.from_env().ledger_url))
    book.alert(Alert("a", "first", "text"))
    tick = Ticks(build_run_failures_sensor(), instance)
    assert "1 alerts logged" in tick() and book.undelivered() == []


def say(traffic: TrafficLog, first: int, count: int, key: str | None, name: str = "home") -> None:
    """Requests with these numbers, each judged by the key that asked; without one, five keys take turns."""
    for number in range(first, first + count):
        asked = record(name, key_id=key or f"key{number % 5}", asked=f"question {number}", answer="yes")
        traffic.append([asked])
        traffic.give_feedback(asked.id, asked.key_id, None, "yes")


def test_unusual_feedback_is_told_and_recorded_once(
    instance: dg.DagsterInstance, evergreen_home: Path
) -> None:
    ledger = Ledger(Settings.from_env().ledger_url)
    release(ledger)
    traffic, book = TrafficLog(Settings.from_env().traffic_url), DecisionBook(ledger)
    tick = Ticks(build_feedback_quality_sensor([make_spec()], window=50), instance)
    assert tick() == "no new feedback"

    say(traffic, 0, 100, None)
    assert "nothing unusual" in tick()
    say(traffic, 100, 20, None)
    assert tick() == "too little new feedback to judge: home (20 of 50)"
    say(traffic, 120, 50, "key9")
    first = tick(keep_cursor=False)
    assert "key key9 gave" in first
    assert tick() == first, "the tick whose cursor was lost is repeated"
    (history,) = book.latest("home", 5)
    assert (history.decision.action, history.decision.status) == ("watch", "no_action")
    assert history.decision.seen["keys"] == ["key9"]
    (alert,) = book.undelivered()
    assert "unusual feedback" in alert.title
    assert tick() == "no new feedback"


def test_a_flood_is_compared_with_what_was_before_it(
    instance: dg.DagsterInstance, evergreen_home: Path
) -> None:
    release(Ledger(Settings.from_env().ledger_url))
    traffic = TrafficLog(Settings.from_env().traffic_url)
    tick = Ticks(build_feedback_quality_sensor([make_spec()], window=50), instance)
    say(traffic, 0, 100, None)
    assert "nothing unusual" in tick()
    say(traffic, 100, 300, "key9")  # many windows between two ticks
    assert "key key9 gave 100% of the newest feedback, 0% before" in tick()


def test_those_with_little_new_feedback_keep_nobody_waiting(
    instance: dg.DagsterInstance, evergreen_home: Path
) -> None:
    traffic, few = TrafficLog(Settings.from_env().traffic_url), [f"few{i}" for i in range(PER_TICK + 1)]
    tick = Ticks(build_feedback_quality_sensor([make_spec(name=n) for n in [*few, "home"]], 50), instance)
    for name in few:
        say(traffic, 0, 1, None, name)
    say(traffic, 0, 100, None)
    assert tick() == (
        "home: 100 pieces of feedback, nothing unusual; too little new feedback to judge: few0 (1 of 50), "
        f"few1 (1 of 50), few10 (1 of 50), few11 (1 of 50), few12 (1 of 50) and {len(few) - 5} more"
    )
