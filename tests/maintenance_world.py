"""What the tests of decisions and sensors share: findings of a look, a release, a fleet with a ledger."""

import dataclasses
from typing import Any

from ml_assets.decisions.diagnosis import Evidence, Policy
from ml_assets.drift_reports.findings import DriftFindings, Look, Outcome, Signal
from ml_assets.drift_reports.watch import FEW_LABELS
from ml_assets.endpoints.ledger import Ledger, Release
from ml_assets.spec import CustomizationSpec

REVISION = "tiny@0123456789ab"
ADAPTER, DATASET = "a" * 64, "d" * 64
NOW = "2026-03-10T12:00:00.000000+00:00"


def make_spec(name: str = "home", **blocks: Any) -> CustomizationSpec:
    return CustomizationSpec.model_validate(
        {
            "name": name,
            "source": {"kind": "jsonl", "path": "rows.jsonl"},
            "prompt": {"user": "{text}", "target": "{answer}"},
            "base_models": ["tiny"],
            "evaluation": {"task": "text"},
            **blocks,
        }
    )


def make_policy(**maintenance: Any) -> Policy:
    spec = make_spec(maintenance=maintenance)
    return Policy(spec.maintenance, margin=0.02, value_of_right=1.0, currency="EUR", uses_labels=True)


def signal(name: str = "outcome_feedback", alarm: bool = True, severity: str = "error") -> Signal:
    group = "outcome" if severity == "error" else "inputs"
    text, p = "a signal", 1e-5 if alarm else 0.5
    return Signal(name, group, alarm, severity, 1.0, 900.0, 365.0, text, p)  # type: ignore[arg-type]


def looks(*failed: bool) -> list[Look]:
    return [Look(to_seq=100 * (n + 1), at=NOW, failed=one) for n, one in enumerate(failed)]


def make_findings(
    loss: float | None = 0.15,
    labelled: int = 60,
    signals: list[Signal] | None = None,
    window: list[Look] | None = None,
    **changes: Any,
) -> DriftFindings:
    """A look that failed three times in a row, with a measured loss and enough labels."""
    reference = 0.9
    accuracy = None if loss is None else reference - loss
    outcome = Outcome(
        labelled=labelled,
        accuracy=accuracy,
        accuracy_interval=None,
        estimated_accuracy=None,
        reference_accuracy=reference,
        value_per_1000=None,
        reference_value_per_1000=None,
        loss=loss,
        measured=accuracy is not None and labelled >= FEW_LABELS,
        measured_on=labelled,
    )
    fields: dict[str, Any] = {
        "customization": "home",
        "adapter_digest": ADAPTER,
        "base_revision": REVISION,
        "dataset_digest": DATASET,
        "from_seq": 1,
        "to_seq": 300,
        "requests": 300,
        "requests_per_day": 100.0,
        "at": NOW,
        "signals": [signal()] if signals is None else signals,
        "outcome": outcome,
        "looks": looks(True, True, True) if window is None else window,
        "unlabelled": [f"chatcmpl-{n}" for n in range(80)],
    }
    return DriftFindings(**(fields | changes))


def make_evidence(findings: DriftFindings | None = None, **changes: Any) -> Evidence:
    findings = findings or make_findings()
    fields: dict[str, Any] = {
        "findings": findings,
        "dataset_digest": DATASET,
        "train_rows": 400,
        "new_rows": findings.outcome.labelled,
        "now": NOW,
        "predicted": {"incremental_update": 30.0, "full_retrain": 120.0},
    }
    return Evidence(**(fields | changes))


def make_release(name: str = "home", adapter: str = ADAPTER, **changes: Any) -> Release:
    release = Release(
        customization=name,
        base_revision=REVISION,
        base_digest="b" * 64,
        adapter_digest=adapter,
        report_digest="c" * 64,
        mlflow_version="1",
        run_id="run",
        actor="test",
        reason="test",
    )
    return dataclasses.replace(release, **changes)


def release(ledger: Ledger, name: str = "home", adapter: str = ADAPTER) -> Release:
    with ledger.release_transaction(name, "run") as tx:
        return tx.record(make_release(name, adapter))
