import contextlib
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from sqlalchemy.engine import make_url

from resources.mlflow_tracking import (
    MlflowTracking,
    TrackedRun,
    TrackingUnavailable,
    ensure_store,
    git_commit,
)

KEY = "5e" * 32
RUN: dict[str, Any] = {"customization": "orders", "base_revision": "smol@0123456789ab", "input_key": KEY}
DIGEST = "ad" * 32


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated store to copy: the migration takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    ensure_store(f"sqlite:///{path}")
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path


@pytest.fixture
def tracking(empty_store: Path, evergreen_home: Path) -> MlflowTracking:
    (evergreen_home / "mlflow").mkdir()
    shutil.copy(empty_store, evergreen_home / "mlflow" / "mlflow.db")
    return MlflowTracking(dagster_url="http://dagster:3000", ui_url="http://mlflow:5000", patience_seconds=5)


def client(tracking: MlflowTracking):
    from mlflow import MlflowClient

    return MlflowClient(tracking.tracking_uri, registry_uri=tracking.tracking_uri)


def all_runs(tracking: MlflowTracking) -> list:
    experiments = client(tracking).search_experiments()
    return list(client(tracking).search_runs([e.experiment_id for e in experiments]))


def status(tracking: MlflowTracking, input_key: str) -> str | None:
    found = tracking.find_run(input_key)
    return found.status if found else None


def adapter_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "payload"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


# -- runs ----------------------------------------------------------------------------------------------


def test_a_run_records_what_it_is_given(tracking, tmp_path):
    with tracking.run(
        **RUN,
        dagster_run_id="11112222-3333",
        code_version="7",
        commit="c0ffee",
        parameters={"rank": 16, "prompt": {"user": "{text}"}, "steps": None},
    ) as run:
        assert client(tracking).get_run(run.run_id).info.status == "RUNNING"
        for step in range(450):
            run.log_metrics(step, {"loss": 1 / (step + 1), "tokens_per_second": 100})
        run.log_metrics(450, {"loss": math.nan})
        run.log_dataset("orders", "ab" * 32, "file:///data/ab", 120)
        run.log_artifacts(adapter_folder(tmp_path), "adapter")
        run.log_text("<h1>Grüße</h1>", "report/report.html")
        run.log_bytes(b'{"a": 1}\n', "rows.jsonl")
    stored = client(tracking).get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "orders on smol@0123456789ab"
    tags = stored.data.tags
    assert tags["evergreen.customization"] == "orders"
    assert tags["evergreen.base_revision"] == "smol@0123456789ab"
    assert tags["evergreen.input_key"] == KEY
    assert tags["evergreen.code_version"] == "7"
    assert tags["dagster.run_id"] == "11112222-3333"
    assert tags["dagster.partition"] == "smol@0123456789ab"
    assert tags["mlflow.source.git.commit"] == "c0ffee"
    assert "(http://dagster:3000/runs/11112222-3333)" in tags["mlflow.note.content"]
    assert stored.data.params == {"rank": "16", "prompt.user": "{text}"}
    history = client(tracking).get_metric_history(run.run_id, "loss")
    assert [m.step for m in history] == list(range(451))
    assert history[449].value == 1 / 450 and math.isnan(history[450].value)
    (dataset,) = stored.inputs.dataset_inputs  # type: ignore[union-attr]
    assert (dataset.dataset.name, dataset.dataset.digest) == ("orders", ("ab" * 32)[:36])
    assert json.loads(dataset.dataset.source) == {"uri": "file:///data/ab", "sha256": "ab" * 32}
    assert json.loads(str(dataset.dataset.profile)) == {"num_rows": 120}
    files = Path(str(stored.info.artifact_uri))
    assert (files / "report/report.html").read_text() == "<h1>Grüße</h1>"
    assert (files / "rows.jsonl").read_bytes() == b'{"a": 1}\n'
    assert (files / "adapter/adapter_model.safetensors").read_bytes() == b"weights"
    assert os.environ["EVERGREEN_HOME"] in str(files)
    report = run.artifact_url("report/my report.html")
    assert f"/runs/{run.run_id}/artifacts/report/my%20report.html?" in report
    assert run.url == tracking.run_url(run.run_id)
    assert run.url.startswith("http://mlflow:5000/#/experiments/") and f"/runs/{run.run_id}?" in run.url


def test_no_global_state_and_no_telemetry(tracking):
    import mlflow
    from mlflow.telemetry.utils import is_telemetry_disabled

    before = mlflow.get_tracking_uri()
    with tracking.run(**RUN):
        assert mlflow.active_run() is None
    assert (mlflow.active_run(), mlflow.get_tracking_uri()) == (None, before)
    assert is_telemetry_disabled()


