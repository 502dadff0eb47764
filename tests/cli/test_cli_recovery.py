"""Runs whose process is gone: what a start of the deployment does about them."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.launcher.base import WorkerStatus
from dagster._core.storage.tags import (
    AUTO_RETRY_RUN_ID_TAG,
    BACKFILL_ID_TAG,
    PARENT_RUN_ID_TAG,
    ROOT_RUN_ID_TAG,
    WILL_RETRY_TAG,
)
from dagster._core.test_utils import create_run_for_test
from dagster._daemon.auto_run_reexecution.auto_run_reexecution import should_retry

from ml_assets.cli.launcher import BOOT_ID, PROCESS_STARTED, identity
from ml_assets.cli.recovery import CURSORS, recover, requeue_lost
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared_instance(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dagster")
    shutil.copy(ROOT / "dagster.yaml", directory)
    with DagsterInstance.from_config(str(directory)) as instance:
        yield instance


@pytest.fixture
def instance(shared_instance, tmp_path, monkeypatch):
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path))
    for run in shared_instance.get_runs():
        shared_instance.delete_run(run.run_id)
    return shared_instance


@pytest.fixture
def worker():
    process = subprocess.Popen(["sleep", "60"])
    yield identity(process.pid)
    process.kill()
    process.wait()


def dead() -> dict[str, str]:
    process = subprocess.Popen(["sleep", "60"])
    tags = identity(process.pid)
    process.kill()
    process.wait()
    return tags


def fenced(run_id: str) -> bool:
    return Ledger(Settings.from_env().ledger_url).is_fenced(run_id)


def test_a_run_whose_process_is_gone_fails_is_fenced_and_will_be_retried(instance):
    run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=dead())
    assert [found.run_id for found in recover(instance)] == [run.run_id]
    failed = instance.get_run_by_id(run.run_id)
    assert failed.status == DagsterRunStatus.FAILURE
    assert failed.tags[WILL_RETRY_TAG] == "true"
    assert fenced(run.run_id)


def test_doing_it_again_finds_nothing(instance):
    create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=dead())
    assert len(recover(instance)) == 1
    assert recover(instance) == []


def test_a_live_worker_is_left_alone(instance, worker):
    run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=worker)
    assert recover(instance) == []
    assert instance.get_run_by_id(run.run_id).status == DagsterRunStatus.STARTED
    assert not fenced(run.run_id)


@pytest.mark.parametrize("changed", [BOOT_ID, PROCESS_STARTED])
def test_a_process_with_the_pid_of_the_worker_is_not_the_worker(instance, worker, changed):
    run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=worker | {changed: "other"})
    assert [found.run_id for found in recover(instance)] == [run.run_id]


def test_a_run_that_died_before_it_had_a_process_is_retried(instance):
    run = create_run_for_test(instance, status=DagsterRunStatus.STARTING)
    assert [found.run_id for found in recover(instance)] == [run.run_id]
    assert instance.get_run_by_id(run.run_id).tags[WILL_RETRY_TAG] == "true"


def test_a_run_that_was_being_canceled_is_canceled_and_not_retried(instance):
    run = create_run_for_test(instance, status=DagsterRunStatus.CANCELING, tags=dead())
    assert len(recover(instance)) == 1
    canceled = instance.get_run_by_id(run.run_id)
    assert canceled.status == DagsterRunStatus.CANCELED
    assert WILL_RETRY_TAG not in canceled.tags
    assert fenced(run.run_id)


def test_waiting_and_finished_runs_and_those_executed_by_hand_are_left_alone(instance):
    for status in (DagsterRunStatus.NOT_STARTED, DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE):
        create_run_for_test(instance, status=status, tags=dead())
    create_run_for_test(instance, status=DagsterRunStatus.STARTED)
    assert recover(instance) == []


def test_the_daemon_is_told_to_look_at_failures_from_before_its_first_start(instance):
    recover(instance)
    assert set(instance.daemon_cursor_storage.get_cursor_values(set(CURSORS)).values()) == {"0"}
    instance.daemon_cursor_storage.set_cursor_values({CURSORS[0]: "7"})
    recover(instance)
    assert instance.daemon_cursor_storage.get_cursor_values({CURSORS[0]})[CURSORS[0]] == "7"


def test_a_run_that_crashed_too_often_is_not_retried_for_ever(instance):
    run = create_run_for_test(
        instance, status=DagsterRunStatus.STARTED, tags=dead() | {"dagster/max_retries": "0"}
    )
    recover(instance)
    failed = instance.get_run_by_id(run.run_id)
    assert failed.status == DagsterRunStatus.FAILURE
    assert failed.tags[WILL_RETRY_TAG] == "false"


def seen_by_the_daemon(instance) -> None:
    latest = instance.event_log_storage.get_maximum_record_id() or 0
    instance.daemon_cursor_storage.set_cursor_values(dict.fromkeys(CURSORS, str(latest)))


def crashed(instance, **tags: str):
    run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=dead() | tags)
    recover(instance)
    return run


def child_of(run, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    ids = {PARENT_RUN_ID_TAG: run.run_id, ROOT_RUN_ID_TAG: run.run_id}
    return {"parent_run_id": run.run_id, "root_run_id": run.run_id, "tags": ids | dict(tags or {})}


def judged_lost(instance, run_id: str) -> bool:
    """Whether it would be requeued: nobody answers at this address, so it stays one to look at."""
    known: set[str] = set()
    assert requeue_lost(instance, "http://127.0.0.1:9", known) == []
    return run_id not in known


def test_a_wanted_retry_is_lost_once_the_daemon_has_passed_over_the_failure(instance):
    run = crashed(instance)
    seen_by_the_daemon(instance)
    assert judged_lost(instance, run.run_id)


def test_a_failure_that_the_daemon_will_look_at_is_left_to_it(instance, monkeypatch):
    seen_by_the_daemon(instance)
    crashed(instance)
    asked: list[str] = []
    monkeypatch.setattr("ml_assets.cli.recovery._reexecute", lambda url, run_id: asked.append(run_id))
    assert requeue_lost(instance, "http://127.0.0.1:9", set()) == []
    assert asked == []


def test_a_retry_that_exists_or_was_deleted_is_not_repeated(instance):
    run, other = crashed(instance), crashed(instance)
    create_run_for_test(instance, **child_of(run))
    instance.add_run_tags(other.run_id, {AUTO_RETRY_RUN_ID_TAG: "deleted"})
    seen_by_the_daemon(instance)
    assert not judged_lost(instance, run.run_id)
    assert not judged_lost(instance, other.run_id)


def test_runs_of_a_backfill_that_has_ended_are_not_requeued(instance):
    run = crashed(instance, **{BACKFILL_ID_TAG: "deleted"})
    seen_by_the_daemon(instance)
    assert not judged_lost(instance, run.run_id)


def test_a_retry_of_a_run_whose_first_attempt_was_deleted_is_not_requeued(instance):
    root = create_run_for_test(instance, status=DagsterRunStatus.FAILURE)
    run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, **child_of(root, dead()))
    recover(instance)
    seen_by_the_daemon(instance)
    instance.delete_run(root.run_id)
    assert not judged_lost(instance, run.run_id)


def test_run_monitoring_sees_the_same(instance, worker):
    launcher = instance.run_launcher
    alive = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=worker)
    gone = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=dead())
    by_hand = create_run_for_test(instance, status=DagsterRunStatus.STARTED)
    assert launcher.check_run_worker_health(alive).status == WorkerStatus.RUNNING
    assert launcher.check_run_worker_health(by_hand).status == WorkerStatus.RUNNING
    assert launcher.check_run_worker_health(gone).status == WorkerStatus.FAILED
    assert fenced(gone.run_id)
    assert not fenced(alive.run_id)


def test_a_look_between_the_event_of_a_failure_and_its_status_retries_the_run(instance):
    """The daemon reads the event that a run failed, and finds it still started: it never looks again."""
    run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=dead())
    assert not should_retry(run, instance)
    instance.run_launcher.check_run_worker_health(run)
    between = instance.get_run_by_id(run.run_id)
    assert between.status == DagsterRunStatus.STARTED
    assert should_retry(between, instance)


def test_a_look_in_between_does_not_retry_what_crashed_too_often(instance):
    root = create_run_for_test(instance, status=DagsterRunStatus.FAILURE)
    for _ in range(instance.run_retries_max_retries):
        last = create_run_for_test(instance, status=DagsterRunStatus.STARTED, **child_of(root, dead()))
    instance.run_launcher.check_run_worker_health(last)
    assert not should_retry(instance.get_run_by_id(last.run_id), instance)


def test_a_run_that_ended_while_it_was_looked_at_has_not_failed(instance):
    run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=dead())
    instance.report_run_canceled(run)
    assert instance.run_launcher.check_run_worker_health(run).status == WorkerStatus.SUCCESS
    assert not fenced(run.run_id)
