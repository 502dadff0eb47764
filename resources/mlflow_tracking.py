"""MLflow as the record of trainings and the registry of adapters, over `MlflowClient` alone.

One MLflow run per input key (so per adapter), one registered model per customization, one version per adapter
digest. Nothing here sets MLflow's global tracking URI or active run, and MLflow is imported on first use.
"""

import contextlib
import json
import logging
import math
import os
import re
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import dagster as dg
import filelock
from pydantic import Field, PrivateAttr
from sqlalchemy.engine import make_url

from ml_assets.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

T = TypeVar("T")
_log = logging.getLogger(__name__)

INPUT_KEY = "evergreen.input_key"
CUSTOMIZATION = "evergreen.customization"
BASE_REVISION = "evergreen.base_revision"
ERROR = "evergreen.error"
ADAPTER_DIGEST = "adapter_digest"
ADAPTER_FOLDER = "adapter"
# what may be logged: formats that hold data and no code
FORMATS = frozenset(
    {".safetensors", ".json", ".jsonl", ".html", ".md", ".txt", ".csv", ".parquet", ".png", ".svg", ".jinja"}
)
# shows the pages for model training; the default of MLflow's UI are those for chat applications
PAGES = "?workflowType=machine_learning"
LOCK_SECONDS = 300  # a fresh store takes about 10 s to migrate, more on a busy machine
# where MLflow keeps addresses of files
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
    ("trace_tags", "value"),
)


class TrackingUnavailable(Exception):
    """MLflow could not be reached, for as long as was worth waiting; the message names the URI."""


def ensure_store(uri: str, artifact_root: str | None = None) -> None:
    """Create the SQLite store of MLflow, or migrate it to this MLflow's schema; no-op for other URIs.

    Safe to call from many processes at once: a file lock beside the database lets one of them do the work
    (MLflow's own migration fails when two processes start it together). Sets WAL, so that readers do not
    block writers. `artifact_root` is where MLflow's "Default" experiment keeps its files. Files beside the
    database that were moved or copied with it are found where they are now.
    Raises TrackingUnavailable when the file is not a SQLite database, sqlite3.OperationalError or
    filelock.Timeout when it is locked.
    """
    url = make_url(uri)
    if not url.drivername.startswith("sqlite") or url.database in (None, "", ":memory:"):
        return
    path = Path(str(url.database)).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _prepare_import()
    from mlflow.store.db import utils  # before the lock: importing takes seconds
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
                if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                    connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise TrackingUnavailable(f"MLflow store {path} is not a SQLite database: {error}") from error
        engine = utils.create_sqlalchemy_engine(uri)
        try:
            if utils._all_tables_exist(engine) and (
                utils._get_schema_version(engine) != utils._get_latest_schema_revision()
            ):
                utils._upgrade_db(engine)
        finally:
            engine.dispose()
        root = artifact_root or str(path.parent / "artifacts")
        # MLflow keeps its connections for as long as the process lives: to a file that was removed, too
        SqlAlchemyStore._get_or_create_engine(uri).dispose()
        SqlAlchemyStore(uri, root)
        if Path(root).resolve() == (path.parent / "artifacts").resolve():
            with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection, connection:
                _follow(connection, root)


def _follow(connection: sqlite3.Connection, root: str) -> None:
    """Have a store whose directory was moved or copied name its files below `root`: MLflow keeps absolute
    paths, and would go on with the files of the place where the store was made."""
    query = "SELECT artifact_location FROM experiments WHERE experiment_id = 0"
    default, new = connection.execute(query).fetchone(), Path(root).absolute()
    old = Path(default[0]).parent if default else new
    # a root with another name was chosen by a person, and did not move with the database
    if not old.is_absolute() or old.name != new.name or old.resolve() == new.resolve():
        return
    before = f"{old}/"
    for table, column in ADDRESSES:
        connection.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
            (f"{new}/", len(before) + 1, len(before), before),
        )
    _log.info("MLflow's files are below %s now, and were below %s", new, old)


def git_commit(root: Path) -> str | None:
    """The commit of the repository around `root`, with `-dirty` when files differ from it; None outside of a
    repository or without git."""
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True, timeout=30
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if status else commit


@dataclass(frozen=True)
class VersionInfo:
    """One version of a customization's registered model."""

    customization: str
    version: str
    run_id: str
    tags: dict[str, str]

    @property
    def adapter_digest(self) -> str:
        return self.tags[ADAPTER_DIGEST]