def test_loading_the_module_imports_no_mlflow():
    code = (
        "import sys; from resources.mlflow_tracking import MlflowTracking; MlflowTracking(); "
        "assert 'mlflow' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("error", [ValueError("bad row"), KeyboardInterrupt(), SystemExit(3)])
def test_any_exception_marks_the_run_as_failed(tracking, error):
    with pytest.raises(type(error)), tracking.run(**RUN) as run:
        run.log_metrics(1, {"loss": 2.0})
        raise error
    stored = client(tracking).get_run(run.run_id)
    assert stored.info.status == "FAILED"
    assert stored.data.tags["evergreen.error"].startswith(type(error).__name__)
    assert stored.data.metrics == {"loss": 2.0}


def test_a_dagster_run_that_is_terminated_marks_the_run_as_failed(tracking):
    @dg.asset
    def training(mlflow_tracking: MlflowTracking) -> None:
        with mlflow_tracking.run(**RUN):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)

    with dg.instance_for_test() as instance, pytest.raises(BaseException):  # noqa: B017
        dg.materialize([training], resources={"mlflow_tracking": tracking}, instance=instance)
    assert [run.info.status for run in all_runs(tracking)] == ["FAILED"]


def test_a_failed_run_is_taken_up_again(tracking):
    with (
        pytest.raises(ValueError),
        tracking.run(**RUN, dagster_run_id="first", parameters={"rank": 1}) as run,
    ):
        run.log_metrics(1, {"loss": 3.0})
        run.log_metrics(2, {"loss": math.nan})
        raise ValueError("no")
    with tracking.run(**RUN, dagster_run_id="second", parameters={"rank": 1, "seed": 2}) as again:
        assert not again.finished_before
        assert client(tracking).get_run(run.run_id).info.status == "RUNNING"
        again.log_metrics(1, {"loss": 3.0})
        again.log_metrics(2, {"loss": math.nan})
        again.log_metrics(3, {"loss": 1.0})
    assert again.run_id == run.run_id
    (stored,) = all_runs(tracking)
    assert stored.info.status == "FINISHED"
    assert stored.data.tags["dagster.run_id"] == "second"
    assert "evergreen.error" not in stored.data.tags
    assert stored.data.params == {"rank": "1", "seed": "2"}
    assert [m.step for m in client(tracking).get_metric_history(run.run_id, "loss")] == [1, 2, 3]


def test_a_finished_run_is_added_to(tracking):
    with tracking.run(**RUN, dagster_run_id="training") as run:
        run.log_metrics(1, {"loss": 3.0})
    with tracking.run(**RUN, dagster_run_id="evaluation") as again:
        assert again.finished_before and again.run_id == run.run_id
        again.log_metrics(0, {"exact_match": 0.5})
    for value in (0.7, 0.7, 0.5):
        with tracking.run(**RUN) as again:
            again.log_metrics(0, {"exact_match": value})
    with pytest.raises(ValueError), tracking.run(**RUN):
        raise ValueError("the report failed")
    (stored,) = all_runs(tracking)
    assert stored.info.status == "FINISHED"
    assert stored.data.tags["dagster.run_id"] == "training"
    assert stored.data.tags["dagster.last_run_id"] == "evaluation"
    assert stored.data.tags["evergreen.error"] == "ValueError: the report failed"
    assert stored.data.metrics == {"loss": 3.0, "exact_match": 0.5}
    assert [m.value for m in client(tracking).get_metric_history(run.run_id, "exact_match")] == [
        0.5,
        0.7,
        0.5,
    ]


def test_other_inputs_are_another_run(tracking):
    with tracking.run(**RUN) as one, tracking.run(**{**RUN, "input_key": "77" * 32}) as two:
        pass
    assert one.run_id != two.run_id
    found = tracking.find_run("77" * 32)
    assert found and (found.run_id, found.status, found.url) == (two.run_id, "FINISHED", two.url)
    assert tracking.find_run("00" * 32) is None


TRAINING = """
import sys, time
from resources.mlflow_tracking import MlflowTracking
with MlflowTracking().run(customization="orders", base_revision="b", input_key="k") as run:
    run.log_metrics(1, {"loss": 1.0})
    run.flush()
    print(run.run_id, flush=True)
    time.sleep(60)
"""


