"""A real daemon, and the runs of a migration, killed at bad moments: one backfill, nothing trained twice."""

import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from daemons import start_daemon
from dagster._core.execution.backfill import BulkActionStatus
from maintenance_world import make_release
from migration_location import NAMES, write_base

from ml_assets.base_models.identity import identify, revision_key
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.cli.supervisor import end_groups
from ml_assets.decisions.book import DecisionBook
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


class Deployment:
    """An instance with its daemon as a process of its own; three customizations serve on a first revision."""

    def __init__(self, home: Path):
        self.home, self.dagster_home = home, home / "dagster"
        self.dagster_home.mkdir()
        shutil.copy(ROOT / "dagster.yaml", self.dagster_home)
        workspace = {"load_from": [{"python_module": {"module_name": "migration_location"}}]}
        (self.dagster_home / "workspace.yaml").write_text(json.dumps(workspace))
        self.instance = dg.DagsterInstance.from_config(str(self.dagster_home))
        self.ledger = Ledger(Settings.from_env().ledger_url)
        self.book = DecisionBook(self.ledger)
        self.started: list[subprocess.Popen[bytes]] = []
        first = self.publish("first")
        self.instance.add_dynamic_partitions(str(BASE_MODELS.name), [first])
        for name in NAMES:
            with self.ledger.release_transaction(name, "run") as tx:
                tx.record(make_release(name, base_revision=first))
            self.book.note(name, "dataset", {"digest": "d" * 64, "train_rows": 100, "source_version": "v"})
            facts = {"adapter": "a" * 64, "base_revision": first, "verdict": "promote"}
            self.book.note(name, "candidate", facts | {"dataset": "d" * 64, "source_version": "v"})
        self.second = self.publish("second")

    def publish(self, content: str) -> str:
        write_base(content)
        return revision_key("tiny", identify(self.home / "base"))

    def start(self) -> subprocess.Popen[bytes]:
        daemon = start_daemon(self.home, self.dagster_home)
        self.started.append(daemon)
        return daemon

    def kill_at(self, moment: str, *processes: int) -> None:
        (self.home / "kill").write_text(" ".join([moment, *map(str, processes)]))

    def trained(self) -> list[str]:
        """The customizations whose adapters were begun, in this order."""
        path = self.home / "ran.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line["customization"] for line in lines if line["asset"] == "adapter"]

    def wait(self, done: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                log = (self.home / "daemon.log").read_text()[-6000:]
                states = [(h.decision.customization, h.state) for h in self.book.migrations()]
                backfills = [(one.backfill_id, one.status) for one in self.instance.get_backfills()]
                raise AssertionError(f"not in time: {states} {backfills} {self.trained()}\n{log}")
            time.sleep(0.2)

    def ended(self) -> bool:
        histories = self.book.migrations(self.second)
        return len(histories) >= len(NAMES) and not any(history.is_open for history in histories)

    def only_backfill(self) -> BulkActionStatus:
        [backfill] = self.instance.get_backfills()
        assert backfill.tags["evergreen/base_revision"] == self.second
        return backfill.status


@pytest.fixture
def deployment(evergreen_home: Path) -> Iterator[Deployment]:
    deployment = Deployment(evergreen_home)
    yield deployment
    end_groups([process.pid for process in deployment.started])
    for process in deployment.started:
        process.wait(10)
    deployment.ledger.close()
    deployment.instance.dispose()


@pytest.mark.parametrize("moment", ["planned", "claimed", "started"])
def test_a_daemon_that_is_killed_between_two_steps(deployment: Deployment, moment: str) -> None:
    daemon = deployment.start()
    deployment.kill_at(moment, daemon.pid, 0)
    deployment.wait(lambda: daemon.poll() is not None)
    assert daemon.returncode == -signal.SIGKILL
    assert len(list(deployment.instance.get_backfills())) == (moment == "started")
    deployment.start()
    deployment.wait(deployment.ended)
    deployment.wait(lambda: deployment.only_backfill() == BulkActionStatus.COMPLETED_SUCCESS)
    assert {history.state for history in deployment.book.migrations()} == {"succeeded"}
    assert Counter(deployment.trained()) == dict.fromkeys(NAMES, 1)
    assert deployment.book.claims() == []


def test_a_run_that_is_killed_goes_on_where_it_was(deployment: Deployment) -> None:
    """Where values are equal, the order is that of the names. The making of the second adapter kills the run.
    Dagster repeats all steps; that those of the first are found in the memo is for the tests with models."""
    deployment.kill_at("three", 0)
    deployment.start()
    deployment.wait(deployment.ended)
    deployment.wait(lambda: deployment.only_backfill() == BulkActionStatus.COMPLETED_SUCCESS)
    assert deployment.trained() == ["one", "one", "three", "two"]
    runs = [run for run in deployment.instance.get_runs() if "evergreen/migration" in run.tags]
    assert len(runs) == 2 and {history.state for history in deployment.book.migrations()} == {"succeeded"}


def test_one_that_fails_does_not_stop_the_others(deployment: Deployment) -> None:
    (deployment.home / "fail_one").write_text("")
    deployment.start()
    deployment.wait(lambda: len(deployment.book.migrations(deployment.second)) == len(NAMES) + 1)
    states = {
        h.decision.customization: h.state for h in deployment.book.migrations() if h.decision.attempt == 1
    }
    assert states == {"one": "failed", "two": "succeeded", "three": "succeeded"}
    assert deployment.trained() == ["one", "three", "two"]
    assert deployment.only_backfill() == BulkActionStatus.COMPLETED_FAILED