@dataclass(frozen=True)
class RunInfo:
    """One MLflow run. `status` is RUNNING, FINISHED, FAILED or KILLED."""

    run_id: str
    status: str
    url: str


@dataclass
class TrackedRun:
    """An open MLflow run; made by `MlflowTracking.run`."""

    tracking: "MlflowTracking"
    run_id: str
    url: str
    finished_before: bool
    _buffer: list[Any] = field(default_factory=list)
    _flushed: float = field(default_factory=time.monotonic)
    _logged: dict[str, dict[int, float]] = field(default_factory=dict)
    _may_repeat: bool = False

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note metrics of a step. They are sent in batches, at the latest at the end of the run: an MLflow
        that is away for a while does not stop a training. What an earlier attempt at this run has logged with
        the same value at the same step is left out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._buffer += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        if len(self._buffer) >= 200 or time.monotonic() - self._flushed > 5:
            try:
                self.flush(patience=0)
            except TrackingUnavailable as error:
                _log.warning("metrics are kept for later: %s", error)

    def flush(self, patience: float | None = None) -> None:
        """Send the metrics noted so far. Raises TrackingUnavailable; then they are kept."""
        self._flushed = time.monotonic()
        if self._may_repeat:
            self._buffer = [metric for metric in self._buffer if not self._repeats(metric, patience)]
        while self._buffer:
            batch = self._buffer[:1000]  # the most that MLflow takes at once
            self.tracking.retry(lambda c, b=batch: c.log_batch(self.run_id, metrics=b), patience)
            del self._buffer[: len(batch)]

    def _repeats(self, metric: Any, patience: float | None) -> bool:
        known = self._logged.get(metric.key)
        if known is None:
            history = self.tracking.retry(lambda c: c.get_metric_history(self.run_id, metric.key), patience)
            known = {m.step: m.value for m in sorted(history, key=lambda m: m.timestamp)}
            self._logged[metric.key] = known
        before = known.get(metric.step)
        known[metric.step] = metric.value
        return before is not None and (
            before == metric.value or (math.isnan(before) and math.isnan(metric.value))
        )

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log parameters, nested ones with dotted names. MLflow's parameters can't change: those that the run
        has already stay as they are."""
        from mlflow.entities import Param

        def send(client: "MlflowClient") -> None:
            known = client.get_run(self.run_id).data.params
            params = [Param(k, v) for k, v in _flat(parameters).items() if k not in known]
            for start in range(0, len(params), 100):  # the most that MLflow takes at once
                client.log_batch(self.run_id, params=params[start : start + 100])

        self.tracking.retry(send)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(key, value) for key, value in tags.items()]
        self.tracking.retry(lambda client: client.log_batch(self.run_id, tags=entries))

    def log_artifacts(self, directory: Path, path: str | None = None) -> None:
        """Copy every file below `directory` to the run, below `path`. Raises ValueError for a file whose
        format could hold code (see FORMATS)."""
        for file in directory.rglob("*"):
            if file.is_file():
                _check_format(file)
        self.tracking.retry(lambda client: client.log_artifacts(self.run_id, str(directory), path))

    def log_bytes(self, data: bytes, name: str) -> None:
        """Store `data` as the artifact `name` (a path that ends as in FORMATS), replacing an older one."""
        target = Path(name)
        _check_format(target)
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / target.name
            file.write_bytes(data)
            folder = target.parent.as_posix()
            self.tracking.retry(
                lambda client: client.log_artifact(self.run_id, str(file), None if folder == "." else folder)
            )

    def artifact_url(self, name: str) -> str:
        """The page that shows one artifact in the MLflow UI."""
        return f"{self.url.removesuffix(PAGES)}/artifacts/{quote(name)}{PAGES}"

    def log_text(self, text: str, name: str) -> None:
        self.log_bytes(text.encode(), name)

    def log_dataset(self, name: str, digest: str, source: str, rows: int, context: str = "training") -> None:
        """Log a dataset input: `digest` (MLflow keeps 36 characters of it; the whole is in the source),
        `source` a URI, `rows` the number of rows."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:36],
            source_type="uri",
            source=json.dumps({"uri": source, "sha256": digest}),
            profile=json.dumps({"num_rows": rows}),
        )
        entry = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
        self.tracking.retry(lambda client: client.log_inputs(self.run_id, datasets=[entry]))


