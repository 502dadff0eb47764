"""Who a process is, and whether it still runs."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.launcher.base import LaunchRunContext, WorkerStatus
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin

from ml_assets.cli import launcher
from ml_assets.cli.launcher import (
    BOOT_ID,
    PID,
    PROCESS_STARTED,
    WorkerProcessLauncher,
    concerned,
    identity,
    is_alive,
    kill_group,
    process_started,
    record_lost_costs,
)
from ml_assets.cli.recovery import recover
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.meter import metered
from ml_assets.decisions.records import Cost
from ml_assets.decisions.tags import CUSTOMIZATION_TAG, DECISION_TAG, run_cost
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import RUN_ASSETS_VARIABLE, Settings


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_running_process_is_alive(sleeper):
    tags = identity(sleeper.pid)
    assert tags[PID] == str(sleeper.pid)
    assert is_alive(tags)


def test_an_ended_process_is_not_alive_even_before_its_parent_looked(sleeper):
    tags = identity(sleeper.pid)
    sleeper.kill()
    deadline = time.monotonic() + 10
    while is_alive(tags) and time.monotonic() < deadline:  # now a zombie: nobody waited for it
        time.sleep(0.01)
    assert not is_alive(tags)
    sleeper.wait()
    assert process_started(sleeper.pid) is None
    assert not is_alive(tags)


def test_the_same_pid_with_another_start_is_another_process(sleeper):
    tags = identity(sleeper.pid) | {PROCESS_STARTED: "17"}
    assert not is_alive(tags)
    kill_group(tags)
    assert sleeper.poll() is None, "a stranger that got the pid must not be killed"


def test_no_process_of_another_boot_is_alive(sleeper):
    assert not is_alive(identity(sleeper.pid) | {BOOT_ID: "another"})


def test_a_start_does_not_change_while_the_process_becomes_another_program():
    process = subprocess.Popen(["sh", "-c", "read -r go && exec sleep 60"], stdin=subprocess.PIPE)
    tags = identity(process.pid)
    assert process.stdin
    process.stdin.write(b"go\n")
    process.stdin.flush()
    try:
        deadline = time.monotonic() + 10
        while b"sleep" not in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert is_alive(tags)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def test_killing_ends_the_whole_group():
    process = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    child = int(process.stdout.readline())
    child_tags = identity(child)
    kill_group(identity(process.pid))
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while is_alive(child_tags) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child_tags)


# -- what a run is about -------------------------------------------------------------------------------


def run_of(job: str, *keys: str, checks: Sequence[str] = (), **tags: str) -> dg.DagsterRun:
    return dg.DagsterRun(
        job,
        asset_selection=frozenset(map(dg.AssetKey.from_user_string, keys)) or None,
        asset_check_selection=frozenset(
            dg.AssetCheckKey(dg.AssetKey.from_user_string(key), "check") for key in checks
        )
        or None,
        tags=tags,
    )


def test_a_run_is_about_the_customizations_of_its_assets_and_checks():
    run = run_of("__ASSET_JOB", "news/adapter", "news/dataset", "base_model", checks=["home/drift_report"])
    assert concerned(run) == "base_model,home,news"


@pytest.mark.parametrize(
    ("job", "tag", "owners"),
    [("news__main", "news", "news"), ("mine", "news", ""), ("reproduce", None, "")],
)
@pytest.mark.parametrize("keys", [[], ["news/adapter"]])
def test_a_job_is_about_the_customization_that_has_it(job, tag, owners, keys):
    assert concerned(run_of(job, *keys, **({CUSTOMIZATION_TAG: tag} if tag else {}))) == owners


@pytest.mark.parametrize(("job", "keys"), [("__ASSET_JOB", ("voice/adapter",)), ("mine", ("voice/adapter",))])
def test_the_process_of_a_run_is_told_what_it_is_about(job: str, keys: tuple[str, ...], tmp_path) -> None:
    says = tmp_path / "environment"
    repository = RepositoryPythonOrigin(
        sys.executable,
        ModuleCodePointer("nowhere", "defs"),
        None,
        ["sh", "-c", f"env > {says}.part && mv {says}.part {says}"],
        None,
    )
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        launcher = WorkerProcessLauncher()
        launcher.register_instance(instance)
        run = run_of(job, *keys)._replace(job_code_origin=JobPythonOrigin(job, repository))
        instance.add_run(run)
        launcher.launch_run(LaunchRunContext(run, None))
        deadline = time.monotonic() + 20
        while not says.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    told = [line for line in says.read_text().splitlines() if line.startswith(RUN_ASSETS_VARIABLE)]
    assert told == ([f"{RUN_ASSETS_VARIABLE}=voice"] if job == "__ASSET_JOB" else [])


def test_more_names_than_an_environment_variable_holds_are_not_told():
    run = run_of("__ASSET_JOB", *(f"customization_{n:05}/adapter" for n in range(8000)))
    assert concerned(run) == ""


# -- what a killed run had spent -----------------------------------------------------------------------

PARTITION = "tiny@0123456789ab"


class Mode(dg.Config):
    mode: str = "auto"


@contextlib.contextmanager
def open_book() -> Iterator[DecisionBook]:
    with contextlib.closing(Ledger(Settings.from_env().ledger_url)) as ledger:
        yield DecisionBook(ledger)


def costs() -> list[Cost]:
    with open_book() as book:
        return book.costs("home")


def messages(instance: dg.DagsterInstance) -> list[str]:
    return [event.user_message for run in instance.get_runs() for event in instance.all_logs(run.run_id)]


def eventually(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def run_and_be_killed(home: Path, killed_in: str, mode: str, port: bool, deaf: bool = False) -> None:
    """A run of an adapter and its report, for a process of its own. The adapter is metered, as a port or a
    training, and the process ends in a step, after that; a deaf one waits there for who kills it."""
    os.setsid()

    def work(context: dg.AssetExecutionContext, what: str) -> None:
        context.log.info("step 1/9")
        time.sleep(0.1)
        if what == killed_in:
            if deaf:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            context.log.info("step 5/9")
            if deaf:
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGKILL)

    partitions = dg.StaticPartitionsDefinition([PARTITION])

    @dg.asset(key=["home", "adapter"], partitions_def=partitions)
    def adapter(context: dg.AssetExecutionContext, config: Mode) -> None:
        cost = run_cost(context.run, "home", "port" if port else "training", PARTITION)
        if port or killed_in != "adapter":
            with metered(open_book, cost, 1.0) as meter:
                meter.read(7.0, 70)
        work(context, "adapter")

    @dg.asset(key=["home", "eval_report"], partitions_def=partitions, deps=[adapter])
    def eval_report(context: dg.AssetExecutionContext) -> None:
        work(context, "eval_report")

    with dg.DagsterInstance.from_config(str(home)) as instance:
        dg.materialize(
            [adapter, eval_report],
            partition_key=PARTITION,
            instance=instance,
            tags=identity(os.getpid()) | {DECISION_TAG: "decision-1"},
            run_config={"ops": {"home__adapter": {"config": {"mode": mode}}}},
        )


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """(instance, run) of a run that was killed in a step."""
    monkeypatch.setenv("EVERGREEN_DEVICE_SECOND_PRICE", "2")
    (tmp_path / "dagster.yaml").write_bytes((Path(__file__).parents[2] / "dagster.yaml").read_bytes())
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:

        def kill(*arguments: Any) -> tuple[dg.DagsterInstance, dg.DagsterRun]:
            process = multiprocessing.get_context("fork").Process(
                target=run_and_be_killed, args=(tmp_path, *arguments)
            )
            process.start()
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
            (run,) = instance.get_runs()
            return instance, run

        yield kill


@pytest.mark.parametrize("mode", ["auto", "incremental", "port"])
def test_what_a_killed_training_took_is_recorded_once(killed, mode):
    instance, run = killed("adapter", mode, False)
    assert instance.run_launcher.check_run_worker_health(run).status == WorkerStatus.FAILED
    (cost,) = costs()
    assert [found.run_id for found in recover(instance)] == [run.run_id]
    assert costs() == [cost]
    assert cost.kind == ("training" if mode == "auto" else mode)
    assert (cost.partition, cost.run_id, cost.decision_id) == (PARTITION, run.run_id, "decision-1")
    assert 0.1 <= cost.device_seconds < 5 and cost.money == pytest.approx(2 * cost.device_seconds)
    assert cost.rows == 0, "nothing is predicted from a part of a training"


def test_of_a_killed_run_only_what_had_not_ended_is_added(killed):
    instance, _ = killed("eval_report", "auto", False)
    recover(instance)
    evaluation, training = costs()
    assert (training.kind, training.device_seconds, training.rows) == ("training", 7.0, 70)
    assert evaluation.kind == "evaluation" and 0.1 <= evaluation.device_seconds < 5


def test_what_was_metered_before_the_kill_is_not_counted_again(killed):
    instance, _ = killed("adapter", "auto", True)
    recover(instance)
    (cost,) = costs()
    assert (cost.kind, cost.device_seconds) == ("port", 7.0)


def test_what_a_canceled_training_took_that_had_to_be_killed(killed, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    process = multiprocessing.get_context("fork").Process(
        target=run_and_be_killed, args=(tmp_path, "adapter", "auto", False, True)
    )
    process.start()
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        eventually(lambda: any("step 5/9" in said for said in messages(instance)))
        (run,) = instance.get_runs()
        assert instance.run_launcher.terminate(run.run_id)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        eventually(lambda: len(costs()) == 1)
        (cost,) = costs()
        assert (cost.kind, cost.run_id) == ("training", run.run_id) and 0.1 <= cost.device_seconds < 5
        recover(instance)
        assert costs() == [cost]


def test_a_cost_that_can_not_be_recorded_stops_nothing(killed, tmp_path, monkeypatch, caplog):
    instance, run = killed("adapter", "auto", False)
    (tmp_path / "damaged.db").write_bytes(b"damaged " * 1000)
    monkeypatch.setenv("EVERGREEN_LEDGER_URL", f"sqlite:///{tmp_path / 'damaged.db'}")
    record_lost_costs(instance, run)
    assert "is not known" in caplog.text
