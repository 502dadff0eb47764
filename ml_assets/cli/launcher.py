"""The process of a run: started, identified, watched, stopped.

Dagster's default launcher lets the code server start a run's process and knows nothing about it afterwards:
when the machine goes down, the run stays STARTED for ever. Here the process is known by three run tags, so
that anyone can tell at any time whether it still exists.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import psutil
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.definitions.assets.job.asset_job import IMPLICIT_ASSET_JOB_NAME
from dagster._core.events import RunFailureReason
from dagster._core.execution.retries import auto_reexecution_should_retry_run
from dagster._core.launcher.base import CheckRunHealthResult, LaunchRunContext, RunLauncher, WorkerStatus
from dagster._core.origin import DEFAULT_DAGSTER_ENTRY_POINT, get_python_environment_entry_point
from dagster._core.storage.tags import PARTITION_NAME_TAG, RETRY_STRATEGY_TAG, WILL_RETRY_TAG
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import ConfigurableClass
from dagster._serdes.config_class import ConfigurableClassData

from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.records import CostKind
from ml_assets.decisions.tags import CUSTOMIZATION_TAG, run_cost
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import RUN_ASSETS_VARIABLE, Settings

PID = "evergreen/pid"
BOOT_ID = "evergreen/boot_id"
PROCESS_STARTED = "evergreen/process_started"
LOG_VARIABLE = "EVERGREEN_LOG"
LONGEST_VARIABLE = 100_000
"""Characters of an environment variable that Linux surely takes (MAX_ARG_STRLEN is 131,072 bytes)."""
GRACE_SECONDS = 30.0
COSTS: dict[str, Sequence[CostKind]] = {
    "adapter": ("training", "incremental", "port"),
    "eval_report": ("evaluation",),
}
"""What the computing of an asset may be recorded as; the first where nothing says more."""
STARTS = (DagsterEventType.STEP_START, DagsterEventType.STEP_RESTARTED)
ENDS = (DagsterEventType.STEP_SUCCESS, DagsterEventType.STEP_FAILURE, DagsterEventType.STEP_UP_FOR_RETRY)

logger = logging.getLogger(__name__)


def boot_id() -> str:
    """Names this boot of the machine: no process of another boot exists any more."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return f"{psutil.boot_time():.0f}"


def process_started(pid: int) -> str | None:
    """When the process started, in a form that never changes during its life; None when it is gone.

    A pid is used again; pid and start together are not.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        try:  # clock ticks since boot: no step of the wall clock moves it
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except FileNotFoundError:
            return None if Path("/proc/self").exists() else f"{process.create_time():.2f}"
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def identity(pid: int) -> dict[str, str]:
    """The tags that identify a process that runs now."""
    return {PID: str(pid), BOOT_ID: boot_id(), PROCESS_STARTED: process_started(pid) or "gone"}


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process that `identity` described still runs."""
    return tags[BOOT_ID] == boot_id() and process_started(int(tags[PID])) == tags[PROCESS_STARTED]


def kill_group(tags: Mapping[str, str], signal_number: int = signal.SIGKILL) -> None:
    """Signal the process that `identity` described, and all of its process group; no-op when it is gone."""
    if is_alive(tags):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(tags[PID]), signal_number)


