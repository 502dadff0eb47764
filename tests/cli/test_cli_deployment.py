"""A whole deployment with real processes: up, a crash of everything during a run, down.

The code location is a small one of the tests (`small_location.py`), so that a run takes as long as the test
wants.
"""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from dagster import AssetKey, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from dagster._core.storage.tags import WILL_RETRY_TAG

from ml_assets.cli import supervisor
from ml_assets.cli.launcher import PID, is_alive
from ml_assets.cli.main import main
from ml_assets.cli.runs import ASSET_JOB, Dagster
from ml_assets.cli.supervisor import OperationError
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings

pytestmark = pytest.mark.slow

PARTITION = "tiny@0123456789ab"
SLOW, AFTER, BROKEN = AssetKey("slow"), AssetKey("after"), AssetKey("broken")
TERMINATE = "mutation ($id: String!) { terminateRun(runId: $id) { __typename } }"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return result


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A deployment that is up; whatever happens, nothing of it is left at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERGREEN_HOME", str(tmp_path_factory.mktemp("deployment") / "home with a space"))
        for variable in supervisor.PORTS.values():
            patch.setenv(variable, str(free_port()))
        patch.setenv(supervisor.MODULE_VARIABLE, "small_location")
        folders = [str(Path(__file__).parent), str(supervisor.ROOT), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        settings = Settings.from_env()
        try:
            assert supervisor.start(settings)
            yield settings
        finally:
            supervisor.stop(settings)


@pytest.fixture(autouse=True)
def home(settings, evergreen_home, monkeypatch):
    monkeypatch.setenv("EVERGREEN_HOME", str(settings.home))


@pytest.fixture
def dagster(settings):
    with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
        instance.add_dynamic_partitions("base_models", [PARTITION])
        yield Dagster(settings.dagster_url, instance)


def launch_slow(dagster: Dagster, settings: Settings) -> DagsterRun:
    """A run of two assets for a partition, in the middle of the first asset."""
    (settings.home / "finish").unlink(missing_ok=True)
    run_id = dagster.launch(ASSET_JOB, assets=[SLOW, AFTER], partition=PARTITION)
    wait_for((settings.home / f"{run_id}.log").exists)
    run = dagster.instance.get_run_by_id(run_id)
    assert run and run.status == DagsterRunStatus.STARTED
    return run


def retries(dagster: Dagster, run_id: str) -> list[DagsterRun]:
    return [run for run in dagster.instance.get_runs() if run.parent_run_id == run_id]


def processes_of(settings: Settings) -> list[psutil.Process]:
    """Every process of the deployment: they all have its data directory in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            own = process.environ().get("DAGSTER_HOME") == str(settings.dagster_home)
            if own and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_a_second_up_says_that_it_runs(settings, capsys):
    assert main(["up"]) == 0
    printed = capsys.readouterr().out
    assert "Already running" in printed
    assert settings.mlflow_url in printed
    assert main(["status"]) == 0
    assert capsys.readouterr().out.count("answers") == 4


def test_one_log_names_the_program_of_each_line(settings):
    text = supervisor.log_path(settings).read_text()
    for name in ("supervisor", "dagster-webserver", "mlflow", "gateway"):
        assert f" {name:17} | " in text, name
    assert "\x1b[" not in text


def test_a_failed_run_is_told_with_its_reason(dagster):
    seen: list[str] = []
    run_id = dagster.launch(ASSET_JOB, assets=[BROKEN])
    with pytest.raises(OperationError, match="row 3: expected a name"):
        dagster.follow(run_id, seen.append)
    assert seen == ["broken: started", "broken: FAILED"]
    assert not retries(dagster, run_id), "an asset that failed is not retried by the run queue"


@pytest.mark.parametrize("given_up", [True, False])
def test_a_retry_that_the_daemon_lost_is_made_up_for(dagster, given_up):
    run_id = dagster.launch(ASSET_JOB, assets=[BROKEN])
    run = wait_for(
        lambda: dagster.instance.get_runs(RunsFilter(run_ids=[run_id], statuses=[DagsterRunStatus.FAILURE]))
    )[0]
    wait_for(lambda: dagster.instance.get_run_by_id(run_id).tags.get(WILL_RETRY_TAG) == "false")
    if (
        given_up
    ):  # as if its process had died while there was no code server: the daemon says this, and gives up
        dagster.instance.report_engine_event("Failed to retry run", run)
    else:  # as if the daemon had looked before the run's new status was stored
        dagster.instance.add_run_tags(run_id, {WILL_RETRY_TAG: "true"})
    (retry,) = wait_for(lambda: retries(dagster, run_id))
    assert retry.asset_selection == {BROKEN}
    time.sleep(supervisor.REQUEUE_SECONDS + 2)
    assert len(retries(dagster, run_id)) == 1


def test_an_unknown_job_is_refused_with_the_reason(dagster):
    with pytest.raises(OperationError, match=r"nope can't be launched: .*Could not find"):
        dagster.launch("nope")


def test_a_run_can_be_stopped(dagster, settings):
    run = launch_slow(dagster, settings)
    dagster.query(TERMINATE, {"id": run.run_id})
    wait_for(lambda: dagster.instance.get_run_by_id(run.run_id).status == DagsterRunStatus.CANCELED)
    wait_for(lambda: not is_alive(run.tags))
    assert not retries(dagster, run.run_id)


def test_a_crash_of_everything_requeues_what_was_wanted(dagster, settings):
    run = launch_slow(dagster, settings)
    assert dagster.out_of_date([SLOW, AFTER], PARTITION) == [SLOW, AFTER]
    for process in processes_of(settings):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    wait_for(lambda: not processes_of(settings))
    assert dagster.instance.get_run_by_id(run.run_id).status == DagsterRunStatus.STARTED

    began = time.time()
    assert supervisor.start(settings)
    (retry,) = wait_for(lambda: retries(dagster, run.run_id))
    took = dagster.instance.get_run_record_by_id(retry.run_id).create_timestamp.timestamp() - began
    failed = dagster.instance.get_run_by_id(run.run_id)
    assert failed.status == DagsterRunStatus.FAILURE
    assert Ledger(settings.ledger_url).is_fenced(run.run_id)
    assert retry.job_name == run.job_name
    assert retry.asset_selection == run.asset_selection
    assert retry.tags["dagster/partition"] == PARTITION
    assert took < 30

    (settings.home / "finish").touch()
    seen: list[str] = []
    dagster.follow(run.run_id, seen.append)  # of the crashed run: goes on with the retry
    assert seen[-2].startswith("after: ")
    assert any("requeued" in line for line in seen)
    assert dagster.out_of_date([SLOW, AFTER], PARTITION) == []
    assert len(retries(dagster, run.run_id)) == 1


def test_a_worker_that_survived_the_others_is_left_alone(dagster, settings):
    run = launch_slow(dagster, settings)
    state = supervisor.read_state(settings)
    os.kill(int(state["supervisor"][PID]), signal.SIGKILL)
    wait_for(lambda: not supervisor.is_running(settings))
    assert supervisor.start(settings), "the ports that the orphans held are free again"
    assert is_alive(run.tags)
    (settings.home / "finish").touch()
    dagster.follow(run.run_id, print)
    assert not retries(dagster, run.run_id)


def test_down_ends_everything_and_says_what_it_interrupted(dagster, settings, capsys):
    run = launch_slow(dagster, settings)
    assert main(["down"]) == 0
    assert "1 run(s) in progress were interrupted" in capsys.readouterr().out
    wait_for(lambda: not processes_of(settings), seconds=15)
    assert not is_alive(run.tags)
    assert main(["status"]) == 1
