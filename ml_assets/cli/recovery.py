"""After a crash of the machine or of everything at once: fail the runs whose process is gone.

Dagster's own run retries then requeue them (same assets, partition, tags and backfill, at most `max_retries`
times), because a run that failed without a failed step counts as crashed. They look at a failure once, and
can lose the retry; `requeue_lost` makes up for it.
"""

from datetime import UTC, datetime, timedelta

import httpx
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from dagster._core.errors import DagsterRunNotFoundError
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES
from dagster._core.storage.tags import AUTO_RETRY_RUN_ID_TAG, BACKFILL_ID_TAG, WILL_RETRY_TAG

from ml_assets.cli.launcher import BOOT_ID, PID, describe, fence, is_alive, record_lost_costs

IN_PROGRESS = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]
# The daemon ignores failures from before its first look; until then these say 'from the beginning'.
CURSORS = [
    f"EVENT_LOG_CONSUMER_CURSOR-{event.value}"
    for event in (DagsterEventType.RUN_FAILURE, DagsterEventType.RUN_SUCCESS)
]
GAVE_UP = "Failed to retry run"  # the daemon's event for a retry that it could not submit
REEXECUTE = """
mutation ($parameters: ReexecutionParams!) {
  launchRunReexecution(reexecutionParams: $parameters) { ... on LaunchRunSuccess { run { runId } } }
}
"""


def worker_is_gone(run: DagsterRun) -> bool:
    """Whether a run in progress has no process any more.

    The launcher stores who the process is before the process does anything, so a STARTING run without that
    has none. A STARTED one without it is executed by hand (`dg launch`), and not ours to judge.
    """
    if PID in run.tags and BOOT_ID in run.tags:
        return not is_alive(run.tags)
    return run.status == DagsterRunStatus.STARTING


def recover(instance: DagsterInstance) -> list[DagsterRun]:
    """Fence and fail every run whose process is gone; a canceling one is canceled. Returns them.

    Call it while no daemon runs (which is launching runs). Doing it again finds nothing.
    """
    storage = instance.daemon_cursor_storage
    known = storage.get_cursor_values(set(CURSORS))
    if unset := [cursor for cursor in CURSORS if known.get(cursor) is None]:
        storage.set_cursor_values(dict.fromkeys(unset, "0"))

    gone = [run for run in instance.get_runs(RunsFilter(statuses=IN_PROGRESS)) if worker_is_gone(run)]
    for run in gone:
        reason = describe(run)
        fence(run.run_id, reason)
        record_lost_costs(instance, run)
        if run.status == DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, message=reason)
        else:
            instance.report_run_failed(run, message=f"{reason} It is requeued, unless it crashed too often.")
    return gone


def requeue_lost(instance: DagsterInstance, url: str, known: set[str]) -> list[str]:
    """Requeue the runs of the last day whose retry Dagster wanted and lost; returns the ids of those runs.

    The daemon loses a retry in two ways: it can't submit it and gives up, or it looks at the failure between
    the moments when the event and the new status of the run are stored, and takes the run for one that has
    not failed (one whose process died says before that whether it is retried; one that never started does
    not). A run that can't be requeued now is tried again at the next call. `known` is the caller's
    memory of runs that need no second look.
    """
    since = datetime.now(UTC) - timedelta(days=1)
    candidates: dict[str, bool] = {}
    for wanted in (True, False):
        tags = {WILL_RETRY_TAG: str(wanted).lower()}
        failed = RunsFilter(statuses=[DagsterRunStatus.FAILURE], tags=tags, updated_after=since)
        candidates |= {run.run_id: wanted for run in instance.get_runs(failed) if run.run_id not in known}
    if not candidates:
        return []
    # In this order: whatever the daemon launched for a run that it no longer has to look at exists by now.
    unseen = _failures_that_the_daemon_has_not_seen(instance)
    requeued = []
    for run_id in candidates.keys() - unseen:
        if not _lost_its_retry(instance, run_id, candidates[run_id]):
            known.add(run_id)
        elif _reexecute(url, run_id):
            known.add(run_id)
            requeued.append(run_id)
    return requeued


def _failures_that_the_daemon_has_not_seen(instance: DagsterInstance) -> set[str]:
    """Ids of the runs whose failure comes after the daemon's cursor; it will look at them itself."""
    key = f"EVENT_LOG_CONSUMER_CURSOR-{DagsterEventType.RUN_FAILURE.value}"
    cursor = int(instance.daemon_cursor_storage.get_cursor_values({key}).get(key) or 0)
    events = instance.event_log_storage.get_logs_for_all_runs_by_log_id(
        after_cursor=cursor, dagster_event_type=DagsterEventType.RUN_FAILURE
    )
    return {event.run_id for event in events.values()}


def _lost_its_retry(instance: DagsterInstance, run_id: str, wanted: bool) -> bool:
    """Whether a failed run that the daemon has looked at has no retry, and should have one."""
    try:
        _, group = instance.get_run_group(run_id) or ("", [])
    except DagsterRunNotFoundError:  # the first run of its group was deleted
        return False
    run = next((run for run in group if run.run_id == run_id), None)
    if run is None or AUTO_RETRY_RUN_ID_TAG in run.tags or any(r.parent_run_id == run_id for r in group):
        return False
    if (backfill_id := run.tags.get(BACKFILL_ID_TAG)) is not None:
        backfill = instance.get_backfill(backfill_id)
        if backfill is None or backfill.status in BULK_ACTION_TERMINAL_STATUSES:
            return False
    if wanted:
        return True
    events = instance.all_logs(run_id, of_type=DagsterEventType.ENGINE_EVENT)
    return any(event.message == GAVE_UP for event in events)


def _reexecute(url: str, run_id: str) -> bool:
    parameters = {"parentRunId": run_id, "strategy": "ALL_STEPS", "useParentRunTags": True}
    body = {"query": REEXECUTE, "variables": {"parameters": parameters}}
    try:
        answer = httpx.post(f"{url}/graphql", json=body, timeout=60, trust_env=False).json()
        return bool(answer["data"]["launchRunReexecution"].get("run"))
    except (httpx.HTTPError, ValueError, TypeError, KeyError):
        return False
