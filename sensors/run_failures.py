"""Tells people what failed and what was blocked: a log line, and a JSON message to a webhook."""

import datetime
import time
from collections import Counter
from typing import Any

import dagster as dg
import httpx
from dagster._core.storage.tags import WILL_RETRY_TAG

from ml_assets.cli.runs import failure_of
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.records import Alert
from ml_assets.decisions.tags import CUSTOMIZATION_TAG
from ml_assets.settings import Settings
from resources.ledger import LedgerResource
from sensors.dispatch import tick_result

RUNS_PER_TICK = 50
OVERLAP = datetime.timedelta(minutes=2)
"""Looked at again each time: runs that were being written at the last tick. An alert is raised once."""
TICK = datetime.timedelta(microseconds=1)
"""Of the clock of updates: runs after one that ended at the same moment are looked at, too."""
FIRST_LOOK = datetime.timedelta(days=1)
SECONDS = 5.0
PATIENCE = 20.0
"""Seconds after which a tick begins no other message; Dagster gives up on a tick after 60."""
REFUSED = frozenset({400, 413, 422})
"""What a webhook answers to a message that it does not take at any time: later ones must not wait for it."""


def build_run_failures_sensor(seconds: float = SECONDS) -> dg.SensorDefinition:
    """The sensor over all runs and alerts. Alerts wait in the book until the webhook took them."""

    @dg.sensor(
        name="run_failures",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Sends alerts to `EVERGREEN_ALERT_WEBHOOK` (and writes them to the log of its ticks): "
        "runs that failed for good, decisions that a budget blocked or that were given up, wanted labels, "
        "unusual feedback, a gateway that is away. What the webhook did not take is sent again at the next "
        "tick.",
    )
    def run_failures(context: dg.SensorEvaluationContext, ledger: LedgerResource) -> dg.SensorResult:
        settings = Settings.from_env()
        now = datetime.datetime.now(datetime.UTC)
        since = datetime.datetime.fromisoformat(context.cursor) if context.cursor else now - FIRST_LOOK
        failed = context.instance.get_run_records(
            dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=since - OVERLAP),
            limit=RUNS_PER_TICK,
            order_by="update_timestamp",
            ascending=True,
        )
        with ledger.opened() as opened:
            book = DecisionBook(opened)
            final = [r.dagster_run for r in failed if r.dagster_run.tags.get(WILL_RETRY_TAG) != "true"]
            fresh = book.unknown_alerts([f"run:{run.run_id}" for run in final])
            new = [run for run in final if f"run:{run.run_id}" in fresh]
            book.alert(*(_alert(context.instance, run, settings) for run in new))
            lines = [f"{len(new)} runs failed"] if new else []
            # what comes from a secret's file ends in a newline
            lines += _deliver(context, book, (settings.alert_webhook or "").strip(), seconds)
        # a full page goes on where it ended: with the overlap, the same page might come again and again
        full = len(failed) == RUNS_PER_TICK
        last = failed[-1].update_timestamp + OVERLAP - TICK if full else now
        return tick_result(context, [], lines or ["nothing failed"], max(last, since).isoformat())

    return run_failures


def message(alert: Alert) -> dict[str, Any]:
    """The JSON of an alert. `text` is what chat programs show; a receiver that must not act twice remembers
    `id`."""
    link = f"\n{alert.url}" if alert.url else ""
    return {
        "text": f"[{alert.severity}] {alert.title}\n{alert.text}{link}",
        "id": alert.id,
        "title": alert.title,
        "details": alert.text,
        "severity": alert.severity,
        "customization": alert.customization,
        "url": alert.url,
        "at": alert.at,
    }


def _deliver(
    context: dg.SensorEvaluationContext, book: DecisionBook, webhook: str, seconds: float
) -> list[str]:
    told: Counter[bool] = Counter()
    late, waits = time.monotonic() + PATIENCE, list[str]()
    # a proxy of the environment may be what reaches the webhook, so it is used
    with httpx.Client(timeout=seconds) as client:
        for alert in book.undelivered():
            if time.monotonic() > late:
                waits = ["the webhook is slow, the others wait"]
                break
            context.log.warning(f"{alert.title}: {alert.text}")
            taken = True
            if webhook:
                try:
                    # the answer's body says nothing, and may take for ever: `seconds` are for each part of it
                    with client.stream("POST", webhook, json=message(alert)) as response:
                        taken = response.status_code not in REFUSED
                        if taken:
                            response.raise_for_status()
                        else:
                            context.log.error(f"the webhook refuses this alert ({response.status_code})")
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    # the address may hold a secret, and so may the error that names it
                    status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else ""
                    reason = f"{type(error).__name__} {status}".strip()
                    refused = f"the webhook did not take the next one ({reason}), it waits"
                    return [f"{told[True]} alerts sent; {refused}"]
            book.delivered(alert.id)
            told[taken] += 1
    lines = [f"{told[False]} alerts refused by the webhook"] if told[False] else []
    if told[True]:
        where = "sent" if webhook else "logged (EVERGREEN_ALERT_WEBHOOK is not set)"
        lines.append(f"{told[True]} alerts {where}")
    return lines + waits


def _alert(instance: dg.DagsterInstance, run: dg.DagsterRun, settings: Settings) -> Alert:
    kinds = {dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.RUN_FAILURE}
    reasons = [failure_of(entry) for entry in instance.all_logs(run.run_id, of_type=kinds)]
    reason = next((reason for reason in reasons if reason), "no reason was stored")
    return Alert(
        id=f"run:{run.run_id}",
        title=f"{run.job_name} failed",
        text=reason[:2000],
        severity="error",
        customization=run.tags.get(CUSTOMIZATION_TAG),
        url=f"{settings.dagster_url}/runs/{run.run_id}",
    )
