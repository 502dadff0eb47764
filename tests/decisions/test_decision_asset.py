"""The decision asset in Dagster: what it reads, writes and shows."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from maintenance_world import REVISION, make_findings, make_spec, release, signal

from ml_assets.artifacts import ArtifactRef, ArtifactStore
from ml_assets.decisions.asset import build_decision_asset
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.records import Cost
from ml_assets.drift_reports.findings import DriftFindings
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings
from ml_assets.traffic.records import TrafficRecord
from ml_assets.traffic.store import TrafficLog
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource

KEY = dg.AssetKey(["home", "decision"])


class Home:
    """A champion with its dataset in a store, and looks at its traffic."""

    def __init__(self) -> None:
        settings = Settings.from_env()
        self.store = ArtifactStore(settings.artifacts_url)
        self.ledger, self.traffic = Ledger(settings.ledger_url), TrafficLog(settings.traffic_url)
        self.book = DecisionBook(self.ledger)
        self.dataset = self.make_dataset(400)
        self.adapter = self.make_adapter(0)
        release(self.ledger, adapter=self.adapter.digest)
        self.instance = dg.DagsterInstance.ephemeral()

    def make_dataset(self, rows: int) -> ArtifactRef:
        manifest = {"rows": {"train": rows, "evaluation": 100}, "source_version": "v1"}
        return self.store.publish("dataset", {"manifest.json": json.dumps(manifest).encode()})

    def make_adapter(self, generation: int) -> ArtifactRef:
        update = {"update": {"generation": generation}} if generation else {}
        manifest = json.dumps(update).encode()
        return self.store.publish("adapter", {"manifest.json": manifest})

    def ask(self, count: int) -> None:
        self.traffic.append(
            [
                TrafficRecord(
                    id=f"chatcmpl-{n}",
                    at="2026-03-10T12:00:00+00:00",
                    customization="home",
                    key_id="key",
                    adapter_digest=self.adapter.digest,
                    base_revision=REVISION,
                    messages=[{"role": "user", "content": f"question {n}"}],
                    answer="yes",
                    status=200,
                    finish_reason="stop",
                    prompt_tokens=1,
                    completion_tokens=1,
                    latency_ms=1.0,
                    first_token_ms=1.0,
                    mean_logprob=-0.1,
                )
                for n in range(count)
            ]
        )

    def materialize(
        self, findings: DriftFindings, dataset: ArtifactRef | None = None, **maintenance: Any
    ) -> dg.ExecuteInProcessResult:
        known = dataclasses.replace(
            findings, adapter_digest=self.adapter.digest, dataset_digest=self.dataset.digest
        )
        report = self.store.publish("drift_report", {"report.json": json.dumps(known.to_json()).encode()})

        @dg.asset(key=dg.AssetKey(["home", "drift_report"]))
        def drift_report() -> dg.MaterializeResult[ArtifactRef]:
            return dg.MaterializeResult(value=report)

        @dg.asset(key=dg.AssetKey(["home", "dataset"]))
        def the_dataset() -> dg.MaterializeResult[ArtifactRef]:
            return dg.MaterializeResult(value=dataset or self.dataset)

        return dg.materialize(
            [drift_report, the_dataset, build_decision_asset(make_spec(maintenance=maintenance))],
            instance=self.instance,
            resources={
                "artifact_store": ArtifactStoreResource(),
                "io_manager": ArtifactRefIOManager(),
                "ledger": LedgerResource(),
                "traffic_log": TrafficLogResource(),
            },
            raise_on_error=False,
        )


@pytest.fixture
def home(evergreen_home: Path) -> Iterator[Home]:
    home = Home()
    yield home
    home.ledger.close()
    home.traffic.close()


def shown(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    assert result.success
    (event,) = result.asset_materializations_for_node("home__decision")
    return {name: value.value for name, value in event.metadata.items()}


def checks(result: dg.ExecuteInProcessResult) -> dict[str, bool]:
    return {e.check_name: e.passed for e in result.get_asset_check_evaluations() if e.asset_key == KEY}


def test_a_confirmed_loss_is_shown_with_its_action_and_why_not_the_others(home: Home) -> None:
    home.book.record_cost(Cost("home", "training", REVISION, "run0", 200.0, 400))
    home.book.record_cost(Cost("home", "evaluation", REVISION, "run0", 10.0, 100))
    result = home.materialize(make_findings())
    metadata = shown(result)
    assert (metadata["action"], metadata["status"]) == ("incremental_update", "to_do")
    assert metadata["predicted_device_seconds"] == pytest.approx(0.5 * (60 + 40) + 10)
    assert metadata["predicted_gain_per_month"] == pytest.approx(450)
    why = {record.data["action"]: record.data for record in metadata["why_not"].records}
    assert set(why) == {"watch", "extend_dataset", "full_retrain", "ask_for_labels"}
    assert why["full_retrain"]["device seconds"] == "240"
    assert "**incremental_update**" in metadata["decision"] and "not **watch**" in metadata["decision"]
    (history,) = home.book.latest("home", 5)
    assert metadata["runs"].endswith(f"evergreen%2Fdecision%3D{history.decision.id}")
    assert history.is_open and history.decision.base_revision == REVISION
    assert checks(result) == {"no_confirmed_loss": False, "within_budget": True}
    assert not any(e.severity == dg.AssetCheckSeverity.ERROR for e in result.get_asset_check_evaluations())


def became(metadata: dict[str, Any]) -> dict[str, str]:
    """{action: what became of its newest decision}"""
    lines = [record.data["action"] for record in reversed(metadata["history"].records)]
    return dict(line.split(": ", 1) for line in lines)


def test_the_same_look_decides_once(home: Home) -> None:
    first = shown(home.materialize(make_findings()))
    again = shown(home.materialize(make_findings()))
    assert first["run_key"] == again["run_key"] and len(home.book.latest("home", 5)) == 1
    later = shown(home.materialize(make_findings(to_seq=400)))
    assert later["action"] == "watch", "an action is under way"
    assert became(later) == {"watch": "no action", "incremental_update": "to do"}
    update = home.book.latest("home", 5)[1].decision
    home.book.step(update.id, "succeeded", "it serves", "run-1234-56")
    last = shown(home.materialize(make_findings(to_seq=500)))
    assert became(last)["incremental_update"] == "succeeded, run run-1234"


def test_labels_that_came_without_a_request_are_new_evidence(home: Home) -> None:
    few = make_findings(labelled=3, to_seq=120, feedback_seq=3)
    assert shown(home.materialize(few))["action"] == "ask_for_labels"
    came = make_findings(labelled=53, to_seq=120, feedback_seq=53)
    assert shown(home.materialize(came))["action"] == "incremental_update"
    assert make_findings().evidence.endswith("-300"), "of streams without feedback it is as it was"


def test_new_rows_are_those_that_the_dataset_would_take(home: Home) -> None:
    findings = make_findings(labelled=60)
    findings = dataclasses.replace(findings, outcome=dataclasses.replace(findings.outcome, usable=10))
    metadata = shown(home.materialize(findings))
    assert (metadata["action"], metadata["seen"]["new_rows"]) == ("ask_for_labels", 10)


def test_the_cooldown_lasts_however_many_looks_there_are(home: Home) -> None:
    metadata = shown(home.materialize(make_findings()))
    (history,) = home.book.latest("home", 5)
    home.book.finish(history.decision, "succeeded", "", "run1")
    for number in range(120):
        seen = dataclasses.replace(history.decision, evidence=f"look{number}", action="watch")
        home.book.record(dataclasses.replace(seen, status="no_action"))
    metadata = shown(home.materialize(make_findings(to_seq=400)))
    assert metadata["action"] == "watch" and "cooldown" in metadata["decision"]


def test_the_look_is_noted_for_the_sensor(home: Home) -> None:
    home.ask(130)
    shown(home.materialize(make_findings(to_seq=120)))
    note = home.book.notes("home")["home"]["look"].value
    assert (note["to_seq"], note["looked"], note["kind"]) == (120, 120, "loss")


def test_one_of_a_large_fleet_has_to_stand_out(home: Home) -> None:
    """The same look that leads to an update of one customization alone is watched among a thousand."""
    for number in range(999):
        home.book.note(f"other{number}", "look", {"kind": "quiet", "e_value": 0.5})
    weak = [dataclasses.replace(signal(), p_value=2e-3)]
    metadata = shown(home.materialize(make_findings(signals=weak)))
    assert metadata["action"] == "watch" and "stand out among 1000" in metadata["diagnosis"]
    note = home.book.notes("home")["home"]["look"].value
    assert 10 < note["e_value"] < 10_000 and note["kind"] == "unconfirmed"
    strong = [dataclasses.replace(signal(), p_value=1e-9)]
    later = shown(home.materialize(make_findings(signals=strong, to_seq=400)))
    assert later["action"] == "incremental_update"


def test_labels_are_asked_for_in_a_file(home: Home, evergreen_home: Path) -> None:
    home.ask(40)
    findings = make_findings(labelled=3, unlabelled=[f"chatcmpl-{n}" for n in (7, 3, 99, 5)])
    metadata = shown(home.materialize(findings, ask_for_labels=3))
    assert metadata["action"] == "ask_for_labels"
    path = Path(metadata["labels_wanted"])
    assert path.is_relative_to(evergreen_home / "labels" / "home")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["request"] for row in rows] == ["chatcmpl-7", "chatcmpl-3"], "99 is not kept any more"
    assert {row["right_answer"] for row in rows} == {""}
    (history,) = home.book.latest("home", 1)
    assert history.state == "succeeded"
    (alert,) = home.book.undelivered()
    assert alert.title == "home: labels are wanted" and str(alert.url).endswith("/assets/home/decision")


def test_a_blocked_budget_is_shown_and_alerted_once(home: Home) -> None:
    home.book.record_cost(Cost("home", "training", REVISION, "run0", 200.0, 400))
    for to_seq in (300, 400):
        result = home.materialize(make_findings(to_seq=to_seq), device_seconds_per_month=220)
        assert shown(result)["status"] == "blocked_by_budget"
        assert checks(result)["within_budget"] is False
    (alert,) = home.book.undelivered()
    assert "incremental_update is blocked by the budget" in alert.title


def test_generations_and_rows_are_read_from_artifacts(home: Home) -> None:
    home.adapter = home.make_adapter(5)
    release(home.ledger, adapter=home.adapter.digest)
    grown = home.make_dataset(450)
    metadata = shown(home.materialize(make_findings(labelled=10), grown))
    assert metadata["action"] == "full_retrain"
    assert metadata["seen"]["new_rows"] == 50 and metadata["seen"]["generation"] == 5


def test_before_anything_serves_nothing_is_decided(home: Home) -> None:
    nothing = make_findings(loss=None, labelled=0, signals=[], window=[], unlabelled=[])
    assert shown(home.materialize(nothing))["action"] == "watch"


def test_a_damaged_champion_fails_with_its_name(home: Home) -> None:
    path = Path(home.store.location(home.adapter)) / "manifest.json"
    path.chmod(0o644)
    path.write_text("damaged")
    result = home.materialize(make_findings())
    assert not result.success
    (event,) = result.get_step_failure_events()
    assert "manifest.json" in str(event.step_failure_data.user_failure_data)
