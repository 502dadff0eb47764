"""After a crash of the machine or of everything at once: fail the runs whose process is gone.

Dagster's own run retries then requeue them (same assets, partition, tags and backfill, at most `max_retries`
times), because a run that failed without a failed step counts as crashed. They try once, and give up when the
code server is not there at that moment; `requeue_lost` makes up for it.
"""

from datetime import UTC, datetime, timedelta

import httpx
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from dagster._core.storage.tags import WILL_RETRY_TAG

from ml_assets.cli.launcher import BOOT_ID, PID, describe, fence, is_alive

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
        if run.status == DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, message=reason)
        else:
            instance.report_run_failed(run, message=f"{reason} It is requeued, unless it crashed too often.")
    return gone


def requeue_lost(instance: DagsterInstance, url: str, known: set[str]) -> list[str]:
    """Requeue the runs of the last day whose retry the daemon wanted and could not submit; returns the ids of
    those runs. One that can't be requeued now either is tried again at the next call. `known` is the
    caller's memory of runs that need no second look.
    """
    since = datetime.now(UTC) - timedelta(days=1)
    failed = RunsFilter(
        statuses=[DagsterRunStatus.FAILURE], tags={WILL_RETRY_TAG: "false"}, updated_after=since
    )
    requeued = []
    for run in instance.get_runs(failed):
        if run.run_id in known:
            continue
        events = instance.all_logs(run.run_id, of_type=DagsterEventType.ENGINE_EVENT)
        _, group = instance.get_run_group(run.run_id) or ("", [])
        has_retry = any(other.parent_run_id == run.run_id for other in group)
        if has_retry or not any(event.message == GAVE_UP for event in events):
            known.add(run.run_id)
        elif _reexecute(url, run):
            known.add(run.run_id)
            requeued.append(run.run_id)
    return requeued


def _reexecute(url: str, run: DagsterRun) -> bool:
    parameters = {"parentRunId": run.run_id, "strategy": "ALL_STEPS", "useParentRunTags": True}
    body = {"query": REEXECUTE, "variables": {"parameters": parameters}}
    try:
        answer = httpx.post(f"{url}/graphql", json=body, timeout=60, trust_env=False).json()
        return bool(answer["data"]["launchRunReexecution"].get("run"))
    except (httpx.HTTPError, ValueError, TypeError, KeyError):
        return False