class WorkerProcessLauncher(RunLauncher, ConfigurableClass):
    """Runs every run in a process of its own, in its own session, on this machine."""

    def __init__(self, inst_data: ConfigurableClassData | None = None):
        self._inst_data = inst_data
        self._processes: list[subprocess.Popen[bytes]] = []
        super().__init__()

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Self:
        return cls(inst_data)

    def launch_run(self, context: LaunchRunContext) -> None:
        """Start the run's process. It waits until its tags are stored: should this process die in between,
        the worker ends without having done anything."""
        self._processes = [process for process in self._processes if process.poll() is None]  # reaps
        origin = context.job_code_origin
        if origin is None:
            raise ValueError(f"run {context.dagster_run.run_id} has no code origin: launch it from the UI")
        if origin.repository_origin.entry_point == DEFAULT_DAGSTER_ENTRY_POINT:
            # `dagster` alone is what PATH finds: nothing, or the command of another environment
            entry_point = get_python_environment_entry_point(sys.executable)
            origin = origin._replace(
                repository_origin=origin.repository_origin._replace(entry_point=entry_point)
            )
        arguments = ExecuteRunArgs(origin, context.dagster_run.run_id, self._instance.get_ref())
        environment = os.environ.copy()
        if owners := concerned(context.dagster_run):
            environment[RUN_ASSETS_VARIABLE] = owners
        with open(os.environ.get(LOG_VARIABLE, os.devnull), "ab") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "sh", *arguments.get_command_args()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self._processes.append(process)
        assert process.stdin
        with process.stdin:
            tags = identity(process.pid)
            # everything is memoized, and 'from failure' can't retry a run that died before its first step
            tags[RETRY_STRATEGY_TAG] = context.dagster_run.tags.get(RETRY_STRATEGY_TAG, "ALL_STEPS")
            self._instance.add_run_tags(context.dagster_run.run_id, tags)
            process.stdin.write(b"go\n")

    def terminate(self, run_id: str) -> bool:
        """Interrupt the run's process, and kill it when it does not end by itself in 30 s."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        if PID not in run.tags or not is_alive(run.tags):
            record_lost_costs(self._instance, run)
            self._instance.report_run_canceled(run, message="The process of the run is gone.")
            return True
        kill_group(run.tags, signal.SIGTERM)
        threading.Thread(target=self._kill_later, args=(run,), daemon=True).start()
        return True

    def _say_whether_it_is_retried(self, run: DagsterRun) -> None:
        """Before the failure is reported. Dagster stores the event of a failure before the status of the run;
        the daemon's retries read events, and would pass for ever over a run that still looks started."""
        if self._instance.run_retries_enabled:
            failed = run.with_status(DagsterRunStatus.FAILURE)
            again = auto_reexecution_should_retry_run(self._instance, failed, RunFailureReason.UNKNOWN)
            self._instance.add_run_tags(run.run_id, {WILL_RETRY_TAG: str(again).lower()})

    def _kill_later(self, run: DagsterRun) -> None:
        time.sleep(GRACE_SECONDS)
        if is_alive(run.tags):
            kill_group(run.tags)
            record_lost_costs(self._instance, run)

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """What the daemon's run monitoring asks every few seconds about a run in progress."""
        for process in self._processes:
            process.poll()  # reaps
        if PID not in run.tags or is_alive(run.tags):  # without tags: executed by hand, in another process
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        current = self._instance.get_run_by_id(run.run_id)
        if current is None or current.status != DagsterRunStatus.STARTED:
            return CheckRunHealthResult(WorkerStatus.SUCCESS)  # it ended while we looked
        fence(run.run_id, "its process died")
        record_lost_costs(self._instance, run)
        self._say_whether_it_is_retried(current)
        return CheckRunHealthResult(WorkerStatus.FAILED, msg=describe(run))


def concerned(run: DagsterRun) -> str:
    """What the assets of a run belong to, the first part of their keys, in the form of `RUN_ASSETS_VARIABLE`;
    empty where the run does not say, or is of a job that may look at any."""
    customization = run.tags.get(CUSTOMIZATION_TAG)
    if customization and run.job_name.startswith(f"{customization}__"):
        return customization
    if not run.job_name.startswith(IMPLICIT_ASSET_JOB_NAME):
        return ""
    keys = {*(run.asset_selection or ()), *(check.asset_key for check in run.asset_check_selection or ())}
    text = ",".join(sorted({key.path[0] for key in keys}))
    return text if len(text) <= LONGEST_VARIABLE else ""


def describe(run: DagsterRun) -> str:
    """Which process is gone, for an event of the run."""
    if PID not in run.tags:
        return "The run had no process yet."
    return f"The process of the run is gone (pid {run.tags[PID]}, boot {run.tags[BOOT_ID]})."


def fence(run_id: str, reason: str) -> None:
    """From here on this run can't release anything, should a part of it still be alive somewhere."""
    ledger = Ledger(Settings.from_env().ledger_url)
    try:
        ledger.fence(run_id, reason)
    finally:
        ledger.close()


def record_lost_costs(instance: DagsterInstance, run: DagsterRun) -> None:
    """What a run whose process was killed had spent, up to the last word of the step that it was in: it
    could not write that down itself. Never raises: the run has failed in any case."""
    try:
        partition, settings = run.tags.get(PARTITION_NAME_TAG), Settings.from_env()
        for step, seconds in _unfinished(instance, run.run_id).items():
            customization, _, asset = step.rpartition("__")
            kinds = COSTS.get(asset)
            if kinds is None or partition is None or seconds <= 0:
                continue
            ops: Any = run.run_config.get("ops", {})
            mode = ops.get(step, {}).get("config", {}).get("mode")
            kind = mode if mode in kinds else kinds[0]
            with contextlib.closing(Ledger(settings.ledger_url)) as ledger:
                book = DecisionBook(ledger)
                known = {(cost.run_id, cost.partition, cost.kind) for cost in book.costs(customization)}
                if any((run.run_id, partition, one) in known for one in kinds):
                    continue  # it died after it had computed
                cost = run_cost(run, customization, kind, partition)
                money = seconds * settings.device_second_price
                book.record_cost(replace(cost, device_seconds=seconds, money=money))
    except Exception:
        logger.exception("what run %s had spent is not known", run.run_id)


def _unfinished(instance: DagsterInstance, run_id: str) -> dict[str, float]:
    """{step: seconds from its start to its last event} of the steps that have not ended."""
    started: dict[str, float] = {}
    last: dict[str, float] = {}
    for event in instance.all_logs(run_id):
        if event.step_key is None:
            continue
        last[event.step_key] = event.timestamp
        if event.dagster_event_type in STARTS:
            started[event.step_key] = event.timestamp
        elif event.dagster_event_type in ENDS:
            started.pop(event.step_key, None)
    return {step: last[step] - at for step, at in started.items()}
