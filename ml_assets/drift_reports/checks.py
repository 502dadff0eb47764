"""Asset checks of a drift report: one for each signal. They don't block anything: the decision reads the
report."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from ml_assets.drift_reports.findings import DriftFindings, Signal

TEXTS = {
    "inputs_classifier": "No classifier tells the requests from the rows that the champion was trained on.",
    "inputs_mmd": "Windows of requests are as far from those rows as such rows are from one another.",
    "outputs_mix": "The answers have the labels or intents that they have on the frozen rows.",
    "outputs_length": "The answers are as long as on the frozen rows.",
    "outputs_malformed": "No more answers are malformed than on the frozen rows.",
    "outputs_refusals": "No more answers are refused than on the frozen rows.",
    "outcome_feedback": "By the right answers of users, the champion is as good as on the frozen rows.",
    "outcome_estimated": "The champion is as sure of its answers as on the frozen rows.",
}


def check_specs(asset: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    return [dg.AssetCheckSpec(name, asset=asset, description=text) for name, text in TEXTS.items()]


def check_results(
    asset: dg.AssetKey, findings: DriftFindings, pictures: Mapping[str, str | None]
) -> list[dg.AssetCheckResult]:
    """Results of `check_specs` from a report."""
    signals = {signal.name: signal for signal in findings.signals}
    return [_result(asset, name, signals.get(name), findings, pictures) for name in TEXTS]


def _result(
    asset: dg.AssetKey,
    name: str,
    signal: Signal | None,
    findings: DriftFindings,
    pictures: Mapping[str, str | None],
) -> dg.AssetCheckResult:
    if signal is None or not findings.requests:
        why = (
            "nothing to look at yet"
            if not findings.requests
            else "does not apply, or has too few reference rows"
        )
        return dg.AssetCheckResult(
            asset_key=asset,
            check_name=name,
            passed=True,
            severity=dg.AssetCheckSeverity.WARN,
            description=why,
        )
    metadata: dict[str, Any] = {
        "severity": signal.severity,
        "statistic": signal.statistic,
        "evidence": signal.e_value,
        "alarm_from": signal.threshold,
        "requests": findings.requests,
        "up_to_request": findings.to_seq,
    }
    if signal.p_value is not None:
        metadata["p_value"] = signal.p_value
    if signal.effect is not None:
        metadata["effect"] = dg.MetadataValue.text(f"{signal.effect:+.4f} {signal.effect_unit}")
    if signal.effect_interval is not None:
        low, high = signal.effect_interval
        metadata["effect_interval"] = dg.MetadataValue.text(f"{low:+.4f} to {high:+.4f}")
    if signal.alarmed_at is not None:
        metadata["alarmed_at_request"] = signal.alarmed_at
    if signal.rows:
        columns = [dg.TableColumn(name) for name in ("request", "prompt", "answer", "why")]
        records = [dg.TableRecord(dict(row.items())) for row in signal.rows]
        metadata["rows"] = dg.MetadataValue.table(records, schema=dg.TableSchema(columns))
    wanted = {
        "outputs_mix": "mix",
        "outputs_length": "series",
        "outputs_malformed": "series",
        "outputs_refusals": "series",
    }
    drawn = [pictures.get("evidence"), pictures.get(wanted.get(name, ""))]
    if shown := [picture for picture in drawn if picture]:
        metadata["over_time"] = dg.MetadataValue.md("\n\n".join(f"![{name}]({picture})" for picture in shown))
    return dg.AssetCheckResult(
        asset_key=asset,
        check_name=name,
        passed=not signal.alarm,
        severity=dg.AssetCheckSeverity.ERROR if signal.severity == "error" else dg.AssetCheckSeverity.WARN,
        description=signal.description,
        metadata=metadata,
    )