class MlflowTracking(dg.ConfigurableResource):
    """Runs and registry. Every call waits out a locked database or an unreachable server for
    `patience_seconds`, then raises TrackingUnavailable. The locks that keep runs and versions single are
    files of this host: use one host (or one shared `EVERGREEN_HOME`) per customization."""

    tracking_uri: str = Field(
        default_factory=lambda: Settings.from_env().mlflow_uri, description="sqlite:///... or http(s)://..."
    )
    ui_url: str = Field(
        default_factory=lambda: Settings.from_env().mlflow_url, description="MLflow UI, for links."
    )
    dagster_url: str = Field(
        default_factory=lambda: Settings.from_env().dagster_url, description="Dagster UI, for links."
    )
    experiment: str = Field(default="evergreen", description="MLflow experiment; created when missing.")
    artifact_location: str = Field(
        default_factory=lambda: str(Settings.from_env().mlflow_artifacts),
        description="Directory or URL of the experiment's files; an MLflow server decides by itself.",
    )
    patience_seconds: float = Field(default=60, description="How long to wait for MLflow.")

    _client: "MlflowClient | None" = PrivateAttr(default=None)
    _experiment_id: str | None = PrivateAttr(default=None)

    # -- runs ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def run(
        self,
        *,
        customization: str,
        base_revision: str,
        input_key: str,
        dagster_run_id: str | None = None,
        partition: str | None = None,
        dagster_url: str | None = None,
        code_version: str | None = None,
        commit: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Iterator[TrackedRun]:
        """The MLflow run of one input key: created, or taken up again when an earlier attempt crashed or
        failed. Ends FINISHED, or FAILED on any exception. A run that had FINISHED before stays so, whatever
        happens: it is opened to add to it (evaluation metrics, a report).

        `dagster_url` is the address of the Dagster UI (default: the resource's), `commit` that of
        `git_commit`.
        """
        tags = {
            CUSTOMIZATION: customization,
            BASE_REVISION: base_revision,
            INPUT_KEY: input_key,
            "dagster.run_id": dagster_run_id,
            "dagster.partition": partition or base_revision,
            "evergreen.code_version": code_version,
            "mlflow.source.git.commit": commit,
        }
        if dagster_run_id:
            tags["dagster.url"] = f"{dagster_url or self.dagster_url}/runs/{dagster_run_id}"
            tags["mlflow.note.content"] = (
                f"Adapter of **{customization}** for `{base_revision}`, "
                f"made by [Dagster run {dagster_run_id[:8]}]({tags['dagster.url']})."
            )
        tags = {key: value for key, value in tags.items() if value is not None}
        tracked = self._open(f"{customization} on {base_revision}", input_key, tags)
        try:
            tracked.log_parameters(parameters or {})
            yield tracked
            tracked.flush()
        except BaseException as error:
            self._close_failed(tracked, error)
            raise
        if not tracked.finished_before:
            self.retry(lambda client: client.set_terminated(tracked.run_id, "FINISHED"))

    def _open(self, name: str, input_key: str, tags: dict[str, str]) -> TrackedRun:
        def find_or_create(client: "MlflowClient") -> tuple["Run", bool]:
            from mlflow.entities import RunTag

            with self._lock(f"run-{input_key}"):
                run = self._find(client, input_key)
                if run is None:
                    return client.create_run(self._experiment(client), tags=tags, run_name=name), True
                if run.info.status != "FINISHED":
                    client.update_run(run.info.run_id, status="RUNNING")
                    client.log_batch(run.info.run_id, tags=[RunTag(*tag) for tag in tags.items()])
                    if ERROR in run.data.tags:
                        client.delete_tag(run.info.run_id, ERROR)
                elif tags.get("dagster.run_id", run.data.tags.get("dagster.run_id")) != run.data.tags.get(
                    "dagster.run_id"
                ):
                    client.set_tag(run.info.run_id, "dagster.last_run_id", tags["dagster.run_id"])
                    client.set_tag(run.info.run_id, "dagster.last_url", tags["dagster.url"])
                return run, False

        run, created = self.retry(find_or_create)
        return TrackedRun(
            tracking=self,
            run_id=run.info.run_id,
            url=self._run_url(run),
            finished_before=run.info.status == "FINISHED",
            _may_repeat=not created,
        )

    def _close_failed(self, tracked: TrackedRun, error: BaseException) -> None:
        """Mark a run as failed; the reason must survive, so nothing here hides `error`."""
        patience = min(self.patience_seconds, 5)
        try:
            text = f"{type(error).__name__}: {error}"[:1000]
            self.retry(lambda client: client.set_tag(tracked.run_id, ERROR, text), patience)
            if not tracked.finished_before:
                self.retry(lambda client: client.set_terminated(tracked.run_id, "FAILED"), patience)
            if not isinstance(error, TrackingUnavailable):
                tracked.flush(patience)
        except Exception as second:
            error.add_note(f"MLflow run {tracked.run_id} could not be marked as failed: {second}")

    def find_run(self, input_key: str) -> RunInfo | None:
        """The run of an input key, or None."""
        run = self.retry(lambda client: self._find(client, input_key))
        return RunInfo(run.info.run_id, run.info.status, self._run_url(run)) if run else None

    def _find(self, client: "MlflowClient", input_key: str) -> "Run | None":
        runs = client.search_runs(
            [self._experiment(client)],
            filter_string=f"tags.`{INPUT_KEY}` = '{_quoted(input_key)}'",
            order_by=["attributes.start_time ASC"],
        )
        finished = [run for run in runs if run.info.status == "FINISHED"]
        return next(iter(finished or runs), None)

    def run_url(self, run_id: str) -> str:
        """The page of a run in the MLflow UI."""
        return self._run_url(self.retry(lambda client: client.get_run(run_id)))

    def _run_url(self, run: "Run") -> str:
        return f"{self.ui_url}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{PAGES}"

    # -- registry --------------------------------------------------------------------------------------

    def register_adapter(
        self, customization: str, run_id: str, adapter_digest: str, tags: Mapping[str, str] | None = None
    ) -> VersionInfo:
        """The version of this adapter in the customization's registered model: made once, whoever asks and
        how often. Its source is the folder `adapter` of the run. `tags` are set on it."""

        def register(client: "MlflowClient") -> VersionInfo:
            from mlflow.exceptions import MlflowException

            with self._lock(f"model-{customization}"):
                found = self._find_version(client, customization, adapter_digest)
                if found is None:
                    try:
                        client.create_registered_model(customization)
                    except MlflowException as error:
                        if error.error_code != "RESOURCE_ALREADY_EXISTS":
                            raise
                    found = client.create_model_version(
                        customization,
                        source=f"runs:/{run_id}/{ADAPTER_FOLDER}",
                        run_id=run_id,
                        tags={**(tags or {}), ADAPTER_DIGEST: adapter_digest},
                    )
                return self._tag(client, _info(found), tags or {})

        return self.retry(register)

    def find_version(self, customization: str, adapter_digest: str) -> VersionInfo | None:
        """The version of an adapter, or None when it is not registered."""
        found = self.retry(lambda client: self._find_version(client, customization, adapter_digest))
        return _info(found) if found else None

    def _find_version(
        self, client: "MlflowClient", customization: str, adapter_digest: str
    ) -> "ModelVersion | None":
        versions = client.search_model_versions(
            f"name = '{_quoted(customization)}' and tags.`{ADAPTER_DIGEST}` = '{_quoted(adapter_digest)}'"
        )
        return min(versions, key=lambda version: int(version.version), default=None)

    def tag_version(self, version: VersionInfo, tags: Mapping[str, str]) -> VersionInfo:
        """Set tags of a version (such as `verdict`, `report_digest`)."""
        return self.retry(lambda client: self._tag(client, version, tags))

    def _tag(self, client: "MlflowClient", version: VersionInfo, tags: Mapping[str, str]) -> VersionInfo:
        for key, value in tags.items():
            if version.tags.get(key) != value and key != ADAPTER_DIGEST:
                client.set_model_version_tag(version.customization, version.version, key, value)
        return VersionInfo(
            version.customization, version.version, version.run_id, {**tags, **version.tags, **tags}
        )

    def set_alias(self, customization: str, alias: str, version: str | int) -> None:
        """Point an alias (`champion`, `challenger`) at a version."""
        self.retry(lambda client: client.set_registered_model_alias(customization, alias, str(version)))

    def delete_alias(self, customization: str, alias: str) -> None:
        """Remove an alias; no-op when there is none."""
        if self.get_alias(customization, alias) is not None:
            self.retry(lambda client: client.delete_registered_model_alias(customization, alias))

    def get_alias(self, customization: str, alias: str) -> VersionInfo | None:
        """The version that an alias points at; None without alias or registered model."""

        def get(client: "MlflowClient") -> VersionInfo | None:
            found = client.search_registered_models(f"name = '{_quoted(customization)}'")
            version = next((model.aliases.get(alias) for model in found), None)
            return _info(client.get_model_version(customization, version)) if version else None

        return self.retry(get)

    def aliased(self) -> list[tuple[str, VersionInfo]]:
        """(alias, version) of all aliases of all customizations."""

        def get(client: "MlflowClient") -> list[tuple[str, VersionInfo]]:
            found, token = [], None
            while True:
                page = client.search_registered_models(page_token=token)
                for model in page:
                    for alias, version in sorted(model.aliases.items()):
                        found.append((alias, _info(client.get_model_version(model.name, str(version)))))
                token = page.token
                if not token:
                    return found

        return self.retry(get)

    def version_url(self, version: VersionInfo) -> str:
        """The page of a version in the MLflow UI."""
        return f"{self.ui_url}/#/models/{quote(version.customization)}/versions/{version.version}{PAGES}"

    # -- connection ------------------------------------------------------------------------------------

    def retry(self, work: "Callable[[MlflowClient], T]", patience: float | None = None) -> T:
        """Call `work(client)`, again with growing pauses while MLflow is locked or unreachable; `work` must
        be safe to repeat. Raises TrackingUnavailable after `patience` (default: patience_seconds)."""
        patience = self.patience_seconds if patience is None else patience
        start, pause = time.monotonic(), 0.1
        while True:
            try:
                return work(self._connect())
            except Exception as error:
                if not _transient(error):
                    raise
                if time.monotonic() - start + pause > patience:
                    waited = f"{time.monotonic() - start:.0f} s"
                    message = f"MLflow at {self.tracking_uri} cannot be reached (tried for {waited}): {error}"
                    raise TrackingUnavailable(_without_passwords(message)) from None  # it shows the password
            time.sleep(pause)
            pause = min(pause * 2, 5)

    def _connect(self) -> "MlflowClient":
        if self._client is None:
            ensure_store(self.tracking_uri, self.artifact_location)
            _prepare_import()
            from mlflow import MlflowClient

            self._client = MlflowClient(self.tracking_uri, registry_uri=self.tracking_uri)
        return self._client

    def _experiment(self, client: "MlflowClient") -> str:
        """The id of the experiment, created when missing."""
        if self._experiment_id is None:
            with self._lock("experiment"):
                found = client.get_experiment_by_name(self.experiment)
                if found is None:
                    server = self.tracking_uri.startswith("http")
                    location = None if server else f"{self.artifact_location.rstrip('/')}/{self.experiment}"
                    kind = {"mlflow.experimentKind": "custom_model_development"}
                    self._experiment_id = client.create_experiment(self.experiment, location, tags=kind)
                elif found.lifecycle_stage != "active":
                    raise ValueError(f"MLflow experiment {self.experiment!r} is deleted: restore it")
                else:
                    self._experiment_id = found.experiment_id
        assert self._experiment_id is not None
        return self._experiment_id

    def _lock(self, name: str) -> filelock.BaseFileLock:
        folder = Settings.from_env().locks
        folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(folder / f"mlflow-{quote(name, safe='')}.lock", timeout=LOCK_SECONDS)


def _prepare_import() -> None:
    """Settings that MLflow reads at import: no telemetry, and few retries of its own (7 with pauses of up to
    two minutes), because `MlflowTracking.retry` bounds the whole."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def _transient(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        return error.error_code in ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED")
    return isinstance(error, (OperationalError, sqlite3.OperationalError, filelock.Timeout))


def _info(version: "ModelVersion") -> VersionInfo:
    return VersionInfo(version.name, str(version.version), version.run_id or "", dict(version.tags))


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = str(value)[:6000]
    return flat


def _check_format(path: Path) -> None:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: expected a file format without code, one of {' '.join(sorted(FORMATS))}")


def _quoted(text: str) -> str:
    """For MLflow's filters, which have no escape: names and keys hold no quotes."""
    if "'" in text:
        raise ValueError(f"{text!r}: expected no quote")
    return text


def _without_passwords(text: str) -> str:
    return re.sub(r"(//[^:/@\s]*):[^@/\s]*@", r"\1:***@", text)
