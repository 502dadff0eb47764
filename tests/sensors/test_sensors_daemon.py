"""A real daemon that is killed at bad moments: no action is lost, and none is repeated."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from daemons import start_daemon
from maintenance_world import REVISION, make_evidence, make_spec, release

from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.cli.supervisor import end_groups
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import Policy, decide
from ml_assets.decisions.records import Decision
from ml_assets.decisions.tags import DECISION_TAG
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings

ROOT = Path(__file__).parents[2]
NAMES = ("one", "two", "three")


class Deployment:
    """A Dagster instance, its daemon as a process of its own, and the book."""

    def __init__(self, home: Path):
        self.home, self.dagster_home = home, home / "dagster"
        self.dagster_home.mkdir()
        shutil.copy(ROOT / "dagster.yaml", self.dagster_home)
        workspace = {"load_from": [{"python_module": {"module_name": "fleet_location"}}]}
        (self.dagster_home / "workspace.yaml").write_text(json.dumps(workspace))
        self.instance = dg.DagsterInstance.from_config(str(self.dagster_home))
        self.instance.add_dynamic_partitions(str(BASE_MODELS.name), [REVISION])
        self.ledger = Ledger(Settings.from_env().ledger_url)
        self.book = DecisionBook(self.ledger)
        for name in NAMES:
            release(self.ledger, name)
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        daemon = start_daemon(self.home, self.dagster_home, FLEET=",".join(NAMES))
        self.started.append(daemon)
        return daemon

    def decide(self, name: str, evidence: str) -> Decision:
        policy = Policy.of(make_spec(name), Settings.from_env())
        made = dataclasses.replace(decide(make_evidence(), policy), customization=name, evidence=evidence)
        return self.book.record(made)

    def runs(self) -> Counter[str]:
        """How many runs each decision has."""
        runs = self.instance.get_runs()
        return Counter(run.tags[DECISION_TAG] for run in runs if DECISION_TAG in run.tags)

    def wait(self, done, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                log = (self.home / "daemon.log").read_text()[-4000:]
                raise AssertionError(f"not in time: {self.runs()} {self.book.claims()}\n{log}")
            time.sleep(0.2)


@pytest.fixture
def deployment(evergreen_home: Path) -> Iterator[Deployment]:
    deployment = Deployment(evergreen_home)
    yield deployment
    end_groups([process.pid for process in deployment.started])
    for process in deployment.started:
        process.wait(10)
    deployment.ledger.close()
    deployment.instance.dispose()


def ended(deployment: Deployment, decisions: list[Decision]) -> bool:
    return all(deployment.book.get(decision.id).end for decision in decisions)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["kill_in_tick", "kill_in_run"])
def test_a_daemon_that_is_killed_while_it_acts(deployment: Deployment, moment: str) -> None:
    """`kill_in_tick`: the tick has claimed, and its answer never arrives. `kill_in_run`: the run works, the
    daemon may not have written down its tick."""
    decisions = [deployment.decide(name, "look-1") for name in NAMES]
    daemon = deployment.start()
    (deployment.home / moment).write_text(str(daemon.pid))
    deployment.wait(lambda: daemon.poll() is not None)
    assert daemon.returncode == -signal.SIGKILL
    if moment == "kill_in_tick":
        assert deployment.runs() == {} and len(deployment.book.claims()) == len(NAMES)
    deployment.start()
    deployment.wait(lambda: ended(deployment, decisions))
    assert deployment.runs() == {decision.id: 1 for decision in decisions}
    assert {deployment.book.get(decision.id).state for decision in decisions} == {"succeeded"}
    assert deployment.book.claims() == []


@pytest.mark.slow
def test_a_daemon_that_is_killed_at_any_moment(deployment: Deployment) -> None:
    chance = random.Random(7)
    decisions: list[Decision] = []
    for number in range(4):
        decisions += [deployment.decide(name, f"look-{number}") for name in NAMES]
        daemon = deployment.start()
        time.sleep(chance.uniform(4, 14))
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait(10)
    deployment.start()
    deployment.wait(lambda: ended(deployment, decisions), 180)
    runs = deployment.runs()
    assert set(runs) == {decision.id for decision in decisions}, "nothing is lost"
    # a run whose process was killed with the daemon is repeated by Dagster, under the same decision
    retried = {run.tags[DECISION_TAG] for run in deployment.instance.get_runs() if run.parent_run_id}
    assert all(count == 1 for decision, count in runs.items() if decision not in retried)
