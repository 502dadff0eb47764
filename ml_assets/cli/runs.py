"""Dagster runs from outside: launched through the UI's own API, so that they are queued, shown and limited
like all others, and followed in the terminal."""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from dagster import AssetKey, DagsterEventType, DagsterInstance, DagsterRunStatus
from dagster._core.events.log import EventLogEntry
from dagster._core.storage.tags import AUTO_RETRY_RUN_ID_TAG, PARTITION_NAME_TAG, WILL_RETRY_TAG

from ml_assets.cli.supervisor import OperationError

LOCATION = "evergreen"
REPOSITORY = "__repository__"
ASSET_JOB = "__ASSET_JOB"

LAUNCH = """
mutation ($parameters: ExecutionParams!) {
  launchRun(executionParams: $parameters) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on Error { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}
"""
PARTITIONED = (
    "query ($keys: [AssetKeyInput!]!) { assetNodes(assetKeys: $keys) { assetKey { path } isPartitioned } }"
)
STALENESS = """
query ($keys: [AssetKeyInput!]!, $partition: String) {
  assetNodes(assetKeys: $keys) { assetKey { path } staleStatus(partition: $partition) }
}
"""


@dataclass(frozen=True)
class Dagster:
    """The Dagster of this deployment: `url` of its UI, `instance` to read what happened."""

    url: str
    instance: DagsterInstance

    def query(self, text: str, variables: Mapping[str, Any]) -> Any:
        """Ask the UI's API. Raises OperationError with its reason when it can't answer."""
        try:
            response = httpx.post(
                f"{self.url}/graphql",
                json={"query": text, "variables": dict(variables)},
                timeout=60,
                trust_env=False,
            )
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise OperationError(f"{self.url} does not answer: {error}") from error
        if answer.get("errors"):
            raise OperationError(f"{self.url}: {answer['errors'][0]['message']}")
        return answer["data"]

    def run_url(self, run_id: str) -> str:
        return f"{self.url}/runs/{run_id}"

    def launch(
        self, job: str, *, assets: Sequence[AssetKey] | None = None, partition: str | None = None
    ) -> str:
        """Queue a run of a job, or of some of its assets; returns the run id.

        Raises OperationError with Dagster's reason when it refuses.
        """
        selector: dict[str, Any] = {
            "repositoryLocationName": LOCATION,
            "repositoryName": REPOSITORY,
            "jobName": job,
        }
        if assets is not None:
            selector["assetSelection"] = [{"path": list(key.path)} for key in assets]
        tags = [{"key": PARTITION_NAME_TAG, "value": partition}] if partition else []
        parameters = {"selector": selector, "executionMetadata": {"tags": tags}, "mode": "default"}
        result = self.query(LAUNCH, {"parameters": parameters})["launchRun"]
        if "run" not in result:
            reasons = [error["message"] for error in result.get("errors", [])] or [result.get("message", "")]
            raise OperationError(f"{job} can't be launched: {result['__typename']}: {'; '.join(reasons)}")
        return result["run"]["runId"]

    def out_of_date(self, assets: Sequence[AssetKey], partition: str | None) -> list[AssetKey]:
        """Those of the assets that were never made, or whose inputs or code changed since."""
        keys = [{"path": list(key.path)} for key in assets]
        fresh: set[tuple[str, ...]] = set()
        nodes = self.query(PARTITIONED, {"keys": keys})["assetNodes"]
        for partitioned in (True, False):  # the API refuses a partition where there are none
            some = [node["assetKey"] for node in nodes if node["isPartitioned"] == partitioned]
            variables = {"keys": some, "partition": partition if partitioned else None}
            for node in self.query(STALENESS, variables)["assetNodes"] if some else []:
                if node["staleStatus"] == "FRESH":
                    fresh.add(tuple(node["assetKey"]["path"]))
        return [key for key in assets if tuple(key.path) not in fresh]

    def follow(self, run_id: str, show: Callable[[str], None]) -> None:
        """Show what happens in a run until it ends; a run whose process died is followed in its retry.

        Raises OperationError with the reason when it fails.
        """
        cursor: str | None = None
        failure = ""
        while True:
            status = self._status(run_id)  # before reading, so that nothing of a finished run is missed
            while True:
                page = self.instance.get_records_for_run(run_id, cursor=cursor)
                cursor = page.cursor
                for record in page.records:
                    line = line_of(record.event_log_entry)
                    if line:
                        show(line)
                    failure = failure_of(record.event_log_entry) or failure
                if not page.has_more:
                    break
            if status == DagsterRunStatus.SUCCESS:
                return
            if status in (DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED):
                retry = self._retry_of(run_id)
                if retry is None:
                    raise OperationError(
                        f"run {run_id} ended as {status.value}: {failure}\nsee {self.run_url(run_id)}"
                    )
                show(f"the process of the run died; it is requeued: {self.run_url(retry)}")
                run_id, cursor = retry, None
            time.sleep(0.5)

    def _status(self, run_id: str) -> DagsterRunStatus:
        run = self.instance.get_run_by_id(run_id)
        if run is None:
            raise OperationError(f"run {run_id} was deleted")
        return run.status

    def _retry_of(self, run_id: str) -> str | None:
        """The run that Dagster queues in the place of a crashed one; it takes the daemon some seconds."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            run = self.instance.get_run_by_id(run_id)
            if run is None or run.tags.get(WILL_RETRY_TAG) != "true":
                return None
            if AUTO_RETRY_RUN_ID_TAG in run.tags:
                return run.tags[AUTO_RETRY_RUN_ID_TAG]
            time.sleep(0.5)
        return None


def line_of(entry: EventLogEntry) -> str | None:
    """What a person wants to know of an event, on one line; None for the many that only Dagster needs."""
    step = (entry.step_key or "").split("__")[-1]
    event = entry.dagster_event
    if event is None:
        message = entry.user_message.strip() if int(entry.level) >= logging.INFO else ""
        return f"{step}: {message}" if message else None
    if event.event_type == DagsterEventType.STEP_START:
        return f"{step}: started"
    if event.event_type == DagsterEventType.STEP_SUCCESS:
        return f"{step}: done in {event.step_success_data.duration_ms / 1000:.1f} s"
    if event.event_type == DagsterEventType.ASSET_CHECK_EVALUATION:
        check = event.asset_check_evaluation_data
        verdict = "passed" if check.passed else f"{check.severity.value}: not passed"
        reason = f" ({check.description})" if check.description else ""
        return f"{step}: check {check.check_name} {verdict}{reason}"
    if event.event_type == DagsterEventType.STEP_FAILURE:
        return f"{step}: FAILED"
    return None


def failure_of(entry: EventLogEntry) -> str | None:
    """The reason in an event that says why a step or a run failed: the message of the innermost error."""
    event = entry.dagster_event
    if event is None:
        return None
    if event.event_type == DagsterEventType.STEP_FAILURE:
        data = event.step_failure_data
        if data.user_failure_data and data.user_failure_data.description:
            return data.user_failure_data.description
        error = data.error
        while error is not None and error.cause is not None:
            error = error.cause
        return re.sub(r"^[\w.]+\.(?=\w+: )", "", error.message.strip()) if error else event.message
    if event.event_type == DagsterEventType.RUN_FAILURE and "Steps failed" not in (event.message or ""):
        return event.message
    return None
