"""After a crash of the machine or of everything at once: fail the runs whose process is gone.

Dagster's own run retries then requeue them (same assets, partition, tags and backfill, at most `max_retries`
times), because a run that failed without a failed step counts as crashed.
"""

from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from ml_assets.cli.launcher import BOOT_ID, PID, describe, fence, is_alive

IN_PROGRESS = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]
# The daemon ignores failures from before its first look; until then these say 'from the beginning'.
CURSORS = [
    f"EVENT_LOG_CONSUMER_CURSOR-{event.value}"
    for event in (DagsterEventType.RUN_FAILURE, DagsterEventType.RUN_SUCCESS)
]


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