def test_a_killed_run_is_taken_up_again(tracking):
    process = subprocess.Popen([sys.executable, "-c", TRAINING], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    run_id = process.stdout.readline().strip()
    process.kill()
    process.wait()
    process.stdout.close()
    assert status(tracking, "k") == "RUNNING"
    with tracking.run(customization="orders", base_revision="b", input_key="k") as run:
        run.log_metrics(1, {"loss": 1.0})
        run.log_metrics(2, {"loss": 0.5})
    assert run.run_id == run_id
    (stored,) = all_runs(tracking)
    assert stored.info.status == "FINISHED"
    assert len(client(tracking).get_metric_history(run_id, "loss")) == 2


@pytest.mark.parametrize("name", ["model.pkl", "model.bin", "x/model.pt", "script.py", "noending"])
def test_formats_that_can_hold_code_are_refused(tracking, tmp_path, name):
    folder = adapter_folder(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with tracking.run(**RUN) as run:
        with pytest.raises(ValueError, match=name):
            run.log_artifacts(folder, "adapter")
        with pytest.raises(ValueError, match=name):
            run.log_bytes(b"", name)
    assert client(tracking).list_artifacts(run.run_id) == []


# -- registry ------------------------------------------------------------------------------------------


def test_an_adapter_is_one_version(tracking, tmp_path):
    assert tracking.get_alias("orders", "champion") is None
    assert tracking.find_version("orders", DIGEST) is None
    with tracking.run(**RUN) as run:
        run.log_artifacts(adapter_folder(tmp_path), "adapter")
    first = tracking.register_adapter(
        "orders", run.run_id, DIGEST, {"base_revision": "b", "verdict": "undecided"}
    )
    again = tracking.register_adapter("orders", run.run_id, DIGEST, {"verdict": "promote"})
    other = tracking.register_adapter("orders", run.run_id, "be" * 32)
    assert (first.version, again.version, other.version) == ("1", "1", "2")
    assert (first.customization, first.run_id, first.adapter_digest) == ("orders", run.run_id, DIGEST)
    assert again.tags == {"adapter_digest": DIGEST, "base_revision": "b", "verdict": "promote"}
    assert tracking.find_version("orders", DIGEST) == again
    tagged = tracking.tag_version(again, {"verdict": "reject", "report_digest": "99"})
    assert tagged == tracking.find_version("orders", DIGEST)
    assert tagged.tags["verdict"] == "reject"
    assert tracking.version_url(tagged) == (
        "http://mlflow:5000/#/models/orders/versions/1?workflowType=machine_learning"
    )
    assert tracking.register_adapter("invoices", run.run_id, DIGEST).version == "1"


def test_the_version_leads_to_the_files(tracking, tmp_path):
    with tracking.run(**RUN) as run:
        run.log_artifacts(adapter_folder(tmp_path), "adapter")
    version = tracking.register_adapter("orders", run.run_id, DIGEST)
    code = (
        "import mlflow, os, sys; mlflow.set_tracking_uri(sys.argv[1]); "
        "print(sorted(os.listdir(mlflow.artifacts.download_artifacts(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", code, tracking.tracking_uri, f"models:/orders/{version.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['adapter_config.json', 'adapter_model.safetensors']"


def test_aliases_move(tracking):
    one = tracking.register_adapter("orders", "r1", DIGEST)
    two = tracking.register_adapter("orders", "r2", "be" * 32)
    tracking.set_alias("orders", "champion", one.version)
    assert tracking.get_alias("orders", "champion") == one
    assert tracking.get_alias("orders", "challenger") is None
    tracking.set_alias("orders", "champion", int(two.version))
    assert tracking.get_alias("orders", "champion") == two
    tracking.delete_alias("orders", "champion")
    tracking.delete_alias("orders", "champion")
    assert tracking.get_alias("orders", "champion") is None


# -- many processes ------------------------------------------------------------------------------------

COLD = """
import os, sys
import mlflow.store.tracking.sqlalchemy_store  # once, before the forks: all sixteen start at the same moment
from resources.mlflow_tracking import MlflowTracking

def work(number):
    tracking = MlflowTracking()
    with tracking.run(customization="orders", base_revision="b", input_key=f"key{number // 2}") as run:
        for step in range(3):
            run.log_metrics(step, {f"loss{number}": step})
            run.flush()
    version = tracking.register_adapter("orders", run.run_id, "same digest")
    tracking.set_alias("orders", "challenger", version.version)
    os.write(1, f"{number} {run.run_id} {version.version}\\n".encode())

children = []
for number in range(16):
    if (pid := os.fork()) == 0:
        try:
            work(number)
        except BaseException as error:
            os.write(2, f"{number}: {error!r}\\n".encode())
            os._exit(1)
        os._exit(0)
    children.append(pid)
sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))
"""


def test_sixteen_processes_open_a_fresh_store_together(evergreen_home):
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    lines = sorted((line.split() for line in done.stdout.splitlines()), key=lambda line: int(line[0]))
    runs = [run for _, run, _ in lines]
    assert runs[::2] == runs[1::2] and len(set(runs)) == 8
    assert {version for _, _, version in lines} == {"1"}
    tracking = MlflowTracking()
    stored = all_runs(tracking)
    assert sorted(run.info.run_id for run in stored) == sorted(set(runs))
    assert all(run.info.status == "FINISHED" and len(run.data.metrics) == 2 for run in stored)
    assert len(client(tracking).search_model_versions("name = 'orders'")) == 1
    database = sqlite3.connect(evergreen_home / "mlflow" / "mlflow.db")
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert database.execute("SELECT count(*) FROM metrics").fetchone() == (16 * 3,)
    database.close()


# -- the store -----------------------------------------------------------------------------------------


def test_a_store_of_an_older_mlflow_is_migrated(tmp_path):
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine
    from mlflow.store.tracking.dbmodels.initial_models import Base

    path = tmp_path / "older.db"
    config = _get_alembic_config(f"sqlite:///{path}")
    newest = ScriptDirectory.from_config(config).get_revision("head")
    engine = create_sqlalchemy_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, str(newest.down_revision))
    engine.dispose()

    def revision() -> str:
        connection = sqlite3.connect(path)
        try:
            return connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]
        finally:
            connection.close()

    assert revision() == newest.down_revision
    ensure_store(f"sqlite:///{path}")
    assert revision() == newest.revision


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_files_are_below_the_directory_that_the_store_is_in_now(tracking, monkeypatch, tmp_path, move):
    with tracking.run(**RUN) as run:
        run.log_artifacts(adapter_folder(tmp_path), "adapter")
    tracking.register_adapter("orders", run.run_id, DIGEST)
    artifacts = client(tracking).get_run(run.run_id).info.artifact_uri
    client(tracking).create_model_version("orders", f"{artifacts}/adapter", run.run_id)
    client(tracking).create_experiment("elsewhere", "/elsewhere/mlflow/artifacts/x")
    old, new = Path(os.environ["EVERGREEN_HOME"]), tmp_path / "house Grüße"
    move(old, new)
    before = {path: path.stat().st_mtime_ns for path in old.rglob("artifacts/**/*")}

    monkeypatch.setenv("EVERGREEN_HOME", str(new))
    moved = MlflowTracking(patience_seconds=5)
    with moved.run(**RUN) as again:
        pass
    with moved.run(**{**RUN, "input_key": "6f" * 32}) as another:
        another.log_text("new", "report.html")
    assert again.run_id == run.run_id
    for run_id, name in ((run.run_id, "adapter/adapter_config.json"), (another.run_id, "report.html")):
        files = Path(str(client(moved).get_run(run_id).info.artifact_uri))
        assert files.is_relative_to(new / "mlflow/artifacts/evergreen")
        assert (files / name).is_file()
    version = client(moved).get_model_version_download_uri("orders", "2")
    assert (Path(version) / "adapter_config.json").is_file() and Path(version).is_relative_to(new)
    assert client(moved).get_experiment("0").artifact_location == str(new / "mlflow/artifacts/0")
    elsewhere = client(moved).get_experiment_by_name("elsewhere")
    assert elsewhere and elsewhere.artifact_location == "/elsewhere/mlflow/artifacts/x"
    assert {path: path.stat().st_mtime_ns for path in old.rglob("artifacts/**/*")} == before


def test_files_that_a_person_keeps_elsewhere_stay_there(tmp_path):
    store, files = tmp_path / "store/mlflow.db", str(tmp_path / "files")
    ensure_store(f"sqlite:///{store}", files)
    ensure_store(f"sqlite:///{store}", str(store.parent / "artifacts"))
    ensure_store(f"sqlite:///{store}", str(tmp_path / "other"))
    with sqlite3.connect(store) as connection:
        assert connection.execute("SELECT artifact_location FROM experiments").fetchall() == [(f"{files}/0",)]


def test_a_store_that_was_removed_is_made_anew_by_the_same_process(tmp_path):
    store = tmp_path / "mlflow" / "mlflow.db"
    for _ in range(2):
        ensure_store(f"sqlite:///{store}")
        with contextlib.closing(sqlite3.connect(store)) as connection:
            (location,) = connection.execute("SELECT artifact_location FROM experiments").fetchone()
        assert location.startswith(str(store.parent))
        shutil.rmtree(store.parent)


def test_ensure_store_leaves_other_stores_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("http://127.0.0.1:1", "postgresql://user@127.0.0.1:1/mlflow", "sqlite://"):
        ensure_store(uri)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_named(tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_text("this is text, not a database " * 100)
    with pytest.raises(TrackingUnavailable, match=r"mlflow\.db is not a SQLite database"):
        MlflowTracking(tracking_uri=f"sqlite:///{path}").find_run("k")


# -- MLflow is away ------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_unreachable_server(evergreen_home):
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    tracking = MlflowTracking(tracking_uri=uri, patience_seconds=1)
    start = time.monotonic()
    message = r"http://user:\*\*\*@127\.0\.0\.1:\d+ cannot be reached"
    with (
        pytest.raises(TrackingUnavailable, match=message) as raised,
        tracking.run(**RUN),
    ):
        raise AssertionError("not reached")
    assert "secret" not in str(raised.value)
    assert time.monotonic() - start < 20


def lock(tracking: MlflowTracking) -> sqlite3.Connection:
    path = make_url(tracking.tracking_uri).database
    assert path
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


@pytest.fixture
def impatient(tracking, monkeypatch) -> MlflowTracking:
    """Without MLflow's own wait of 20 s for a locked database, so that the test is short."""
    import sqlalchemy.sql

    text = sqlalchemy.sql.text
    monkeypatch.setattr(
        "mlflow.store.db.utils.sql.text",
        lambda sql: text(sql.replace("busy_timeout = 20000", "busy_timeout = 50")),
    )
    return tracking.model_copy(update={"patience_seconds": 0.5})


def test_a_locked_database_is_waited_for(impatient):
    patient = MlflowTracking(tracking_uri=impatient.tracking_uri, patience_seconds=30)
    patient.find_run("k")
    connection = lock(impatient)
    timer = threading.Timer(1, connection.close)
    timer.start()
    with patient.run(**RUN):
        pass
    timer.join()
    assert [run.info.status for run in all_runs(patient)] == ["FINISHED"]


def test_a_locked_database_is_named_and_nothing_is_lost(impatient):
    run: TrackedRun
    connections = []
    with pytest.raises(TrackingUnavailable, match=r"mlflow\.db"), impatient.run(**RUN) as run:
        run.log_metrics(1, {"loss": 1.0})
        run.flush()
        connections.append(lock(impatient))
        run._flushed -= 60
        run.log_metrics(2, {"loss": 0.5})  # due to be sent; the training goes on
        run.log_metrics(3, {"loss": 0.4})
    connections.pop().close()
    assert status(impatient, KEY) == "RUNNING"
    with impatient.run(**RUN) as again:
        for step, loss in ((1, 1.0), (2, 0.5), (3, 0.4)):
            again.log_metrics(step, {"loss": loss})
    assert again.run_id == run.run_id
    assert status(impatient, KEY) == "FINISHED"
    history = client(impatient).get_metric_history(run.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 0.4)]


def test_the_first_error_survives_when_mlflow_is_away_too(impatient):
    connections = []
    with pytest.raises(ValueError, match="the real reason") as raised, impatient.run(**RUN):
        connections.append(lock(impatient))
        raise ValueError("the real reason")
    connections.pop().close()
    assert any("could not be marked as failed" in note for note in raised.value.__notes__)


def test_bad_requests_are_not_repeated(tracking):
    from mlflow.exceptions import MlflowException

    start = time.monotonic()
    with pytest.raises(MlflowException, match="nonsense"):
        tracking.run_url("nonsense")
    assert time.monotonic() - start < 3


def test_a_deleted_experiment_is_named(tracking):
    with tracking.run(**RUN):
        pass
    found = client(tracking).get_experiment_by_name("evergreen")
    assert found
    client(tracking).delete_experiment(found.experiment_id)
    with pytest.raises(ValueError, match="'evergreen' is deleted: restore it"):
        MlflowTracking().find_run(KEY)


# -- git -----------------------------------------------------------------------------------------------


def test_git_commit(tmp_path):
    def git(*command: str) -> str:
        author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        done = subprocess.run(
            ["git", *author, *command], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    assert git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "a.txt").write_text("a")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "b.txt").write_text("b")
    assert git_commit(tmp_path) == f"{commit}-dirty"
    assert git_commit(tmp_path / "missing") is None


def test_git_commit_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(Path(__file__).parent) is None
